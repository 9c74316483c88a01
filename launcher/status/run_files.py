"""The files of a run, read for what they say, whatever is missing, half-written or damaged.

A run may be at work, so that a file can be missing and the last line of metrics.jsonl cut short. What cannot
be read is named in `damaged`, and the rest counts. Nothing is written.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.autopar.text.strict_yaml import load_yaml
from launcher.errors import ConfigError
from launcher.regular_file import open_regular, read_regular
from launcher.run_lock import Holder, holder_of
from launcher.run_state import STATE_NAME
from launcher.runtime.records.goodput import GOODPUT_NAME
from launcher.runtime.records.sinks import METRICS_NAME
from launcher.runtime.records.summary_file import SUMMARY_NAME

CONFIG_NAME, PLAN_NAME, LOG_NAME, JOB_NAME = "config.yaml", "plan.json", "launcher.log", "job.json"
# Any of these makes a folder that of a run.
NAMES = (CONFIG_NAME, STATE_NAME, METRICS_NAME, SUMMARY_NAME, PLAN_NAME, JOB_NAME)

_LARGEST_BYTES = 2**27
_TAIL_BYTES = 2**24  # of metrics.jsonl, in which the newest rows are looked for
_CURVE_POINTS = 200

Tree = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What the files of a run say; a file that is not there is an empty mapping.

    Attributes:
        rows: The newest rows of metrics.jsonl, oldest first.
        curve: (step, loss) from the first row to the last, about evenly spaced.
        holder: Who has held the folder last without letting go.
        is_held: Whether that process still does.
        damaged: A sentence about each file that cannot be read.
    """

    folder: Path
    config: Tree
    state: Tree
    summary: Tree
    plan: Tree
    goodput: Tree
    job: Tree
    rows: tuple[Tree, ...]
    eval_row: Tree
    curve: tuple[tuple[int, float], ...]
    holder: Holder | None
    is_held: bool
    damaged: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Where the run's log is, or will be."""
        return self.folder / LOG_NAME


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run's folder."""
    damaged: list[str] = []
    holder, is_held = holder_of(folder)  # before the state, which may become that of the end
    trees = {
        name: _read(folder / name, damaged, _json)
        for name in (STATE_NAME, SUMMARY_NAME, PLAN_NAME, GOODPUT_NAME, JOB_NAME)
    }
    rows, eval_row = _newest_rows(folder / METRICS_NAME, damaged)
    return RunFiles(
        folder=folder,
        config=_read(folder / CONFIG_NAME, damaged, lambda path: load_yaml(path, CONFIG_NAME)),
        state=trees[STATE_NAME],
        summary=trees[SUMMARY_NAME],
        plan=trees[PLAN_NAME],
        goodput=trees[GOODPUT_NAME],
        job=trees[JOB_NAME],
        rows=rows,
        eval_row=eval_row,
        curve=_curve(folder / METRICS_NAME, rows[-1:]),
        holder=holder,
        is_held=is_held,
        damaged=tuple(damaged),
    )


def number(tree: Tree, *keys: str) -> float | int | None:
    """A finite number at a path of keys; None if there is none."""
    value = _at(tree, keys)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def text(tree: Tree, *keys: str) -> str | None:
    """A text at a path of keys; None if there is none."""
    value = _at(tree, keys)
    return value if isinstance(value, str) and value else None


def _at(tree: Tree, keys: tuple[str, ...]) -> object:
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _read(path: Path, damaged: list[str], load: Callable[[Path], object]) -> Tree:
    if not path.exists():
        return {}
    try:
        tree = load(path)
    except (ConfigError, OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        damaged.append(why if str(path) in str(why) else f"cannot read {path}, {why}")
        return {}
    if not isinstance(tree, Mapping):
        damaged.append(f"cannot read {path}, it holds no mapping")
        return {}
    return tree


def _json(path: Path) -> object:
    data = read_regular(path, _LARGEST_BYTES)
    if data is None:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    return json.loads(data)


def _newest_rows(path: Path, damaged: list[str]) -> tuple[tuple[Tree, ...], Tree]:
    """The newest rows of training, and the newest of an evaluation."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            begin = max(size - _TAIL_BYTES, 0)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return (), {}
    except OSError as error:
        damaged.append(f"cannot read {path}, {error.strerror}")
        return (), {}
    whole = lines[1 if begin else 0 : -1]  # what follows the last line break is being written
    rows = [row for row in map(_row, whole[-2 * _CURVE_POINTS :]) if row]
    if whole and not rows:
        damaged.append(f"cannot read {path}, none of its last lines is a row")
    evaluations = (_row(line) for line in reversed(whole) if b'"eval_loss"' in line)
    training = [row for row in rows if "loss" in row]
    return tuple(training[-_CURVE_POINTS:]), next((row for row in evaluations if row), {})


def _row(line: bytes) -> Tree:
    """A row of metrics.jsonl; an empty one for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, Mapping) and isinstance(row.get("step"), int) else {}


def _curve(path: Path, last: tuple[Tree, ...]) -> tuple[tuple[int, float], ...]:
    """Losses over the whole run: of a long file only the lines at evenly spaced places are read."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            places = [size * at // _CURVE_POINTS for at in range(_CURVE_POINTS)]
            rows = [_row_after(file, place) for place in places]
    except OSError:
        return ()
    known = {row["step"]: number(row, "loss") for row in (*rows, *last) if row}
    return tuple(sorted((step, loss) for step, loss in known.items() if loss is not None))


def _row_after(file: BinaryIO, place: int) -> Tree:
    """The first row that begins at a place or after it."""
    file.seek(place)
    if place:
        file.readline()
    return _row(file.readline())
