"""What a run measures: step times, throughput, TFLOP/s per device, MFU, and the rows they stand in.

The names of the keys here are the names in metrics.jsonl, in summary.json and in W&B. In a row
`step` counts the optimizer steps that are done, from 1. The FLOPs of a step are the model's own
(forward and backward, as the caller counts them): work that a plan repeats to save memory does not
count, so that the MFU of two plans can be compared. Nothing here reads or writes a file.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.autopar.plans.budget import Budget

Value = float | int | str | None | Sequence[float | None]
Row = dict[str, Value]
Status = Literal["done", "interrupted", "stopped", "failed"]  # stopped: by a scheduler

# What only the row of an evaluation has.
EVAL_LOSS = "eval_loss"
# What only the rows of a run with a dynamic loss scale have.
LOSS_SCALE, SKIPPED_STEPS = "loss_scale", "skipped_steps"
# What only the row of a step before which a checkpoint was written has.
CHECKPOINT_S = "checkpoint_s"
# The first step fills caches and allocators, the second may still wait for them.
WARM_UP_STEPS = 2


class StepTimer:
    """Measures from the completion of one step to the completion of the next.

    Steps are dispatched ahead of their completion, so a lap is what a step costs in a full pipeline
    of dispatches, not what its own dispatch took.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = self._last_s = clock()
        self._num_laps = 0
        self._newest_s: float | None = None
        self._steady_s: list[float] = []

    def restart(self) -> float:
        """Leave out what has passed since the last lap (an evaluation, a checkpoint); give its seconds."""
        last_s, self._last_s = self._last_s, self._clock()
        return self._last_s - last_s

    def lap(self, completed_s: float, *, is_typical: bool = True) -> float:
        """Note when a step was complete, by the same clock, and give the seconds it took.

        One that is not typical (it was traced) says nothing of how long steps take.
        """
        lap_s, self._last_s = completed_s - self._last_s, completed_s
        self._num_laps += 1
        if is_typical:
            self._newest_s = lap_s
        if is_typical and self._num_laps > WARM_UP_STEPS:
            self._steady_s.append(lap_s)
        return lap_s

    @property
    def wall_s(self) -> float:
        """The seconds since the timer was made, evaluations included."""
        return self._clock() - self._started_s

    @property
    def timed_steps(self) -> int:
        """How many steps the median is of."""
        return len(self._steady_s)

    @property
    def median_s(self) -> float | None:
        """The median step without the warm-up; of a run too short for that, its last typical step."""
        return statistics.median(self._steady_s) if self._steady_s else self._newest_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Turns a step time into throughput, and a step's numbers into a row."""

    model_flops_per_step: float
    num_devices: int
    # Of one device in the dtype computed in; None where it is unknown, and then `mfu` is null.
    peak_flops_per_s: float | None
    global_batch: int
    units_per_sample: int
    # "tokens" or "samples"
    sample_unit: str
    predicted_step_s: float | None
    # Per device, an entry for each stage.
    predicted_peak_bytes_per_stage: tuple[float, ...] = ()
    # Why the devices measured say nothing of those that the prediction is for; None where they do.
    incomparable: str | None = None

    @property
    def throughput_key(self) -> str:
        """`tokens_per_s` or `samples_per_s`."""
        return f"{self.sample_unit}_per_s"

    def speed(self, step_s: float | None) -> Row:
        """Give a step time with the throughput, TFLOP/s per device and MFU that go with it."""
        steps_per_s = 1 / step_s if step_s else math.nan
        flops_per_s = self.model_flops_per_step * steps_per_s / self.num_devices
        peak = self.peak_flops_per_s
        return {
            "step_s": finite(step_s),
            self.throughput_key: finite(self.global_batch * self.units_per_sample * steps_per_s),
            "tflops_per_device": finite(flops_per_s / 1e12),
            "mfu": finite(flops_per_s / peak) if peak else None,
        }

    def train_row(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        step_s: float,
        peak_bytes_per_device: int | None,
        model_metrics: Mapping[str, float],
        scaling: tuple[float, int] | None = None,
        checkpoint_s: float | None = None,
    ) -> Row:
        """Give the row of a step; a model's metric that takes one of our names is renamed.

        `scaling` is the dynamic loss scale after the step, and how many steps it has skipped so far.
        `checkpoint_s` is what a checkpoint before the step took from the steps.
        """
        row: Row = {
            "step": step,
            "loss": finite(loss),
            "learning_rate": finite(learning_rate),
            "grad_norm": finite(grad_norm),
            **self.speed(step_s),
            "predicted_step_s": finite(self.predicted_step_s),
            "peak_bytes_per_device": peak_bytes_per_device,
        }
        if scaling is not None:
            row |= {LOSS_SCALE: finite(scaling[0]), SKIPPED_STEPS: scaling[1]}
        if checkpoint_s is not None:
            row[CHECKPOINT_S] = finite(checkpoint_s)
        for name, value in model_metrics.items():
            is_taken = name in row or name in (EVAL_LOSS, LOSS_SCALE, SKIPPED_STEPS, CHECKPOINT_S)
            row[f"model_{name}" if is_taken else name] = finite(value)
        return row


def eval_row(step: int, eval_loss: float) -> Row:
    """Give the row of an evaluation after `step` steps."""
    return {"step": step, EVAL_LOSS: finite(eval_loss)}


def is_skipped(row: Row) -> bool:
    """Say whether a row is of a step that changed nothing, because its gradients overflowed."""
    return LOSS_SCALE in row and row["grad_norm"] is None


def is_evaluation(row: Row) -> bool:
    """Say whether a row is of an evaluation, not of a training step."""
    return EVAL_LOSS in row


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMetrics:
    """What the plan promised; it stands in W&B and in summary.json beside what was measured."""

    step_s: float | None
    bubble_fraction: float | None
    # One entry per stage.
    peak_bytes_per_device: tuple[float, ...]
    communicated_bytes: float | None
    tflops_per_device: float | None
    # What the search took, all of it; 0 for a plan that was read from a file.
    solver_s: float | None
    # What had to be compiled before the first step, and how long that took.
    num_programs: int | None = None
    compile_s: float | None = None
    # What `train.tokens` would take; None if they are not asked for.
    budget: Budget | None = None

    def as_row(self) -> Row:
        """Give the predictions by the names they are logged under."""
        peaks = self.peak_bytes_per_device
        return {
            "predicted_step_s": finite(self.step_s),
            "predicted_bubble_fraction": finite(self.bubble_fraction),
            "predicted_peak_bytes_per_device": finite(max(peaks, default=None)),
            "predicted_peak_bytes_per_stage": peaks,
            "predicted_communicated_bytes": finite(self.communicated_bytes),
            "predicted_tflops_per_device": finite(self.tflops_per_device),
            "solver_s": finite(self.solver_s),
            "num_programs": self.num_programs,
            "compile_s": finite(self.compile_s),
            **(self.budget.as_row() if self.budget else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """How a run ended: its last and best numbers, and its median speed."""

    status: Status
    # Done, and asked for.
    steps: int
    planned_steps: int
    loss: float | None
    best_loss: float | None
    # Of the last evaluation; None where there was none.
    eval_loss: float | None
    wall_s: float
    # Of the steps done, those without an update, since their gradients were not finite.
    skipped_steps: int = 0
    # How many were written, and the seconds for which steps had to wait, all together.
    checkpoints: int = 0
    checkpoint_s: float = 0.0
    # As Meter.speed gives it for the median step, and peak_bytes_per_device and _per_stage: what
    # the devices have used at most, None where they do not count it.
    measured: Row
    # How many steps the median is of; 0 where all were warm-up, and it is the last step.
    timed_steps: int
    predicted_step_s: float | None
    # Whether what was measured and what was predicted are of the same devices.
    comparable: bool = True
    # What the time went into, over all starts of the run (`goodput`).
    goodput: Mapping[str, float] = field(default_factory=dict)
    # Of a run over several hosts: what went between them (`host_session`).
    between_hosts: Mapping[str, float] = field(default_factory=dict)

    @property
    def measured_over_predicted(self) -> float | None:
        """The measured step time over the predicted: above 1 the run is slower than promised."""
        measured_s, predicted_s = self.measured["step_s"], self.predicted_step_s
        is_known = self.comparable and measured_s and predicted_s
        return measured_s / predicted_s if is_known else None

    def as_row(self) -> Row:
        """Give the summary by the names it is logged under."""
        return {
            "status": self.status,
            "steps": self.steps,
            "planned_steps": self.planned_steps,
            "loss": finite(self.loss),
            "best_loss": finite(self.best_loss),
            "eval_loss": finite(self.eval_loss),
            "wall_s": finite(self.wall_s),
            "skipped_steps": self.skipped_steps,
            "checkpoints": self.checkpoints,
            "checkpoint_s": finite(self.checkpoint_s),
            **{f"measured_{name}": value for name, value in self.measured.items()},
            "timed_steps": self.timed_steps,
            "predicted_step_s": finite(self.predicted_step_s),
            "measured_over_predicted_step_s": finite(self.measured_over_predicted),
            **{name: finite(value) for name, value in self.goodput.items()},
            **{name: finite(value) for name, value in self.between_hosts.items()},
        }


def finite(value: float | None) -> float | int | None:
    """Give a number as JSON can hold it: None for NaN and infinities."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def to_json(row: Row, indent: int | None = None) -> str:
    """Write a row as strict JSON."""
    return json.dumps(row, allow_nan=False, indent=indent)
