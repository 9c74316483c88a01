"""Standard output and error for a process that goes on when whoever reads them has gone.

`python -m launcher ... | head` closes the pipe while a run goes on: what is written after that is lost,
silently, and the run ends with its own status. A command that only prints has no more to do then, and
ends instead (`status`, `doctor`).
"""

import errno
import io
import os
import sys

# A pipe without a reader; a terminal that has been closed.
_READER_HAS_GONE = (errno.EPIPE, errno.EIO)


class _Lenient(io.FileIO):
    """A descriptor that leads nowhere once nobody reads it; what has been buffered above is lost too."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_HAS_GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for libraries too that write by themselves
        os.close(nowhere)
        return super().write(data)


def outlive_readers() -> None:
    """Let this process go on when the reader of its standard output or error goes."""
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)


def _lenient(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    if stream is None:  # the process was started without it
        return open(os.devnull, "w")
    stream.flush()
    # Not closed with its wrapper: the original has the same descriptor.
    raw = _Lenient(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # raw: as `python -u` wants it
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
