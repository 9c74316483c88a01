"""The training loop: batches in, steps dispatched one ahead of what is read, rows out.

Nothing on the way from one step to the next waits for a device. Batches are made by a thread ahead
of time, a step is dispatched before the numbers of the one before it are fetched, and only an
evaluation lets the devices run dry. There is no parallelism in sight: the executor's plan is its
own affair.

The loop ends in one summary however it ends: all steps done, Ctrl-C (the step at work is finished
first), or an error.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np

from launcher.data.dataset import Dataset
from launcher.errors import TrainingError
from launcher.runtime.batch_queue import BatchQueue
from launcher.runtime.checkpoint_manifest import Progress
from launcher.runtime.checkpointer import Checkpoints, NoCheckpoints
from launcher.runtime.interrupt import Interrupt
from launcher.runtime.journal import Journal
from launcher.runtime.memory_error import explained
from launcher.runtime.metrics import Meter, TrainSummary
from launcher.runtime.sinks import Sink

if TYPE_CHECKING:
    from launcher.runtime.executor import Executor


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
    at_end: Callable[[int, bool], None] = lambda num_steps, interrupted: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainSummary:
    """Train, tell the sinks, and give the summary that they were given.

    `learning_rate` gives the rate of an update, counted from 0; it is for the rows only.
    `explain_memory` says what helps when device memory is used up. `at_end` gets the number of
    steps done, and whether Ctrl-C ended them, after the last of them and before the summary; after
    an error it is not called. A loss that is not finite and device memory that is used up raise
    TrainingError, Ctrl-C raises KeyboardInterrupt; the sinks are finished first, in their order, in
    every case.
    """
    journal = Journal(
        settings.steps, settings.first_step, meter, sinks, learning_rate, clock,
        untypical_steps=settings.untypical_steps, progress=settings.progress,
    )  # fmt: skip
    checkpoints = checkpoints or NoCheckpoints()
    try:
        with (
            Interrupt() as interrupt,
            BatchQueue(dataset, settings.global_batch, settings.prefetch) as queue,
            explained(_with_step(journal, settings, explain_memory)),
        ):
            _train(executor, queue, settings, journal, interrupt, checkpoints)
            checkpoints.finish()
            at_end(journal.num_steps, interrupt.requested)
    except BaseException as error:
        checkpoints.close()
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        journal.finish_despite(error, status)
        raise
    summary = journal.finish("interrupted" if interrupt.requested else "done")
    if interrupt.requested:
        raise KeyboardInterrupt
    return summary


def _train(
    executor: "Executor",
    queue: BatchQueue,
    settings: TrainSettings,
    journal: Journal,
    interrupt: Interrupt,
    checkpoints: Checkpoints,
) -> None:
    steps = range(settings.first_step, settings.steps)
    unread = None
    inputs = queue.placed(steps, "train", executor.place)
    for step, placed in zip(steps, inputs, strict=True):
        dispatched = journal.dispatched(step, executor.step(placed))
        if unread is not None:
            journal.record(unread, executor.peak_bytes_per_stage())
        unread = dispatched
        stops = interrupt.requested
        evaluates = not stops and _evaluates_after(step + 1, settings)
        ends = stops or step + 1 == settings.steps
        saves = checkpoints.is_due(step + 1, ends=ends)
        if ends or evaluates or saves:
            journal.record(unread, executor.peak_bytes_per_stage())
            unread = None
        eval_loss = None
        if evaluates:
            eval_loss = evaluation_loss(executor, queue, settings, interrupt)
            journal.record_evaluation(step, eval_loss)
            # One that Ctrl-C cut short ends the run.
            saves = saves or checkpoints.is_due(step + 1, ends=interrupt.requested)
        taken_s = checkpoints.after_step(step + 1, journal.progress, eval_loss, is_due=saves)
        if taken_s is not None:
            journal.record_checkpoint(taken_s)
        if stops or (evaluates and interrupt.requested):
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
    executor: Evaluates, queue: BatchQueue, settings: TrainSettings, interrupt: Interrupt
) -> float | None:
    """Give the mean loss of the held-out batches, or None if Ctrl-C cut it short."""
    losses = []
    unread = None
    for batch in queue.batches(range(settings.eval_batches), "valid"):
        if interrupt.requested:
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
