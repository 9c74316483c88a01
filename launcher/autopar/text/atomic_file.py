"""Text files that appear whole or not at all: whoever reads or dies, half a file is never there.

A file is written under a temporary name in the same folder and renamed over the old one.
"""

import contextlib
import os
import shutil
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from launcher.errors import StorageError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there in full, or the old one still is."""
    data = text.encode()
    # The process id keeps two runs apart that were given the same folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error, needed_bytes=len(data)) from error


def storage_error(path: Path, error: OSError, needed_bytes: int) -> StorageError:
    """Say which file could not be written, why, and what to do about it."""
    why = error.strerror or str(error)
    cure = "set hydra.run.dir to a folder that can be written"
    if error.errno in (ENOSPC, EDQUOT, EFBIG):
        why += f"; {needed_bytes} bytes needed, {_free_bytes(path.parent)} free"
        cure = "free some space there, or set hydra.run.dir to a folder on another disk"
    return StorageError(f"cannot write {path} ({why}); hydra.run.dir={path.parent}: {cure}")


def _free_bytes(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return "an unknown number"
