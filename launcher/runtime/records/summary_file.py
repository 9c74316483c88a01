"""summary.json: a run's final numbers."""

import json
from pathlib import Path

from launcher.autopar.text.atomic_file import write_atomically
from launcher.runtime.records.metrics import Row, to_json

SUMMARY_NAME = "summary.json"


def write_summary(run_dir: Path, row: Row) -> Path:
    """Write a run's final numbers to its summary.json, and give the path."""
    path = run_dir / SUMMARY_NAME
    write_atomically(path, to_json(row, indent=2) + "\n")
    return path


def has_summary(run_dir: Path, steps: int) -> bool:
    """Whether the summary that is there is of a run that has done so many steps to the end."""
    try:
        row = json.loads((run_dir / SUMMARY_NAME).read_text())
        return row["status"] == "done" and row["steps"] == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False
