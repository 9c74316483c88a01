"""The run's folder: what the command line writes there, and how that is taken back.

A config error promises that nothing is written. Most are found before there is a folder; some
only when the plan meets the model or the cluster. Then what this run made is removed again: only
files that were written here, only folders that were not there before, and only when they are
empty, since other runs may have started beside this one.
"""

import contextlib
import pathlib
from collections.abc import Iterator

from launcher.errors import StorageError
from launcher.run_state import STATE_NAME

CONFIG_FILE = "config.yaml"
LOG_FILE = "launcher.log"
HYDRA_FILES = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what fails where the run's folder or a file of it is made into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error}: take another hydra.run.dir=<folder>") from error


def missing_folders(run_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Return what making this folder will create, the innermost first; nothing if it is there."""
    return tuple(folder for folder in (run_dir, *run_dir.parents) if not folder.exists())


def take_back(run_dir: pathlib.Path, missing: tuple[pathlib.Path, ...]) -> None:
    """Remove what this run wrote, unless its folder was there before.

    `missing` was found for the folder of a moment earlier, whose name may have another time in it;
    the run's own folder is the first of them in any case.
    """
    if not missing:
        return
    for name in (CONFIG_FILE, LOG_FILE, STATE_NAME, *HYDRA_FILES):
        (run_dir / name).unlink(missing_ok=True)
    for folder in (run_dir / ".hydra", run_dir, *missing[1:]):
        try:
            folder.rmdir()
        except OSError:  # not empty, or not there: it is not ours alone
            continue


def run_dir_override(run_dir: pathlib.Path) -> str:
    """The override that makes this the run's folder, in Hydra's quoting."""
    return override("hydra.run.dir", str(run_dir))


def override(key: str, text: str) -> str:
    """An override with any text as its value, in Hydra's quoting."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"
