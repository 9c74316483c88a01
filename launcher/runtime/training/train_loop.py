"""The training loop: batches in, steps dispatched one ahead of what is read, rows out.

Nothing on the way from one step to the next waits for a device. Batches are made by a thread ahead
of time, a step is dispatched before the numbers of the one before it are fetched, and only an
evaluation lets the devices run dry. There is no parallelism in sight: the executor's plan is its
own affair.

The loop ends in one summary however it ends: all steps done, a request to stop (the step at work is
finished first, and a checkpoint written), or an error.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np

from launcher.data.dataset import Dataset
from launcher.data.order import batch_number
from launcher.errors import TrainingError
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.checkpoints.checkpoint_store import Checkpoint
from launcher.runtime.checkpoints.checkpointer import Checkpoints, NoCheckpoints
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import Meter, TrainSummary
from launcher.runtime.records.number_watch import NonFiniteError
from launcher.runtime.records.sinks import Sink
from launcher.runtime.steps.memory_error import explained
from launcher.runtime.training.batch_queue import BatchQueue
from launcher.runtime.training.interrupt import Interrupt, Stop
from launcher.runtime.training.journal import Journal

if TYPE_CHECKING:
    from launcher.runtime.steps.executor import Executor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How long to train, and when to evaluate."""

    steps: int
    # Samples per optimizer step, and per batch of an evaluation.
    global_batch: int
    # An evaluation is after every so many steps and after the last; 0: after the last only.
    eval_every: int
    # Batches of the held-out split in an evaluation; 0: none is made.
    eval_batches: int
    # Where a resumed run goes on, and what it has seen before.
    first_step: int = 0
    progress: Progress | None = None
    # Steps in a row without finite numbers that are forgiven, and how often the run then goes back to
    # its last checkpoint, to go on without the batches of these steps.
    nonfinite_steps: int = 0
    max_rollbacks: int = 0
    # Steps, counted from 1, that say nothing of how fast the others are.
    untypical_steps: frozenset[int] = frozenset()
    # Batches that are made ahead of the step that needs them.
    prefetch: int = 1


def run(
    executor: "Executor",
    dataset: Dataset,
    settings: TrainSettings,
    meter: Meter,
    sinks: Sequence[Sink],
    *,
    learning_rate: Callable[[int], float],
    explain_memory: Callable[[BaseException], TrainingError],
    checkpoints: Checkpoints | None = None,
    goodput: Goodput | None = None,
    at_end: Callable[[int, bool], None] = lambda num_steps, interrupted: None,
    stop: Stop | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainSummary:
    """Train, tell the sinks, and give the summary that they were given.

    `learning_rate` gives the rate of an update, counted from 0; it is for the rows only.
    `explain_memory` says what helps when device memory is used up. `at_end` gets the number of
    steps done, and whether a request to stop ended them, after the last of them and before the summary;
    after an error it is not called. `stop` says when to stop early; None: signals do. Losses that are not
    finite and device memory that is used up raise TrainingError, requests to stop what `stop` says; the sinks
    are finished first, in their order, in every case.
    """
    journal = Journal(
        settings.steps, settings.first_step, meter, sinks, learning_rate, clock,
        untypical_steps=settings.untypical_steps, progress=settings.progress,
        nonfinite_steps=settings.nonfinite_steps, goodput=goodput,
    )  # fmt: skip
    checkpoints = checkpoints or NoCheckpoints()
    with stop or Interrupt() as interrupt:
        try:
            with explained(_with_step(journal, settings, explain_memory)):
                _train_despite(executor, dataset, settings, journal, interrupt, checkpoints)
                journal.check_updates()
                checkpoints.finish()
                at_end(journal.num_steps, interrupt.requested)
        except BaseException as error:
            checkpoints.close()
            journal.finish_despite(error)
            raise
        summary = journal.finish(interrupt.status)
    interrupt.raise_if_requested(f"after step {journal.num_steps} of {settings.steps}")
    return summary


def _train_despite(
    executor: "Executor",
    dataset: Dataset,
    settings: TrainSettings,
    journal: Journal,
    interrupt: Stop,
    checkpoints: Checkpoints,
) -> None:
    """Train, going back to the last checkpoint where numbers are not finite, as often as that is asked."""
    first_step, rollbacks = settings.first_step, 0
    while True:
        steps = range(first_step, settings.steps)
        try:
            with BatchQueue(
                dataset, settings.global_batch, settings.prefetch, journal.left_out
            ) as queue:
                _train(executor, queue, steps, settings, journal, interrupt, checkpoints)
            return
        except NonFiniteError as error:
            newest = checkpoints.newest() if rollbacks < settings.max_rollbacks else None
            if newest is None:
                raise _given_up(error, rollbacks, settings.max_rollbacks) from error
            rollbacks += 1
            first_step = _go_back(executor, journal, newest, error)


def _given_up(error: NonFiniteError, rollbacks: int, allowed: int) -> TrainingError:
    why = f"gone back {rollbacks} times"
    if rollbacks < allowed:
        why = (
            f"{why}, and there is no checkpoint to go back to" if rollbacks else "no checkpoint yet"
        )
    return TrainingError(f"{error}; {why} (train.max_rollbacks={allowed})")


def _go_back(
    executor: "Executor", journal: Journal, checkpoint: Checkpoint, error: NonFiniteError
) -> int:
    """Take everything from a checkpoint; give the step to go on with."""
    step = checkpoint.manifest.step
    bad = {batch_number(bad, journal.left_out) for bad in error.steps if bad >= step}
    left_out = tuple(sorted({*journal.left_out, *bad}))
    log.warning(
        "%s: going back to step %d, and on without batches %s",
        error, step, ", ".join(str(batch) for batch in sorted(bad)),
    )  # fmt: skip
    executor.restore(checkpoint.arrays)
    journal.go_back(step, checkpoint.manifest.progress, left_out)
    return step


def _train(
    executor: "Executor",
    queue: BatchQueue,
    steps: range,
    settings: TrainSettings,
    journal: Journal,
    interrupt: Stop,
    checkpoints: Checkpoints,
) -> None:
    unread = None
    inputs = queue.placed(steps, "train", executor.place)
    for step in steps:
        asked_s = journal.clock()
        placed = next(inputs)
        data_s = journal.waited_s(asked_s)
        dispatched = journal.dispatched(step, executor.step(placed), data_s)
        if unread is not None:
            journal.record(unread, executor.peak_bytes_per_stage())
        unread = dispatched
        stops = interrupt.stops_after(step + 1)
        evaluates = not (stops and interrupt.cuts_short) and _evaluates_after(step + 1, settings)
        ends = stops or step + 1 == settings.steps
        saves = checkpoints.is_due(step + 1, ends=ends)
        if ends or evaluates or saves:
            journal.record(unread, executor.peak_bytes_per_stage())
            unread = None
            saves = saves and (ends or journal.is_sound)
        eval_loss = None
        if evaluates:
            eval_loss = evaluation_loss(executor, queue, settings, interrupt)
            journal.record_evaluation(step, eval_loss)
            # One that was cut short ends the run.
            saves = saves or checkpoints.is_due(step + 1, ends=interrupt.cuts_short)
        taken_s = checkpoints.after_step(step + 1, journal.progress, eval_loss, is_due=saves)
        if taken_s is not None:
            journal.record_checkpoint(taken_s)
        if stops or (evaluates and interrupt.cuts_short):
            return


def _evaluates_after(num_steps: int, settings: TrainSettings) -> bool:
    if settings.eval_batches == 0:
        return False
    is_due = settings.eval_every > 0 and num_steps % settings.eval_every == 0
    return is_due or num_steps == settings.steps


class Evaluates(Protocol):
    """An executor, or anything else that has an evaluation loss."""

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """The loss of a batch, which need not be there yet."""


def evaluation_loss(
    executor: Evaluates, queue: BatchQueue, settings: TrainSettings, interrupt: Stop
) -> float | None:
    """Give the mean loss of the held-out batches, or None if it is cut short."""
    losses = []
    unread = None
    for batch in queue.batches(range(settings.eval_batches), "valid"):
        if interrupt.cuts_short:
            return None
        dispatched = executor.evaluate(batch)
        if unread is not None:
            losses.append(float(jax.device_get(unread)))
        unread = dispatched
    losses.append(float(jax.device_get(unread)))
    return math.fsum(losses) / len(losses)


def _with_step(
    journal: Journal, settings: TrainSettings, explain: Callable[[BaseException], TrainingError]
) -> Callable[[BaseException], TrainingError]:
    """Also say after which step it was: only a result shows that device memory is used up."""

    def told(error: BaseException) -> TrainingError:
        return TrainingError(
            f"after step {journal.num_steps} of {settings.steps}: {explain(error)}"
        )

    return told
