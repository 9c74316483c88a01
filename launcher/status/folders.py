"""Which runs a folder has: itself, or those below it (a sweep, a day, all of outputs/).

The copy of the code that a sweep's jobs run is no run, though it has a config.yaml.
"""

import os
from pathlib import Path

from launcher.errors import ConfigError
from launcher.slurm.code_copy import VERSIONS_NAME
from launcher.status.run_files import NAMES

_DEEPEST = 5  # a sweep's folder of folders: multirun/DATE/TIME/model=gpt/seed=0
_MOST_FOLDERS = 20_000


def find_runs(top: Path) -> list[Path]:
    """List the folders of the runs, in the order of their names, numbers as numbers.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    if not top.is_dir():
        what = "is no folder" if top.exists() else "is not there"
        raise ConfigError(f"{top} {what}: give the folder of a run or of a sweep")
    found, open_folders, seen = [], [(top, 0)], 0
    while open_folders:
        folder, depth = open_folders.pop()
        names, inner = _entries(folder)
        if any(name in names for name in NAMES):
            found.append(folder)
        elif depth < _DEEPEST and VERSIONS_NAME not in names:
            open_folders += [(path, depth + 1) for path in inner]
        seen += 1
        if seen > _MOST_FOLDERS:
            raise ConfigError(
                f"{top} has more than {_MOST_FOLDERS} folders: give the folder of a run or of a sweep"
            )
    if not found:
        raise ConfigError(
            f"{top} has no run in it (no {NAMES[0]} and none of its files): give the folder of a run or "
            f"of a sweep, such as outputs/DATE/TIME or multirun/DATE/TIME"
        )
    return sorted(found, key=lambda path: _natural(path.relative_to(top)))


def _entries(folder: Path) -> tuple[set[str], list[Path]]:
    """The names in a folder, and the folders in it; of one that may not be read, none."""
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return set(), []
    inner = [folder / name for name in folders if not name.startswith(".")]
    return {entry.name for entry in entries}, inner


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort 9 before 10, and numbers before names."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]
