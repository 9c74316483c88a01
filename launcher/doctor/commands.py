"""Run other programs under a time limit, and leave none of them behind.

Whatever might hang or crash (a driver, a controller that does not answer, JAX itself) is asked in a
process of its own. Each has its own session, so that it ends together with what it has started.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_GRACE_S = 3.0  # between asking a program to end and ending it


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended; `status` is None if it was ended at its time limit."""

    status: int | None
    stdout: str = ""
    stderr: str = ""

    @property
    def last_words(self) -> str:
        """The last line that says something, of stderr or else of stdout."""
        said = [line.strip() for text in (self.stdout, self.stderr) for line in text.splitlines()]
        return next((line for line in reversed(said) if line), "it said nothing")


# A command, its time limit in seconds, and what its environment has besides ours; returns None where
# there is no such command.
Runner = Callable[[Sequence[str], float, Mapping[str, str]], Outcome | None]


class Processes:
    """Runs commands; `close` ends those that are still at work."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def run(
        self, command: Sequence[str], limit_s: float, environment: Mapping[str, str]
    ) -> Outcome | None:
        """Run a command to its end or its limit; a `Runner`."""
        if self._is_closed:
            return None
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment | environment,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except (FileNotFoundError, PermissionError):
            return None
        with self._lock:
            self._running.add(process)
        try:
            stdout, stderr = process.communicate(timeout=limit_s)
            return Outcome(status=process.returncode, stdout=stdout, stderr=stderr)
        except subprocess.TimeoutExpired:
            end(process)
            return Outcome(status=None)
        finally:
            process.stdout.close()
            process.stderr.close()
            with self._lock:
                self._running.discard(process)

    def close(self) -> None:
        """End what is still running, and start nothing more."""
        with self._lock:
            self._is_closed = True
            running = tuple(self._running)
        for process in running:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and all of its session; one that a driver holds is left to the system."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_S)
    _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_S)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
