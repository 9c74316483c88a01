"""Where log lines go: the terminal, and a file in the run's folder.

Our own lines from INFO on, those of other packages from WARNING on (`hydra.verbose=true`: all of
them). The terminal's form reads well in a job's output file too: a clock and a sentence, no
colours. Errors are left to `cli.report`, which writes one line to stderr; the file has their
tracebacks.
"""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import TextIO

from launcher.secrets import redacted

CONSOLE_FORMAT = "[%(asctime)s] %(message)s"
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Formatter(logging.Formatter):
    """Writes a record without the secrets of the environment, a traceback's included."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        return redacted(super().format(record))


class ConsoleHandler(logging.StreamHandler):
    """Write to what is standard output at that moment: a live display replaces it for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(Formatter(CONSOLE_FORMAT, datefmt="%H:%M:%S"))
        self.addFilter(lambda record: record.levelno < logging.ERROR)

    @property
    def stream(self) -> TextIO:
        """The standard output."""
        return sys.stdout


@contextlib.contextmanager
def logging_to(path: pathlib.Path) -> Iterator[None]:
    """Log to the terminal and to the file `path` inside the context, and nowhere else."""
    root, ours = logging.getLogger(), logging.getLogger("launcher")
    before = (root.handlers[:], root.level, ours.level)  # Hydra's: it would print every line twice
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(Formatter(FILE_FORMAT))
    root.handlers[:] = (ConsoleHandler(), file)
    if root.level > logging.DEBUG:
        root.setLevel(logging.WARNING)
        ours.setLevel(ours.level or logging.INFO)
    try:
        yield
    finally:
        file.close()
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])
