"""Being asked to stop: by Ctrl-C, or by the signals with which a scheduler takes a machine back.

Slurm and Kubernetes send SIGTERM, and SIGUSR1 or SIGUSR2 where a job asks for a warning ahead of its time
limit. While a run gets ready there is nothing to lose, and these end it at once (`stop_at_once`). Inside the
training loop they, and the first Ctrl-C, only leave a note: the loop stops between two steps (`Interrupt`).

Signals reach only the main thread, and one that a process was started to ignore (nohup) stays ignored.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Protocol

from launcher.errors import StoppedBySignal
from launcher.runtime.records.metrics import Status

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_SEND_AGAIN_S = 0.5

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Within the context, a scheduler's signal raises StoppedBySignal wherever the run is.

    Where that is a callback of the garbage collector, Python drops the exception: the signal is sent
    once more, until the context is left.
    """
    left = threading.Event()

    def send_again(number: int) -> None:
        if not left.wait(_SEND_AGAIN_S):
            signal.pthread_kill(threading.main_thread().ident, number)

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        threading.Thread(target=send_again, args=(number,), daemon=True).start()
        raise StoppedBySignal(signal.Signals(number).name)

    with _handled_by(stop, STOP_SIGNALS):
        try:
            yield
        finally:
            left.set()


class Stop(Protocol):
    """What a training loop asks: whether to stop, and how.

    Attributes:
        requested: whether the run ends before its time.
        cuts_short: whether an evaluation is to end too, or not to begin.
    """

    @property
    def requested(self) -> bool: ...

    @property
    def cuts_short(self) -> bool: ...

    @property
    def status(self) -> Status: ...

    def stops_after(self, num_steps: int) -> bool:
        """Whether no step follows; asked once when the last of so many has been dispatched."""

    def raise_if_requested(self, done: str) -> None:
        """End the run as the request asks; `done` says how far it came."""

    def __enter__(self) -> "Stop": ...

    def __exit__(self, *exc_info: object) -> None: ...


class Interrupt(Stop):
    """Within the context, the first request to stop sets `requested`, and raises nothing.

    After it Ctrl-C stops at once; another signal of a scheduler, which may repeat itself, changes nothing.
    """

    def __init__(self) -> None:
        self._number: int | None = None  # of the first signal
        self._handled = contextlib.ExitStack()
        # The handler may run in the midst of a write to the log, so it only wakes this thread.
        self._woken = threading.Event()
        self._announcer = threading.Thread(target=self._announce, name="interrupt", daemon=True)

    @property
    def requested(self) -> bool:
        """Whether anybody has asked to stop."""
        return self._number is not None

    @property
    def cuts_short(self) -> bool:
        return self.requested

    def stops_after(self, num_steps: int) -> bool:
        del num_steps
        return self.requested

    @property
    def is_by_scheduler(self) -> bool:
        """Whether it was a signal that asks for a checkpoint, and to be run again."""
        return self._number in STOP_SIGNALS

    @property
    def status(self) -> Status:
        """How a run ends that has nothing else to say."""
        if not self.requested:
            return "done"
        return "stopped" if self.is_by_scheduler else "interrupted"

    def raise_if_requested(self, done: str) -> None:
        """End the run as the first request asks: in KeyboardInterrupt, or in StoppedBySignal.

        `done` says how far it came.
        """
        if self.is_by_scheduler:
            raise StoppedBySignal(f"{signal.Signals(self._number).name} {done}")
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interrupt":
        self._announcer.start()
        self._handled.enter_context(_handled_by(self._note, (signal.SIGINT, *STOP_SIGNALS)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handled.close()
        self._woken.set()
        self._announcer.join()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._number is None:
            self._number = number
            self._woken.set()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _announce(self) -> None:
        self._woken.wait()
        if self.is_by_scheduler:
            log.warning(
                "%s: this step is finished, and a checkpoint written where they are asked for",
                signal.Signals(self._number).name,
            )
        elif self.requested:
            log.warning(
                "Ctrl-C: this step is finished and the summary written; Ctrl-C again stops at once"
            )


@contextlib.contextmanager
def _handled_by(handler: Handler, numbers: Iterable[int]) -> Iterator[None]:
    """Handle those of the signals that are not ignored, and put back what handled them before."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        heard = (number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)
        previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
