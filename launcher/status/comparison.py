"""The comparison of a sweep: its runs in the order of what matters, and as a table for other programs.

What matters: if the runs differ only in how they are carried out (`parallel`, `cluster`, `runtime`),
or were only planned, how fast they are; else how well they learn, by the loss of the last evaluation,
or without evaluations by the last loss. Runs without that number come last, those that failed after
those at work.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.status.columns import differing
from launcher.status.run_files import RunFiles, number, text
from launcher.status.standing import Standing

CSV_NAME, PICTURE_NAME = "comparison.csv", "comparison.svg"
_HOW = ("parallel", "cluster", "runtime", "plan")
_AT_WORK = ("starting", "planning", "compiling", "training", "evaluating", "queued")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of the sweep.

    Attributes:
        name: Its folder below the sweep's.
        values: Column -> value of what differs between the runs.
    """

    name: str
    values: Mapping[str, str]
    files: RunFiles
    standing: Standing

    @property
    def label(self) -> str:
        """What it is: the values that differ, or the folder where none do."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or self.name

    @property
    def peak_bytes(self) -> float | None:
        """The most that a device is to hold, as the plan says."""
        stages = self.files.plan.get("predicted", {})
        peaks = stages.get("peak_bytes_per_device") if isinstance(stages, Mapping) else None
        known = (
            [peak for peak in peaks if isinstance(peak, int | float)]
            if isinstance(peaks, list)
            else []
        )
        return max(known, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The runs of a sweep, the best first.

    Attributes:
        order: By what they are sorted, in words.
    """

    runs: tuple[Run, ...]
    columns: tuple[str, ...]
    order: str


def compare(
    top: Path, runs: Sequence[tuple[RunFiles, Standing]], *, sort: bool = True
) -> Comparison:
    """Find what differs between runs, and sort them."""
    columns = differing([(files.folder, files.config) for files, _ in runs])
    found = [
        Run(
            name=str(files.folder.resolve().relative_to(top.resolve())),
            values={column: values[at] for column, values in columns.items()},
            files=files,
            standing=standing,
        )
        for at, (files, standing) in enumerate(runs)
    ]
    order, merit = _merit(found, columns)
    if sort:
        found.sort(key=lambda run: _rank(run, merit(run)))
    return Comparison(runs=tuple(found), columns=tuple(columns), order=order)


def samples_per_s(run: Run) -> float | None:
    """How fast a plan promises to be."""
    batch = number(run.files.plan, "global_batch")
    step_s = run.standing.predicted_step_s
    return batch / step_s if batch and step_s else None


def _merit(
    runs: Sequence[Run], columns: Mapping[str, object]
) -> tuple[str, Callable[[Run], float | None]]:
    """By what runs are sorted, in words and as a number, of which less is better."""
    if all(run.standing.mode == "plan" for run in runs):
        return "predicted speed", lambda run: _negative(samples_per_s(run))
    only_how = all(column.partition(".")[0] in _HOW for column in columns) and columns
    if only_how and any(run.standing.per_s for run in runs):
        return "measured speed", lambda run: _negative(run.standing.per_s)
    if any(run.standing.eval_loss is not None for run in runs):
        return "eval_loss", lambda run: run.standing.eval_loss
    return "loss", lambda run: run.standing.loss


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _rank(run: Run, merit: float | None) -> tuple[bool, bool, float]:
    failed = not run.standing.has_ended_well and run.standing.state not in _AT_WORK
    return failed, merit is None, merit or 0.0


def as_csv(comparison: Comparison) -> str:
    """Write the comparison for other programs: a line for each run, the best first."""
    rows = [_fields(run, place) for place, run in enumerate(comparison.runs, start=1)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _fields(run: Run, place: int) -> dict[str, object]:
    plan, summary, told = run.files.plan, run.files.summary, asdict(run.standing)
    folder, log = told.pop("folder"), told.pop("log")
    unit, per_s, detail = told.pop("unit"), told.pop("per_s"), told.pop("detail")
    stages = plan.get("stages")
    return {
        "place": place,
        "run": run.name,
        **run.values,
        **told,
        "reason": detail,
        "tokens_per_s": per_s if unit == "tokens" else None,
        "samples_per_s": per_s if unit == "samples" else None,
        "predicted_samples_per_s": samples_per_s(run),
        "predicted_bubble_fraction": number(plan, "predicted", "bubble_fraction"),
        "predicted_peak_bytes_per_device": run.peak_bytes,
        "measured_peak_bytes_per_device": number(summary, "measured_peak_bytes_per_device"),
        "model_size": text(plan, "model", "size"),
        "stages": len(stages) if isinstance(stages, list) else None,
        "num_microbatches": number(plan, "num_microbatches"),
        "schedule": text(plan, "schedule"),
        "goodput": number(summary, "goodput"),
        "folder": folder,
        "log": log,
    }
