"""The record of a run: fetches each step's numbers, times it, tells the sinks, and sums up."""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from launcher.errors import TrainingError
from launcher.runtime.metrics import Meter, Row, Status, StepTimer, TrainSummary, eval_row
from launcher.runtime.sinks import Sink

if TYPE_CHECKING:
    from launcher.runtime.executor import StepResult

log = logging.getLogger(__name__)


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
    ) -> None:
        # Optimizer steps that are done.
        self.num_steps = first_step
        self._planned_steps = planned_steps
        self._meter = meter
        self._sinks = tuple(sinks)
        self._learning_rate = learning_rate
        self._clock = clock
        self._timer = StepTimer(clock)
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="completions")
        self._loss: float | None = None
        self._best_loss: float | None = None
        self._eval_loss: float | None = None
        self._peak_bytes: int | None = None

    def dispatched(self, step: int, result: "StepResult") -> Dispatched:
        """Note that a step is on its way, and begin to watch for its completion."""
        completed_s = self._watcher.submit(
            _completion, (result.loss, result.grad_norm), self._clock
        )
        return Dispatched(step=step, result=result, completed_s=completed_s)

    def record(self, dispatched: Dispatched, peak_bytes_per_device: int | None) -> None:
        """Wait for a step's numbers and pass them on; raise TrainingError for a loss or a
        gradient norm that is not finite."""
        step, result = dispatched.step, dispatched.result
        step_s = self._timer.lap(dispatched.completed_s.result())
        loss, grad_norm, model_metrics = jax.device_get(
            (result.loss, result.grad_norm, result.metrics)
        )
        self.num_steps = step + 1
        row = self._meter.train_row(
            step=self.num_steps,
            loss=float(loss),
            learning_rate=_on_host(self._learning_rate, step),
            grad_norm=float(grad_norm),
            step_s=step_s,
            peak_bytes_per_device=peak_bytes_per_device,
            model_metrics=model_metrics,
        )
        if peak_bytes_per_device is not None:
            self._peak_bytes = max(peak_bytes_per_device, self._peak_bytes or 0)
        self._write(row)
        self._check(float(loss), float(grad_norm), row["learning_rate"])
        self._loss = float(loss)
        self._best_loss = min(self._loss, math.inf if self._best_loss is None else self._best_loss)

    def record_evaluation(self, step: int, eval_loss: float | None) -> None:
        """Pass on an evaluation after a step (None: it was cut short), and leave out its time."""
        if eval_loss is not None:
            if not math.isfinite(eval_loss):
                log.warning(
                    "eval_loss is %s after step %d, though the training loss is finite: it is null in "
                    "metrics.jsonl, and training goes on; look for what overflows in the held-out "
                    "batches, or compute in model.dtype=fp32",
                    eval_loss,
                    step + 1,
                )
            self._eval_loss = eval_loss
            self._write(eval_row(step + 1, eval_loss))
        self._timer.restart()

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
            measured={**speed, "peak_bytes_per_device": self._peak_bytes},
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
            f"lower optimizer.learning_rate, clip with optimizer.clip_norm=1.0, "
            f"or compute in model.dtype=fp32"
        )


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
