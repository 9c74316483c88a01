"""Bad inputs as data, and what all of them must end in.

A `Bad` is a command line, what lies in the working folder, and what the one line must say. Others
may build tables of it: `launch` runs a command line in this process, `assert_refused` checks how it
ended. Ends and messages are the real ones: everything goes through `launcher.cli.main`.
"""

import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from launcher import cli

LIMIT_S, HANGS_S = 5.0, 40.0


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One bad input.

    Attributes:
        arguments: Of `python -m launcher`.
        says: What must stand in the message, in this order: the key or the place, then the cure.
        files: What lies in the working folder, path -> contents.
        make: Makes what is no plain file there: folders, links, pipes.
        status: The exit status.
        name: In pytest's output; the arguments where it is empty.
    """

    arguments: tuple[str, ...]
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Callable[[pathlib.Path], object] | None = None
    status: int = 2
    name: str = ""

    def __str__(self) -> str:
        text = self.name or " ".join(self.arguments)
        return ascii(text)[1:-1][:70]

    def lay_out(self, folder: pathlib.Path) -> None:
        """Put the files where the command line expects them."""
        for path, contents in self.files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        if self.make is not None:
            self.make(folder)


def bad(*arguments: str, says: str | tuple[str, ...], **rest) -> Bad:
    """A bad input whose message is written `key ... cure`, or as its parts."""
    parts = tuple(says.split(" ... ")) if isinstance(says, str) else says
    return Bad(arguments=arguments, says=parts, **rest)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command line ended."""

    status: int
    stderr: str
    cpu_s: float  # not of the clock: the tests share their machine with others


def launch(
    arguments: tuple[str, ...],
    folder: pathlib.Path,
    capture: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Ending:
    """Run `launcher.cli.main` in a folder; one that hangs is stopped, which fails the test."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    start_s = time.process_time()
    try:
        status = cli.main()
    finally:
        cpu_s = time.process_time() - start_s
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return Ending(status=status, stderr=capture.readouterr().err, cpu_s=cpu_s)


def _give_up(*_: object) -> None:
    raise TimeoutError(f"it was still running after {HANGS_S} s")


def everything_in(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its kind, and the size of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = os.lstat(path)
        found[str(path.relative_to(folder))] = (stat.st_mode, stat.st_size)
    return found


def assert_refused(case: Bad, ending: Ending) -> None:
    """One line that names the key and the cure, the right status, in time."""
    assert "Traceback" not in ending.stderr
    lines = ending.stderr.splitlines()
    assert len(lines) == 1, ending.stderr
    (line,) = lines
    assert line.startswith("launcher: "), line
    assert line.isprintable(), ascii(line)
    assert len(line) < 1000, f"{len(line)} characters"
    assert ending.status == case.status, line
    place = 0
    for part in case.says:
        assert part in line[place:], f"{part!r} is not in {line!r}"
        place = line.index(part, place) + len(part)
    assert ending.cpu_s < LIMIT_S
