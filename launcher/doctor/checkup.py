"""Run the checks one after the other; a check that raises or hangs is itself a failed line.

Each check runs in a thread: a call that never comes back (a network filesystem whose server is
gone) is left behind there, and the next check is begun.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from launcher.doctor.findings import Finding, Status, failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A function that looks at one thing, and the group of lines that it belongs to."""

    group: str
    run: Callable[[], Iterable[Finding]]
    limit_s: float = 20.0
    progress: str = ""  # of slow checks: what is said while they are at work
    exit_status: int  # of the doctor, if this is the first check that fails


class Checkup:
    """Runs checks, and knows which one is at work."""

    def __init__(self) -> None:
        # Of the check that was begun last. A thread says it less well: a signal may come amid its start.
        self._has_ended = threading.Event()
        self._has_ended.set()

    def run(
        self, checks: Iterable[Check], announce: Callable[[str], None]
    ) -> Iterator[tuple[Check, Finding]]:
        """Yield what each check finds, as soon as it has ended.

        Args:
            announce: told what a slow check is about to do, and "" when it has ended.
        """
        for check in checks:
            if check.progress:
                announce(f"{check.progress} (at most {check.limit_s:.0f} s)")
            found = self._findings(check)
            if check.progress:
                announce("")
            yield from ((check, finding) for finding in found)

    def settle(self, limit_s: float) -> None:
        """Wait for a check that was interrupted to remove what it has made."""
        self._has_ended.wait(limit_s)

    def _findings(self, check: Check) -> tuple[Finding, ...]:
        results: queue.SimpleQueue[tuple[Finding, ...]] = queue.SimpleQueue()
        has_ended = self._has_ended = threading.Event()

        def run() -> None:
            results.put(_run(check))
            has_ended.set()

        threading.Thread(target=run, daemon=True).start()
        try:
            return results.get(timeout=check.limit_s)
        except queue.Empty:
            return (_endless(check),)


def _endless(check: Check) -> Finding:
    return failed(
        f"the check of {check.group} did not end within {check.limit_s:.0f} s",
        "something that it asked never answered, as a mounted folder whose server is gone",
        "see whether `df` and `nvidia-smi` answer here, and what `dmesg` says last",
    )


def _run(check: Check) -> tuple[Finding, ...]:
    try:
        return tuple(check.run())
    except OSError as error:
        return (_refused(check, error),)
    except Exception as error:
        text = " ".join(str(error).split())
        at = traceback.extract_tb(error.__traceback__)[-1]
        return (
            Finding(
                status=Status.FAILED,
                what=f"the check of {check.group} broke: {type(error).__name__}: {text}",
                meaning=f"this part was not looked at ({at.filename}:{at.lineno}); "
                "the other lines hold",
                cure="report this line as a bug of ours, with what is special about the machine",
                is_crash=True,
            ),
        )


def _refused(check: Check, error: OSError) -> Finding:
    """Most checks make a temporary folder or start a process; a full machine grants neither."""
    return failed(
        f"the check of {check.group} could not begin: {error}",
        "the system refuses a temporary file or another process, and will refuse them to runs too",
        "see that the folder for temporary files has space (`df -h /tmp`, `df -i /tmp`; TMPDIR names "
        "another), and how many processes there may be (`ulimit -u`)",
    )
