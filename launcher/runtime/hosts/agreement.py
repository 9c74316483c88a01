"""How all hosts come to stop after the same step.

Whoever asks holds all hosts first: none begins another step. The largest number of steps that any has begun
is the first after which all can stop; it is told to all, and they go on until there.
"""

import threading

from launcher.runtime.records.metrics import Status
from launcher.runtime.training.interrupt import Stop


class Agreement(Stop):
    """One host's side: the training loop asks it, other threads tell it."""

    def __init__(self, first_step: int, steps: int):
        self._steps = steps
        # Those that are dispatched, or will be, whatever is said.
        self._begun = min(first_step + 1, steps)
        self._last: int | None = None
        self._is_held = False
        self._has_stopped = False
        self._changed = threading.Condition()

    def hold(self) -> int:
        """Let no further step begin; gives how many are begun."""
        with self._changed:
            self._is_held = self._last is None
            return self._begun

    def stop_after(self, step: int) -> None:
        """Go on, and stop after that step."""
        with self._changed:
            self._last, self._is_held = step, False
            self._changed.notify_all()

    def stops_after(self, num_steps: int) -> bool:
        with self._changed:
            if num_steps < self._steps:
                self._changed.wait_for(lambda: not self._is_held)
            self._has_stopped = self._last is not None and self._last <= num_steps < self._steps
            if not self._has_stopped:
                self._begun = min(num_steps + 1, self._steps)
            return self._has_stopped

    @property
    def requested(self) -> bool:
        return self._has_stopped

    @property
    def cuts_short(self) -> bool:
        """An evaluation belongs to the steps: some hosts may have begun it."""
        return False

    @property
    def status(self) -> Status:
        return "stopped" if self._has_stopped else "done"

    def raise_if_requested(self, done: str) -> None:
        """Whoever asked is told by how training ends."""

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass
