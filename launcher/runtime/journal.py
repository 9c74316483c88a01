"""The record of a run: fetches each step's numbers, times it, tells the sinks, and sums up."""

import logging
import math
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from launcher.errors import TrainingError
from launcher.runtime.checkpoint_manifest import Progress
from launcher.runtime.metrics import (
    Meter,
    Row,
    Status,
    StepTimer,
    TrainSummary,
    eval_row,
    finite,
)
from launcher.runtime.sinks import Sink

if TYPE_CHECKING:
    from launcher.runtime.executor import StepResult

log = logging.getLogger(__name__)

# Halvings in a row that no scale of an overflow now and then needs: what overflows is the model itself.
MAX_SKIPPED_IN_A_ROW = 20
# Below 1 the loss is scaled down: not the gradients' smallness is the trouble then.
SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """A step that is on its way, with the time at which it will have been complete."""

    step: int
    result: "StepResult"
    completed_s: Future[float]


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
    ) -> None:
        """`untypical_steps` are left out of the median step time; like rows, they count from 1.

        `progress` is that of the checkpoint with which a resumed run begins.
        """
        progress = progress or Progress()
        # Optimizer steps that are done.
        self.num_steps = first_step
        self._planned_steps = planned_steps
        self._meter = meter
        self._sinks = tuple(sinks)
        self._learning_rate = learning_rate
        self._clock = clock
        self._untypical_steps = untypical_steps
        # A schedule compiles when it is first asked; the first row would hold up the third step.
        _on_host(learning_rate, first_step)
        self._timer = StepTimer(clock)
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="completions")
        self._loss = progress.loss
        self._best_loss = progress.best_loss
        self._eval_loss = progress.eval_loss
        self._peak_bytes_per_stage: tuple[int, ...] | None = None
        self._skipped_steps = progress.skipped_steps
        self._skipped_in_a_row = progress.skipped_in_a_row
        self._num_checkpoints, self._checkpoint_s = 0, 0.0
        # Taken since the last row, for the next one.
        self._untold_checkpoint_s: float | None = None

    def dispatched(self, step: int, result: "StepResult") -> Dispatched:
        """Note that a step is on its way, and begin to watch for its completion."""
        completed_s = self._watcher.submit(
            _completion, (result.loss, result.grad_norm), self._clock
        )
        return Dispatched(step=step, result=result, completed_s=completed_s)

    def record(self, dispatched: Dispatched, peak_bytes_per_stage: tuple[int, ...] | None) -> None:
        """Wait for a step's numbers and pass them on; raise TrainingError for a loss or a
        gradient norm that is not finite, unless that is what the loss scale is being fitted to."""
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
        is_skipped = loss_scale is not None and not math.isfinite(grad_norm)
        self._skipped_steps += is_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        row = self._meter.train_row(
            step=self.num_steps,
            loss=float(loss),
            learning_rate=rate,
            grad_norm=float(grad_norm),
            step_s=step_s,
            peak_bytes_per_device=_largest(peak_bytes_per_stage),
            scaling=None if loss_scale is None else (float(loss_scale), self._skipped_steps),
            model_metrics=model_metrics,
            checkpoint_s=self._untold_checkpoint_s,
        )
        self._untold_checkpoint_s = None
        self._peak_bytes_per_stage = peak_bytes_per_stage
        self._write(row)
        if is_skipped:
            self._check_scale(float(loss_scale))
            return
        self._check(float(loss), float(grad_norm), row["learning_rate"])
        self._loss = float(loss)
        self._best_loss = min(self._loss, math.inf if self._best_loss is None else self._best_loss)

    def record_evaluation(self, step: int, eval_loss: float | None) -> None:
        """Pass on an evaluation after a step (None: it was cut short), and leave out its time."""
        if eval_loss is not None:
            if not math.isfinite(eval_loss):
                finite = "" if self._loss is None else ", though the training loss is finite"
                log.warning(
                    "eval_loss is %s after step %d%s: it is null in metrics.jsonl, and the run goes on; "
                    "look for what overflows in the held-out batches, or compute in model.dtype=fp32",
                    eval_loss,
                    step + 1,
                    finite,
                )
            self._eval_loss = eval_loss
            self._write(eval_row(step + 1, eval_loss))
        self._timer.restart()

    def record_checkpoint(self, taken_s: float) -> None:
        """Note what a checkpoint took from the steps, and leave it out of the next one's time."""
        self._num_checkpoints += 1
        self._checkpoint_s += taken_s
        self._untold_checkpoint_s = taken_s
        self._timer.restart()

    @property
    def progress(self) -> Progress:
        """What a checkpoint keeps of this record."""
        return Progress(
            loss=finite(self._loss),
            best_loss=finite(self._best_loss),
            eval_loss=finite(self._eval_loss),
            skipped_steps=self._skipped_steps,
            skipped_in_a_row=self._skipped_in_a_row,
        )

    def finish(self, status: Status) -> TrainSummary:
        """Give every sink the summary; what one of them raises comes after all have had it."""
        summary = self._summary(status)
        errors = self._tell(summary)
        if errors:
            raise errors[0]
        return summary

    def finish_despite(self, error: BaseException, status: Status) -> None:
        """Give every sink the summary of a run that ends with an error; log what they raise."""
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
        )

    def _tell(self, summary: TrainSummary) -> list[Exception]:
        # Not waited for: after an error a step may never complete.
        self._watcher.shutdown(wait=False, cancel_futures=True)
        errors = []
        for sink in self._sinks:
            try:
                sink.finish(summary)
            except Exception as error:
                errors.append(error)
        return errors

    def _write(self, row: Row) -> None:
        for sink in self._sinks:
            sink.write(row)

    def _check(self, loss: float, grad_norm: float, learning_rate: float | None) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        what, other = f"loss is {loss}", f"gradient norm {grad_norm:.6g}"
        if math.isfinite(loss):
            what, other = f"gradient norm is {grad_norm}", f"loss {loss:.6g}"
        before = "" if self._loss is None else f"loss {self._loss:.6g} one step before, "
        raise TrainingError(
            f"the {what} at step {self.num_steps} of {self._planned_steps} ({before}"
            f"{other}, learning rate {_text(learning_rate)}): "
            f"lower optimizer.learning_rate, clip harder with optimizer.clip_norm, "
            f"or compute in model.dtype=fp32"
        )

    def _check_scale(self, loss_scale: float) -> None:
        too_many = self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
        if not too_many and loss_scale >= SMALLEST_LOSS_SCALE:
            return
        raise TrainingError(
            f"the gradients overflow at every loss scale: step {self.num_steps} of "
            f"{self._planned_steps} is the last of {self._skipped_in_a_row} in a row that were "
            f"skipped, and the scale is down to {loss_scale:.6g} (optimizer.loss_scale): "
            f"lower optimizer.learning_rate, or compute in model.dtype=bf16 or fp32"
        )


def _largest(peaks_bytes: tuple[int, ...] | None) -> int | None:
    return None if peaks_bytes is None else max(peaks_bytes)


def _text(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.6g}"


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
