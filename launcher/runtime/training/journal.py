"""The record of a run: fetches each step's numbers, times it, tells the sinks, and sums up."""

import logging
import math
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from launcher.errors import TrainingError
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.loss_watch import LossWatch
from launcher.runtime.records.metrics import (
    Meter,
    Row,
    Status,
    StepTimer,
    TrainSummary,
    eval_row,
    finite,
)
from launcher.runtime.records.number_watch import Numbers, NumberWatch
from launcher.runtime.records.sinks import Sink, finish_all

if TYPE_CHECKING:
    from launcher.runtime.steps.executor import StepResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """A step that is on its way, with the time at which it will have been complete."""

    step: int
    result: "StepResult"
    completed_s: Future[float]
    data_s: float  # for which the devices had waited for its batch


class Journal:
    """Keeps what a summary needs; steps are told in their order, counted from 0."""

    def __init__(
        self,
        planned_steps: int,
        first_step: int,
        meter: Meter,
        sinks: Sequence[Sink],
        learning_rate: Callable[[int], float],
        clock: Callable[[], float],
        *,
        untypical_steps: Set[int] = frozenset(),
        progress: Progress | None = None,
        nonfinite_steps: int = 0,
        goodput: Goodput | None = None,
    ) -> None:
        """`untypical_steps` are left out of the median step time; like rows, they count from 1.

        `progress` is that of the checkpoint with which a resumed run begins, `nonfinite_steps` how many
        in a row are forgiven, `goodput` the account of what the time goes into.
        """
        progress = progress or Progress()
        self._goodput = goodput or Goodput()
        self._spikes = LossWatch()
        self._forgiven = nonfinite_steps
        # Optimizer steps that are done.
        self.num_steps = first_step
        self._planned_steps = planned_steps
        self._meter = meter
        self._sinks = tuple(sinks)
        self._learning_rate = learning_rate
        self.clock = clock
        self._untypical_steps = untypical_steps
        # A schedule compiles when it is first asked; the first row would hold up the third step.
        _on_host(learning_rate, first_step)
        self._timer = StepTimer(clock)
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="completions")
        self._loss = progress.loss
        self._best_loss = progress.best_loss
        self._eval_loss = progress.eval_loss
        self._peak_bytes_per_stage: tuple[int, ...] | None = None
        self._skipped_steps, self._is_scaled = progress.skipped_steps, False
        self._watch_numbers(progress.skipped_in_a_row)
        self.left_out = progress.left_out
        self._in_flight: Dispatched | None = None
        self._num_checkpoints, self._checkpoint_s = 0, 0.0
        # Taken since the last row, for the next one.
        self._untold_checkpoint_s: float | None = None

    def _watch_numbers(self, in_a_row: int) -> None:
        self._numbers = NumberWatch(self._planned_steps, forgiven=self._forgiven, in_a_row=in_a_row)

    def waited_s(self, since_s: float) -> float:
        """For how long of the time since then, for a batch, the devices had nothing to do."""
        now_s, ahead = self.clock(), self._in_flight
        if ahead is None:
            return now_s - since_s
        if not ahead.completed_s.done() or ahead.completed_s.exception() is not None:
            return 0.0
        return max(now_s - max(since_s, ahead.completed_s.result()), 0.0)

    def dispatched(self, step: int, result: "StepResult", data_s: float = 0.0) -> Dispatched:
        """Note that a step is on its way, and begin to watch for its completion."""
        completed_s = self._watcher.submit(_completion, (result.loss, result.grad_norm), self.clock)
        self._in_flight = Dispatched(
            step=step, result=result, completed_s=completed_s, data_s=data_s
        )
        return self._in_flight

    def record(self, dispatched: Dispatched, peak_bytes_per_stage: tuple[int, ...] | None) -> None:
        """Wait for a step's numbers and pass them on; raise TrainingError where too many in a row are
        not finite (`number_watch`)."""
        step, result = dispatched.step, dispatched.result
        step_s = self._timer.lap(
            dispatched.completed_s.result(), is_typical=step + 1 not in self._untypical_steps
        )
        loss, grad_norm, model_metrics, loss_scale = jax.device_get(
            (result.loss, result.grad_norm, result.metrics, result.loss_scale)
        )
        self.num_steps = step + 1
        # A skipped step is no update, and the schedule counts updates.
        rate = _on_host(self._learning_rate, step - self._skipped_steps)
        numbers = Numbers(
            num_steps=self.num_steps,
            loss=float(loss),
            grad_norm=float(grad_norm),
            learning_rate=finite(rate),
            loss_scale=None if loss_scale is None else float(loss_scale),
        )
        self._skipped_steps += numbers.is_skipped
        self._is_scaled = numbers.loss_scale is not None
        row = self._meter.train_row(
            step=self.num_steps,
            loss=numbers.loss,
            learning_rate=rate,
            grad_norm=numbers.grad_norm,
            step_s=step_s,
            peak_bytes_per_device=_largest(peak_bytes_per_stage),
            scaling=None if loss_scale is None else (numbers.loss_scale, self._skipped_steps),
            model_metrics=model_metrics,
            checkpoint_s=self._untold_checkpoint_s,
        )
        self._untold_checkpoint_s = None
        self._peak_bytes_per_stage = peak_bytes_per_stage
        self._write(row)
        self._goodput.add("data_s", dispatched.data_s)
        self._goodput.add("step_s", step_s - dispatched.data_s)
        self._numbers.check(numbers, self._loss)
        if numbers.are_finite:
            self._take(numbers.loss)

    def _take(self, loss: float) -> None:
        """A loss to be reported, and perhaps one to be warned of."""
        spike = self._spikes.spike(loss)
        if spike is not None:
            log.warning(
                "the loss jumps to %.6g at step %d, and was around %.6g in the %d steps before: if it does "
                "not come down, lower optimizer.learning_rate or optimizer.clip_norm, or look at that batch",
                loss, self.num_steps, spike.median, spike.window,
            )  # fmt: skip
        self._loss = loss
        self._best_loss = min(loss, math.inf if self._best_loss is None else self._best_loss)

    def go_back(self, step: int, progress: Progress, left_out: tuple[int, ...]) -> None:
        """Know that the run goes on from a checkpoint, without some batches, and forgets the rest."""
        self.num_steps, self.left_out = step, left_out
        self._loss, self._best_loss = progress.loss, progress.best_loss
        self._eval_loss, self._skipped_steps = progress.eval_loss, progress.skipped_steps
        self._watch_numbers(0)
        self._in_flight = None
        self._goodput.went_back(progress.step_s)
        self._goodput.add("restart_s", self._timer.restart())
        for sink in self._sinks:
            sink.rewind(step)

    def record_evaluation(self, step: int, eval_loss: float | None) -> None:
        """Pass on an evaluation after a step (None: it was cut short), and leave out its time."""
        if eval_loss is not None:
            if not math.isfinite(eval_loss):
                beside = "" if self._loss is None else ", though the training loss is finite"
                log.warning(
                    "eval_loss is %s after step %d%s: it is null in metrics.jsonl, and the run goes on; "
                    "look for what overflows in the held-out batches, or compute in model.dtype=fp32",
                    eval_loss,
                    step + 1,
                    beside,
                )
            self._eval_loss = eval_loss
            self._write(eval_row(step + 1, eval_loss))
        self._goodput.add("evaluation_s", self._timer.restart())

    def record_checkpoint(self, taken_s: float) -> None:
        """Note what a checkpoint took from the steps, and leave it out of the next one's time."""
        self._num_checkpoints += 1
        self._checkpoint_s += taken_s
        self._untold_checkpoint_s = taken_s
        self._goodput.add("checkpoint_s", self._timer.restart())

    @property
    def is_sound(self) -> bool:
        """Whether the last step had finite numbers: what a run may go back to."""
        return not self._numbers.in_a_row

    @property
    def progress(self) -> Progress:
        """What a checkpoint keeps of this record."""
        return Progress(
            loss=finite(self._loss),
            best_loss=finite(self._best_loss),
            eval_loss=finite(self._eval_loss),
            skipped_steps=self._skipped_steps,
            skipped_in_a_row=self._numbers.in_a_row,
            step_s=self._goodput.step_s,
            left_out=self.left_out,
        )

    def check_updates(self) -> None:
        """Raise TrainingError where no step was an update, though each was forgiven; a dynamic loss
        scale that is still being fitted is none."""
        if self._is_scaled or not self.num_steps or self._skipped_steps < self.num_steps:
            return
        raise TrainingError(
            f"none of the {self.num_steps} steps was an update, since no gradients were finite "
            f"(train.nonfinite_steps={self._forgiven} forgives that): lower optimizer.learning_rate, or "
            f"compute in model.dtype=fp32"
        )

    def finish(self, status: Status) -> TrainSummary:
        """Give every sink the summary; what one of them raises comes after all have had it."""
        summary = self._summary(status)
        errors = self._tell(summary)
        if errors:
            raise errors[0]
        return summary

    def finish_despite(self, error: BaseException) -> None:
        """Give every sink the summary of a run that ends with an error; log what they raise."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        for other in self._tell(self._summary(status)):
            log.error("%s (while ending after: %s)", other, error)

    def _summary(self, status: Status) -> TrainSummary:
        speed = self._meter.speed(self._timer.median_s)
        return TrainSummary(
            status=status,
            steps=self.num_steps,
            planned_steps=self._planned_steps,
            loss=self._loss,
            best_loss=self._best_loss,
            eval_loss=self._eval_loss,
            wall_s=self._timer.wall_s,
            skipped_steps=self._skipped_steps,
            checkpoints=self._num_checkpoints,
            checkpoint_s=self._checkpoint_s,
            measured={
                **speed,
                "peak_bytes_per_device": _largest(self._peak_bytes_per_stage),
                "peak_bytes_per_stage": self._peak_bytes_per_stage,
            },
            timed_steps=self._timer.timed_steps,
            predicted_step_s=self._meter.predicted_step_s,
            comparable=self._meter.incomparable is None,
            goodput=self._goodput.report(),
        )

    def _tell(self, summary: TrainSummary) -> list[Exception]:
        self._goodput.write()
        # Not waited for: after an error a step may never complete.
        self._watcher.shutdown(wait=False, cancel_futures=True)
        return finish_all(self._sinks, summary)

    def _write(self, row: Row) -> None:
        for sink in self._sinks:
            sink.write(row)


def _largest(peaks_bytes: tuple[int, ...] | None) -> int | None:
    return None if peaks_bytes is None else max(peaks_bytes)


def _completion(arrays: object, clock: Callable[[], float]) -> float:
    # In a thread of its own, for the loop looks at a step only after it has dispatched the next:
    # where a dispatch takes as long as the computation, that is a whole step too late.
    jax.block_until_ready(arrays)
    return clock()


def _on_host(schedule: Callable[[int], float], step: int) -> float:
    # A schedule computes with jax, and on an accelerator its scalars would queue behind the step
    # that has just been dispatched.
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        return float(schedule(step))
    with jax.default_device(host):
        return float(schedule(step))
