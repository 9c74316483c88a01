"""A look at the runs of a folder: the table, and of several runs the comparison's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.autopar.text.atomic_file import write_atomically
from launcher.errors import ConfigError, LauncherError, StorageError
from launcher.status.comparison import CSV_NAME, PICTURE_NAME, Comparison, as_csv, compare
from launcher.status.folders import find_runs
from launcher.status.picture import picture
from launcher.status.queue import Job, find_jobs
from launcher.status.run_files import RunFiles, read_run
from launcher.status.standing import job_id, standing
from launcher.status.table import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is printed, and the errors that end the command."""

    lines: tuple[str, ...]
    errors: tuple[LauncherError, ...]


def report(top: Path, runs: Sequence[Path] | None = None) -> Report:
    """Look at the runs below a folder, or at some of them, and write the files of their comparison.

    Raises:
        ConfigError: there is no run.
    """
    files = [read_run(folder) for folder in (find_runs(top) if runs is None else runs)]
    jobs = find_jobs(found for found in map(job_id, files) if found)
    looked = [(one, standing(one, jobs)) for one in files]
    comparison = compare(top, looked)
    damaged = [ConfigError(text) for one in files for text in one.damaged]
    is_one = [one.folder for one in files] == [top]
    written, errors = ([], []) if is_one else _write(top, comparison)
    return Report(
        lines=(
            *_head(comparison, is_one=is_one),
            *table(comparison),
            *_advice(files, jobs),
            *written,
        ),
        errors=(*damaged, *errors),
    )


def _head(comparison: Comparison, *, is_one: bool) -> list[str]:
    if is_one:
        return []
    count = len(comparison.runs)
    return [f"{count} run{'s' * (count > 1)}, sorted by {comparison.order}"]


def _advice(files: Sequence[RunFiles], jobs: Mapping[str, Job] | None) -> list[str]:
    if jobs is None and any(one.job for one in files):
        return ["squeue does not answer here: which jobs wait or run is not known"]
    return []


def _write(top: Path, comparison: Comparison) -> tuple[list[str], list[StorageError]]:
    """Write the comparison beside the runs; where that cannot be, the table was printed all the same."""
    try:
        write_atomically(top / CSV_NAME, as_csv(comparison))
        write_atomically(top / PICTURE_NAME, picture(comparison))
    except StorageError as error:
        return [], [error]
    return [f"written: {top / CSV_NAME}, {top / PICTURE_NAME}"], []
