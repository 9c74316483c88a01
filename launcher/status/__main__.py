"""`python -m launcher.status DIR`: how the run in a folder stands, or the runs of a sweep.

Of several runs it writes DIR/comparison.csv and DIR/comparison.svg. Exit status: 0; 2 if there is no
run, or a file is damaged (one line on stderr for each); 6 if the comparison cannot be written.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import ConfigError, LauncherError
from launcher.status.report import report

INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str]) -> int:
    """Print the table and return the exit status."""
    try:
        return _print(folder(arguments))
    except LauncherError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def folder(arguments: Sequence[str]) -> Path:
    """Read the command line.

    Raises:
        ConfigError: it does not name one folder.
    """
    if len(arguments) != 1 or not arguments[0] or "\0" in arguments[0]:
        given = " ".join(arguments) or "nothing"
        raise ConfigError(f"{given!r} is not one folder: give that of a run or of a sweep")
    return Path(arguments[0])


def _print(top: Path) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be any bytes
    found = report(top)
    for line in found.lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    statuses = [_fail(error) for error in found.errors]
    return statuses[0] if statuses else 0


def _fail(error: LauncherError) -> int:
    sys.stderr.write(f"launcher.status: {' '.join(str(error).split())}\n")
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
