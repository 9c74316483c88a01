"""summary.json: a run's final numbers."""

from pathlib import Path

from launcher.autopar.text.atomic_file import write_atomically
from launcher.runtime.records.metrics import Row, to_json

SUMMARY_NAME = "summary.json"


def write_summary(run_dir: Path, row: Row) -> Path:
    """Write a run's final numbers to its summary.json, and give the path."""
    path = run_dir / SUMMARY_NAME
    write_atomically(path, to_json(row, indent=2) + "\n")
    return path
