"""What the tests put into processes that Ray starts, and what they look for after it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator


class Thing:
    """Answers, waits, raises, or ends its process."""

    def __init__(self, task: object) -> None:
        self.task = task

    def about(self) -> dict:
        """What its process was given."""
        return {
            "task": self.task,
            "pid": os.getpid(),
            "folder": os.getcwd(),
            "NPROC": os.environ.get("NPROC"),
            "ignores": signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN,
            "nice": os.nice(0),
        }

    def waits(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def raises(self, error: Exception) -> None:
        raise error

    def crashes(self) -> None:
        os.abort()


class UnpicklableError(Exception):
    """Cannot be sent."""

    def __init__(self, a, b) -> None:
        super().__init__(f"{a} {b}")


def is_alive(pid: int) -> bool:
    """Whether there is such a process, that is not only waiting to be reaped."""
    try:
        stat = pathlib.Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def family(pid: int) -> set[int]:
    """A process, all that it has started, and theirs: other tests have a Ray of their own."""
    lines = subprocess.run(
        ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    parents = {int(child): int(parent) for child, parent in map(str.split, lines)}
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


def ray_folder(pids: set[int]) -> pathlib.Path:
    """Where the Ray among these processes has its files."""
    (keeper,) = (
        words for words in map(_command, pids) if "launcher.runtime.hosts.ray_keeper" in words
    )
    return pathlib.Path(keeper[-2])


def _command(pid: int) -> list[str]:
    try:
        return pathlib.Path("/proc", str(pid), "cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return []


def wait_until(is_so, limit_s: float = 20.0) -> float:
    """Wait, and give the seconds it took."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < limit_s
        time.sleep(0.02)
    return time.monotonic() - began_s


@contextlib.contextmanager
def two_machines(log: pathlib.Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a Ray cluster of two machines, and what takes commands for it (`ray_cluster.py`)."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' paths must be short
    script = pathlib.Path(__file__).with_name("ray_cluster.py")
    with (
        log.open("w") as said,
        subprocess.Popen(
            [sys.executable, script, folder], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        ) as cluster,
    ):  # fmt: skip
        address = cluster.stdout.readline().strip()
        assert address, log.read_text()

        def say(command: str) -> None:
            cluster.stdin.write(f"{command}\n")
            cluster.stdin.flush()

        yield address, say
    assert not pathlib.Path(folder).exists()
