"""Where the rows of a run go: the interface of all sinks, and the two that write files.

The terminal is in `progress.py`, Weights & Biases in `wandb_sink.py`. A sink gets rows in the order
of their steps, an evaluation's row after that of its step, and one summary at the end, however the
run ended.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from launcher.autopar.text.atomic_file import storage_error, write_atomically
from launcher.runtime.records.metrics import PlanMetrics, Row, TrainSummary, to_json
from launcher.runtime.records.summary_file import write_summary

METRICS_NAME = "metrics.jsonl"


class Sink(ABC):
    """Takes a run's rows, then its summary."""

    __slots__ = ()

    @abstractmethod
    def write(self, row: Row) -> None:
        """Record the row of one step or of one evaluation (which has `eval_loss`)."""

    def rewind(self, step: int) -> None:
        """Know that the run goes back to where so many steps were done, and writes the rest anew."""
        del step

    @abstractmethod
    def finish(self, summary: TrainSummary) -> None:
        """Record how the run ended, and let go of what is held open. Called once."""


def finish_all(sinks: Sequence[Sink], summary: TrainSummary) -> list[Exception]:
    """Finish every sink, also after one that fails; give what they raised."""
    errors = []
    for sink in sinks:
        try:
            sink.finish(summary)
        except Exception as error:
            errors.append(error)
    return errors


def check_metrics(run_dir: Path) -> None:
    """Find out before the run is planned and compiled that metrics.jsonl cannot be appended to."""
    if (run_dir / METRICS_NAME).exists():
        _open(run_dir / METRICS_NAME).close()


def drop_rows_after(run_dir: Path, step: int) -> None:
    """Take out of metrics.jsonl what a resumed run writes again, and a last line that was cut short."""
    path = run_dir / METRICS_NAME
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(path, error, needed_bytes=0) from error
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open(path: Path) -> FileIO:
    try:
        # Unbuffered: a row is with the system once `write` returns, and nothing is left to fail
        # in `close`.
        return path.open("ab", buffering=0)
    except OSError as error:
        raise storage_error(path, error, needed_bytes=0) from error


class JsonlSink(Sink):
    """Appends each row to metrics.jsonl as it comes: a run can be followed, and may be killed."""

    __slots__ = ("_file", "_path")

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_NAME
        self._file = _open(self._path)

    def write(self, row: Row) -> None:
        """Append one line."""
        line = (to_json(row) + "\n").encode()
        rest = line
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise storage_error(self._path, error, needed_bytes=len(line)) from error

    def rewind(self, step: int) -> None:
        """Take out the rows of what is done again."""
        self._file.close()
        drop_rows_after(self._path.parent, step)
        self._file = _open(self._path)

    def finish(self, summary: TrainSummary) -> None:
        """Close the file."""
        del summary
        self._file.close()


class SummarySink(Sink):
    """Writes summary.json at the end: the final numbers, measured beside predicted."""

    __slots__ = ("_plan", "_run_dir")

    def __init__(self, run_dir: Path, plan: PlanMetrics) -> None:
        self._run_dir = run_dir
        self._plan = plan

    def write(self, row: Row) -> None:
        """Pass by: the loop's summary has all that is needed."""
        del row

    def finish(self, summary: TrainSummary) -> None:
        """Write the file."""
        write_summary(self._run_dir, {**summary.as_row(), **self._plan.as_row()})
