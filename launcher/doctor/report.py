"""The doctor's output: a line per finding under its group, a sum at the end, and the exit status."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TextIO

from launcher.doctor.checkup import Check
from launcher.doctor.findings import Finding, Status

CRASH_STATUS = 1  # a bug of ours
_WIDTH = max(len(status) for status in Status)


class Report:
    """Prints findings as they come, and counts them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._found: list[tuple[Check, Finding]] = []

    def print_all(self, found: Iterable[tuple[Check, Finding]]) -> None:
        """Print each finding when it is known; a group's name stands before its first line."""
        for check, finding in found:
            if not self._found or self._found[-1][0].group != check.group:
                self._write(check.group)
            self._found.append((check, finding))
            for line in lines(finding):
                self._write(f"  {line}")

    def print_sum(self, wall_s: float) -> None:
        """Print how many lines there are of each status."""
        count = Counter(finding.status for _, finding in self._found)
        numbers = ", ".join(f"{count[status]} {status}" for status in Status if count[status])
        self._write(f"{numbers}; {wall_s:.1f} s")

    def exit_status(self) -> int:
        """Return 0 if nothing failed, else what the first failing line stands for."""
        return exit_status(self._found)

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


def lines(finding: Finding) -> list[str]:
    """A finding as text: its line, and below it what it means and what to do."""
    indent = " " * (_WIDTH + 2)
    rest = {"means": finding.meaning, "to do": finding.cure}
    return [
        f"{finding.status:<{_WIDTH}}  {finding.what}",
        *(f"{indent}  {name}: {text}" for name, text in rest.items() if text),
    ]


def exit_status(found: Sequence[tuple[Check, Finding]]) -> int:
    """The first failing line decides: what comes after it may follow from it."""
    for check, finding in found:
        if finding.status is Status.FAILED:
            return CRASH_STATUS if finding.is_crash else check.exit_status
    return 0


class Progress:
    """Says on stderr what a slow check is doing; on a terminal the line goes when it has ended."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    def __call__(self, text: str) -> None:
        """Show a text, or with "" end it."""
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{f'  ... {text}' if text else ''}")
        elif text:
            self._stream.write(f"  ... {text}\n")
        self._stream.flush()
