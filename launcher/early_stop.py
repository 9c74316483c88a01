"""Being asked to stop before there is a run: the process ends at once, in the documented way.

`python -m launcher` imports and composes for a moment before it can listen to signals as a run does
(`runtime/training/interrupt.py`). Nothing is begun then, so nothing is lost, and there is nobody to catch
an exception.
"""

import os
import signal
from types import FrameType

from launcher.errors import StoppedBySignal

_STATUSES = {
    signal.SIGTERM: StoppedBySignal.exit_status,
    signal.SIGUSR1: StoppedBySignal.exit_status,
    signal.SIGUSR2: StoppedBySignal.exit_status,
    signal.SIGINT: 130,
}


def listen() -> None:
    """End the process at each of these signals, unless it was started to ignore it."""
    for number in _STATUSES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def hand_over_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, now that somebody catches it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _: FrameType | None) -> None:
    status = _STATUSES[number]
    what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    cure = "" if number == signal.SIGINT else "; to go on: run the same command again"
    os.write(2, f"launcher: stopped by {what} before anything was begun{cure}\n".encode())
    os._exit(status)
