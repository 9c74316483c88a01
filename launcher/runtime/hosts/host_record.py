"""The record of a run over several hosts: rows to the sinks as they come to count, and a summary at the end.

The summary of a run that ends well is that of the host which made the rows. One that loses a host, or is
stopped while it gets ready again, has nobody left to sum it up, and this record does it from the rows.
"""

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.errors import StoppedBySignal
from launcher.runtime.checkpoints.checkpoint_manifest import Progress
from launcher.runtime.hosts.host_contract import HostEvent
from launcher.runtime.records.goodput import Goodput
from launcher.runtime.records.metrics import (
    CHECKPOINT_S,
    EVAL_LOSS,
    SKIPPED_STEPS,
    WARM_UP_STEPS,
    Meter,
    Row,
    Status,
    TrainSummary,
    is_evaluation,
)
from launcher.runtime.records.sinks import Sink, finish_all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a run had when it began.

    Attributes:
        progress: of the checkpoint that it goes on from, if there is one.
    """

    planned_steps: int
    first_step: int
    progress: Progress | None


class HostRecord:
    """Tells the sinks, and keeps what a summary needs."""

    def __init__(
        self, sinks: Sequence[Sink], meter: Meter, begun: Begun, goodput: Callable[[], Goodput],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """`goodput` opens the account that the hosts keep in the run's folder."""
        self._sinks, self._meter, self._begun, self._goodput = tuple(sinks), meter, begun, goodput
        self._clock, self._began_s = clock, clock()
        self.num_steps = begun.first_step
        progress = begun.progress or Progress()
        self._loss, self._best_loss = progress.loss, progress.best_loss
        self._eval_loss, self._skipped_steps = progress.eval_loss, progress.skipped_steps
        self._peak_bytes: int | None = None
        self._num_checkpoints, self._checkpoint_s = 0, 0.0
        self._warm_up, self._newest_s = WARM_UP_STEPS, None
        self._steady_s: list[float] = []

    @property
    def planned_steps(self) -> int:
        """How many steps are asked for."""
        return self._begun.planned_steps

    def take(self, event: HostEvent) -> None:
        """Pass an event on to where it belongs."""
        match event.kind:
            case "row":
                self._write(event.row)
            case "rewind":
                self.rewind(event.step)
            case "log":
                log.log(event.level, "%s", event.text)

    def rewind(self, step: int) -> None:
        """Know that what comes after this step is done again. (Its losses will be the same.)"""
        self.num_steps, self._warm_up = step, WARM_UP_STEPS
        for sink in self._sinks:
            sink.rewind(step)

    def finish(self, summary: TrainSummary, status: Status) -> TrainSummary:
        """Give every sink the summary; what one of them raises comes after all have had it."""
        summary = dataclasses.replace(summary, status=status)
        errors = finish_all(self._sinks, summary)
        if errors:
            raise errors[0]
        return summary

    def finish_despite(self, error: BaseException) -> None:
        """Give every sink the summary of a run that ends with an error; log what they raise."""
        for other in finish_all(self._sinks, self.summary(_status_after(error))):
            log.error("%s (while ending after: %s)", other, error)

    def summary(self, status: Status) -> TrainSummary:
        """Sum up from the rows."""
        median_s = statistics.median(self._steady_s) if self._steady_s else self._newest_s
        return TrainSummary(
            status=status,
            steps=self.num_steps,
            planned_steps=self._begun.planned_steps,
            loss=self._loss,
            best_loss=self._best_loss,
            eval_loss=self._eval_loss,
            wall_s=self._clock() - self._began_s,
            skipped_steps=self._skipped_steps,
            checkpoints=self._num_checkpoints,
            checkpoint_s=self._checkpoint_s,
            measured={
                **self._meter.speed(median_s),
                "peak_bytes_per_device": self._peak_bytes,
                "peak_bytes_per_stage": None,
            },
            timed_steps=len(self._steady_s),
            predicted_step_s=self._meter.predicted_step_s,
            comparable=self._meter.incomparable is None,
            goodput=self._goodput().report(),
        )

    def _write(self, row: Row) -> None:
        if is_evaluation(row):
            self._eval_loss = row[EVAL_LOSS]
        else:
            self._count(row)
        for sink in self._sinks:
            sink.write(row)

    def _count(self, row: Row) -> None:
        self.num_steps, self._newest_s = row["step"], row["step_s"]
        self._skipped_steps = row.get(SKIPPED_STEPS, self._skipped_steps)
        self._peak_bytes = row["peak_bytes_per_device"]
        if row["loss"] is not None:
            self._loss = row["loss"]
            self._best_loss = min(
                self._loss, math.inf if self._best_loss is None else self._best_loss
            )
        if CHECKPOINT_S in row:
            self._num_checkpoints += 1
            self._checkpoint_s += row[CHECKPOINT_S] or 0.0
        self._warm_up -= 1
        if self._warm_up < 0 and self._newest_s is not None:
            self._steady_s.append(self._newest_s)


def _status_after(error: BaseException) -> Status:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "stopped" if isinstance(error, StoppedBySignal) else "failed"
