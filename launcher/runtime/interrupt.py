"""Ctrl-C during training: the first lets the loop finish its step, the second stops at once."""

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)


class Interrupt:
    """Within the context, the first SIGINT sets `requested` instead of raising KeyboardInterrupt.

    Signals reach only the main thread, and a process that was started to ignore them (nohup) goes
    on ignoring them: in both cases nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = None
        # The handler may run in the midst of a write to the log, so it only wakes this thread.
        self._woken = threading.Event()
        self._announcer = threading.Thread(target=self._announce, name="interrupt", daemon=True)

    def __enter__(self) -> "Interrupt":
        self._announcer.start()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        self._woken.set()
        self._announcer.join()

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._woken.set()

    def _announce(self) -> None:
        self._woken.wait()
        if self.requested:
            log.warning(
                "Ctrl-C: this step is finished and the summary written; Ctrl-C again stops at once"
            )
