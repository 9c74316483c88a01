"""Text files that appear whole or not at all: whoever reads or dies, half a file is never there."""

import contextlib
import os
from pathlib import Path

from launcher.errors import StorageError


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, and rename over the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs do not share it
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}, {error.strerror or error} (hydra.run.dir={path.parent}): "
            "free some space, or choose a folder that can be written"
        ) from error
