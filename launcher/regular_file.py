"""Open a file to read it, and nothing else: opening a pipe would wait for a writer, for ever, and a
device such as /dev/zero has no end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading bytes.

    Raises:
        OSError: it cannot be opened, or is no regular file; also for a path that no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character, or a lone surrogate
        raise OSError(errno.EINVAL, "No file can have this name", repr(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "It is a pipe, a socket or a device, and no file", str(path))


def read_regular(path: Path, largest_bytes: int) -> bytes | None:
    """Read a file that is to be small; None if it has more bytes than that. Raises as `open_regular`."""
    with open_regular(path) as file:
        data = file.read(largest_bytes + 1)
    return data if len(data) <= largest_bytes else None
