"""What the process of a host can say of itself at any time: how far it is, and what happened.

The training loop and the executor tell it, from their threads; `beat` collects it for the supervisor, and
waits for nobody.
"""

import logging
import threading
import time

import jax

from launcher.autopar.programs.launches import Launch
from launcher.runtime.checkpoints.checkpointer import Onlooker
from launcher.runtime.hosts.arrivals import Arrivals
from launcher.runtime.hosts.host_contract import HostEvent
from launcher.runtime.records.metrics import Row, TrainSummary
from launcher.runtime.records.sinks import Sink
from launcher.runtime.steps.launch_watch import LaunchWatch

_TOLD_LIMIT_S, _LOOK_EVERY_S = 30.0, 0.01


class HostProgress(LaunchWatch, Onlooker):
    """Filled by several threads; each field is written by one of them."""

    def __init__(self, arrivals: Arrivals):
        self._arrivals = arrivals
        self.phase, self.text = "opened", ""
        self.stage: int | None = None
        self.doing = ""
        self.steps_begun = self.steps_done = 0
        self._events: list[HostEvent] = []
        self._lock = threading.Lock()

    # Of the executor

    def begins(self, launch: Launch) -> None:
        self.stage, self.doing = launch.first.stage, str(launch)

    def launched(self, launch: Launch, results: object) -> None:
        if launch.first.is_compute:
            leaves = [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)]
            if leaves:
                # The others may be large, and would be kept until they have been looked at.
                smallest = min(leaves, key=lambda leaf: leaf.nbytes)
                self._arrivals.computed(launch.submesh, str(launch), smallest)

    def stepped(self, step: int, norm: jax.Array) -> None:
        """A step has been dispatched that is one program."""
        self.stage, self.doing = 0, f"step {step}"
        self._arrivals.computed(0, self.doing, norm)

    # Of the training loop

    def happened(self, event: HostEvent) -> None:
        """Something for the supervisor."""
        with self._lock:
            self._events.append(event)

    def take_events(self) -> tuple[HostEvent, ...]:
        """All that has happened since they were last taken."""
        with self._lock:
            taken, self._events = self._events, []
        return tuple(taken)

    # Of the checkpoints

    def saves(self) -> None:
        self.doing = "saving"

    def writes(self, num_steps: int) -> None:
        """Wait for a beat to take the rows of these steps: a run that goes on after them makes none again.

        Where nobody asks any more, the checkpoint is worth more than the rows.
        """
        until_s = time.monotonic() + _TOLD_LIMIT_S
        while time.monotonic() < until_s and self._has_rows(num_steps):
            time.sleep(_LOOK_EVERY_S)

    def _has_rows(self, num_steps: int) -> bool:
        with self._lock:
            return any(event.kind == "row" and event.step <= num_steps for event in self._events)


class EventSink(Sink):
    """Makes events of the run's rows, on the host that speaks for all."""

    __slots__ = ("_progress", "_speaks")

    def __init__(self, progress: HostProgress, *, speaks: bool) -> None:
        self._progress, self._speaks = progress, speaks

    def write(self, row: Row) -> None:
        """Hand on a row."""
        if self._speaks:
            self._progress.happened(HostEvent(kind="row", step=row["step"], row=row))

    def rewind(self, step: int) -> None:
        """Count again from the step; what comes after it is made again."""
        self._progress.steps_done = self._progress.steps_begun = step
        if self._speaks:
            self._progress.happened(HostEvent(kind="rewind", step=step))

    def finish(self, summary: TrainSummary) -> None:
        """Pass by: the summary is how training ends."""
        del summary


class EventLog(logging.Handler):
    """Makes events of what the launcher logs on this host."""

    def __init__(self, progress: HostProgress, level: int) -> None:
        super().__init__(level)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on a line."""
        self._progress.happened(
            HostEvent(
                kind="log", step=self._progress.steps_done, text=record.getMessage(),
                level=record.levelno,
            )
        )  # fmt: skip
