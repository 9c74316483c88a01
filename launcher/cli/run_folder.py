"""The run's folder: what the command line writes there, and how that is taken back.

A config error promises that nothing is written. Most are found before there is a folder; some
only when the plan meets the model, the cluster, or the checkpoint of the run that has the folder.
Then what this run made is removed again: only files that were written here, only folders that
were not there before, and only when they are empty, since other runs may have started beside this
one. In a folder that was there, these files are again what they were.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from launcher.errors import StorageError
from launcher.run_state import STATE_NAME

CONFIG_FILE = "config.yaml"
LOG_FILE = "launcher.log"
# A text that Hydra reads as it stands. The slash matters: without one it may be a number or `null`.
_PLAIN_PATH = re.compile(r"(?=.*/)[A-Za-z0-9_/.-]+", re.ASCII)
HYDRA_FILES = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what fails where the run's folder or a file of it is made into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error}: take another hydra.run.dir=<folder>") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderBefore:
    """A run's folder before the run.

    Attributes:
        missing: The folders that will be made, the innermost first; none if it is there.
        files: Of one that is there and that this run holds: what is in the files that it will write.
        log_bytes: How long the log there is.
    """

    missing: tuple[pathlib.Path, ...] = ()
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    log_bytes: int = 0


def missing_folders(run_dir: pathlib.Path) -> FolderBefore:
    """A folder that nobody holds, since it is not there, or may be somebody's."""
    return FolderBefore(
        missing=tuple(folder for folder in (run_dir, *run_dir.parents) if not folder.exists())
    )


def remembered(run_dir: pathlib.Path) -> FolderBefore:
    """A folder that is there, and that this process holds."""
    files = {
        name: path.read_bytes() if (path := run_dir / name).is_file() else None
        for name in (CONFIG_FILE, STATE_NAME, *HYDRA_FILES)
    }
    log = run_dir / LOG_FILE
    return FolderBefore(files=files, log_bytes=log.stat().st_size if log.is_file() else 0)


def take_back(run_dir: pathlib.Path, before: FolderBefore) -> None:
    """Remove what this run wrote, unless its folder was there before.

    The missing folders were found for a moment earlier, whose name may have another time in it; the run's own
    folder is the first of them in any case.
    """
    if not before.missing:
        return
    for name in (CONFIG_FILE, LOG_FILE, STATE_NAME, *HYDRA_FILES):
        (run_dir / name).unlink(missing_ok=True)
    _remove_empty(run_dir / ".hydra", run_dir, *before.missing[1:])


def put_back(run_dir: pathlib.Path, before: FolderBefore) -> None:
    """Make a folder that was there what it was, while it is held."""
    for name, content in before.files.items():
        if content is None:
            (run_dir / name).unlink(missing_ok=True)
        else:
            (run_dir / name).write_bytes(content)
    if before.files:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(run_dir / LOG_FILE, before.log_bytes)
            if not before.log_bytes:
                (run_dir / LOG_FILE).unlink()
        _remove_empty(run_dir / ".hydra")


def _remove_empty(*folders: pathlib.Path) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty, or not there: it is not ours alone
            continue


def run_dir_override(run_dir: pathlib.Path) -> str:
    """The override that makes this the run's folder, in Hydra's quoting."""
    return override("hydra.run.dir", str(run_dir))


def sweep_dir_override(sweep_dir: pathlib.Path) -> str:
    """The override that makes this the folder of a sweep."""
    return override("hydra.sweep.dir", str(sweep_dir))


def override(key: str, text: str) -> str:
    """An override with any text as its value, in Hydra's quoting where it needs that."""
    if _PLAIN_PATH.fullmatch(text):
        return f"{key}={text}"
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"
