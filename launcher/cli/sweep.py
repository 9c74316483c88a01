"""Run one point of a sweep in a process of its own.

JAX fixes its devices when it starts, and the points of a sweep may want different numbers of them
(a cluster's shape is emulated on CPU devices). So in a sweep Hydra's launcher calls back for each
point as always, and the point is then an ordinary run in the folder that the sweep gives it: the
same config, the same files, the same exit status as if it had been started by hand.
"""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from launcher.cli.report import FULL_ERROR
from launcher.cli.run_folder import run_dir_override
from launcher.errors import StoppedBySignal

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED_STATUSES = (
    StoppedBySignal.exit_status,
    *(128 + number for number in (signal.SIGINT, *PASSED_ON)),
)


def group_of(sweep_dir: pathlib.Path) -> str:
    """The W&B group of a sweep whose points are given none: the end of its folder's path."""
    return "/".join(sweep_dir.absolute().parts[-2:])


def command(
    overrides: Sequence[str], *, flags: Sequence[str], run_dir: pathlib.Path, number: int
) -> list[str]:
    """Return the command line of one point; of two overrides of a key the later one wins."""
    settings = (
        "hydra.mode=RUN",
        run_dir_override(run_dir),
        f"hydra.job.num={number}",
        f"hydra.job.id={number}",
    )
    return [sys.executable, "-m", "launcher", *flags, *overrides, *settings]


def run(command: Sequence[str], *, folder: str, debug: bool) -> int:
    """Run a point in a working folder to its end and return its exit status.

    Ctrl-C reaches the point too, from the terminal, and a scheduler's signals are passed on; the point
    ends in its own way, and one that ends well all the same is reported as stopped.
    """
    # Our own setting must not look like the user's wish for tracebacks.
    environment = os.environ | {FULL_ERROR: "1" if debug else "0"}
    process = subprocess.Popen(command, cwd=folder, env=environment)
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if number in PASSED_ON:
            process.send_signal(number)

    heard = (signal.SIGINT, *PASSED_ON)
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status == 0 and signals:
        return 128 + signals[0]
    return status if status >= 0 else 128 - status  # what a shell says of an end by a signal
