"""What a person sees of a run as it goes: a live bar on a terminal, plain lines in a log.

A log (of Slurm, of CI) gets the first steps one by one, then a line at every tenth of the run and
about every 10 s (every minute, once the run is old), so that it can be read at any length. A
terminal gets the bar with the newest numbers, and above it the evaluations and a line at every
tenth.

All lines go through `logging`, so that launcher.log has them too. A live display takes the place of
`sys.stdout` while it is up, so a log handler that writes there does not tear it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from launcher.runtime.records.metrics import (
    WARM_UP_STEPS,
    Meter,
    Row,
    TrainSummary,
    is_evaluation,
    is_skipped,
)
from launcher.runtime.records.progress_text import (
    describe_numbers,
    describe_pace,
    describe_row,
    duration,
    final_lines,
)
from launcher.runtime.records.sinks import Sink

log = logging.getLogger(__name__)

FIRST_LINES = 3
LINE_EVERY_S = 10.0
LINE_EVERY_S_AT_MOST = 60.0
PHASE_UPDATE_EVERY_S = 10.0


def progress_sink(console: Console, meter: Meter, steps: int, run_dir: Path) -> Sink:
    """Give the live bar where there is a terminal to draw it on, and log lines elsewhere."""
    if console.is_interactive:
        return BarSink(console, meter, steps, run_dir)
    return LogSink(meter, steps, run_dir)


class LogSink(Sink):
    """Writes plain lines to the log, few enough to read."""

    __slots__ = ("_meter", "_rate", "_run_dir", "_steps")

    def __init__(
        self, meter: Meter, steps: int, run_dir: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter = meter
        self._steps = steps
        self._run_dir = run_dir
        self._rate = LineRate(steps, clock)

    def write(self, row: Row) -> None:
        """Log the row if its turn has come; evaluations and skipped steps always are."""
        line = describe_row(row, self._meter, self._steps)
        if is_evaluation(row) or is_skipped(row):
            log.info("%s", line)
        elif self._rate.is_due(row["step"]):
            log.info("%s  %s", line, describe_pace(row, self._rate.remaining_s(row["step"])))

    def finish(self, summary: TrainSummary) -> None:
        """Log the final lines."""
        _log_end(summary, self._meter, self._run_dir)


class BarSink(Sink):
    """Draws a live bar with the newest numbers below it; milestones stay in the scrollback."""

    __slots__ = ("_bar", "_live", "_meter", "_newest", "_run_dir", "_steps", "_task")

    def __init__(self, console: Console, meter: Meter, steps: int, run_dir: Path) -> None:
        self._meter = meter
        self._steps = steps
        self._run_dir = run_dir
        self._newest = Text("waiting for the first step")
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=steps)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        self._live.start()

    def write(self, row: Row) -> None:
        """Move the bar; keep a line of evaluations, skipped steps, and every tenth of the run."""
        keeps = is_evaluation(row) or is_skipped(row)
        if keeps or is_milestone(row["step"], self._steps):
            log.info("%s", describe_row(row, self._meter, self._steps))
        if not is_evaluation(row):
            self._newest = Text(describe_numbers(row, self._meter))
            self._bar.update(self._task, completed=row["step"])

    def finish(self, summary: TrainSummary) -> None:
        """Take the bar down and log the final lines."""
        self._live.stop()
        _log_end(summary, self._meter, self._run_dir)

    def _render(self) -> Group:
        return Group(self._bar, self._newest)


class LineRate:
    """Decides which steps get a line in a log, and guesses how long the rest takes."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self._steps = steps
        self._clock = clock
        self._last_s = clock()
        # The step that came first, and when: a resumed run does not begin at 1.
        self._first: tuple[int, float] | None = None
        # The same of the last step of the warm-up, which the pace of the others does not count.
        self._warm: tuple[int, float] | None = None

    def is_due(self, step: int) -> bool:
        """Say whether this step gets a line; one that does starts the wait for the next."""
        now_s = self._clock()
        self._first = self._first or (step, now_s)
        first_step, first_s = self._first
        if step == first_step + WARM_UP_STEPS - 1:
            self._warm = step, now_s
        wait_s = min(LINE_EVERY_S_AT_MOST, max(LINE_EVERY_S, (now_s - first_s) / 20))
        due = (
            step < first_step + FIRST_LINES
            or is_milestone(step, self._steps)
            or now_s - self._last_s >= wait_s
        )
        if due:
            self._last_s = now_s
        return due

    def remaining_s(self, step: int) -> float | None:
        """Give the seconds to the end at the pace since the warm-up; None while that lasts."""
        if self._warm is None or not self._warm[0] < step < self._steps:
            return None
        warm_step, warm_s = self._warm
        return (self._clock() - warm_s) / (step - warm_step) * (self._steps - step)


def is_milestone(step: int, steps: int) -> bool:
    """Say whether a step completes a tenth of the run (the last step completes the last)."""
    return step * 10 // steps > (step - 1) * 10 // steps


@contextlib.contextmanager
def phase(
    console: Console, text: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Show that something long goes on: `with phase(console, "compiling 6 programs") as update:`.

    A terminal gets a spinner with the elapsed time, a log one line at the start and one at the end.
    `update("3 of 6")` says how far it is; a log shows that every 10 s at most.
    """
    started_s = clock()
    showing = _spinner(console, text) if console.is_interactive else _phase_lines(text, clock)
    with showing as update:
        yield update
    log.info("%s: done in %s", text, duration(clock() - started_s))


@contextlib.contextmanager
def _spinner(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text)
        yield lambda state: progress.update(task, description=f"{text}: {state}")


@contextlib.contextmanager
def _phase_lines(text: str, clock: Callable[[], float]) -> Iterator[Callable[[str], None]]:
    log.info("%s ...", text)
    last_s = clock()

    def update(state: str) -> None:
        nonlocal last_s
        if clock() - last_s >= PHASE_UPDATE_EVERY_S:
            last_s = clock()
            log.info("%s: %s", text, state)

    yield update


def _log_end(summary: TrainSummary, meter: Meter, run_dir: Path) -> None:
    for line in final_lines(summary, meter, run_dir):
        log.info("%s", line)
