"""`python -m launcher.doctor [dir=FOLDER] [only=GROUP,...]`: check this machine, line by line.

Exit status: 0 if nothing failed (warnings may have been printed), else that of the first failing line: 2
the installation, 3 devices, limits, Ray or Slurm, 6 storage, 1 a check that broke. A wrong key or value
is one line on stderr and status 2, and nothing is checked.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.checkup import Checkup
from launcher.doctor.commands import Processes
from launcher.doctor.report import Progress, Report
from launcher.doctor.storage import existing
from launcher.doctor.wiring import GROUPS, Surroundings, checks
from launcher.errors import ConfigError, LauncherError

RUNS = Path("outputs")  # where runs go unless they are told otherwise
INTERRUPTED_STATUS = 130
_CLEANING_S = 5.0  # for a check that was interrupted
_KEYS = {"dir": "dir=<folder>", "only": f"only={','.join(GROUPS)} (or some of them)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asks for."""

    folder: Path
    groups: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Check the machine, print what is found, return the exit status."""
    try:
        settings = parse(arguments)
    except LauncherError as error:
        sys.stderr.write(f"launcher.doctor: {error}\n")
        return error.exit_status
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    processes, checkup = Processes(os.environ), Checkup()
    try:
        return _examine(settings, processes, checkup)
    except KeyboardInterrupt:
        sys.stderr.write("\nlauncher.doctor: stopped by Ctrl-C\n")
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        processes.close()
        checkup.settle(_CLEANING_S)


def parse(arguments: Iterable[str]) -> Settings:
    """Read the command line.

    Raises:
        ConfigError: a key or value is wrong.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value or key not in _KEYS:
            raise ConfigError(f"{argument} is not understood: give {' or '.join(_KEYS.values())}")
        given[key] = value
    groups = tuple(given["only"].split(",")) if "only" in given else GROUPS
    wrong = [group for group in groups if group not in GROUPS]
    if wrong:
        raise ConfigError(f"only={wrong[0]} is no group: choose from {', '.join(GROUPS)}")
    return Settings(folder=_folder(given.get("dir")), groups=groups)


def _folder(given: str | None) -> Path:
    try:
        folder = existing(RUNS) if given is None else Path(given).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # the working folder was removed; ~ is nobody's
        raise ConfigError(
            f"dir={given or RUNS} cannot be found ({error}): give dir=<folder>"
        ) from error
    if not folder.is_dir():
        raise ConfigError(f"dir={given} is no folder: make it, or give one that exists")
    return folder


def _examine(settings: Settings, processes: Processes, checkup: Checkup) -> int:
    around = Surroundings(environment=os.environ, run=processes.run, folder=settings.folder)
    chosen = [check for check in checks(around) if check.group in settings.groups]
    sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be any bytes
    report, start = Report(sys.stdout), time.perf_counter()
    report.print_all(checkup.run(chosen, Progress()))
    report.print_sum(time.perf_counter() - start)
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
