"""Run in a folder that nobody else works in, and note there how that ended."""

import pathlib
from collections.abc import Callable

from launcher import run_lock
from launcher.cli.report import exit_status_of
from launcher.cli.run_folder import LOG_FILE, storage_errors
from launcher.errors import ConfigError
from launcher.run_state import note_end


def run_held(
    run: Callable[[run_lock.Holder | None], int],
    run_dir: pathlib.Path,
    lock: run_lock.RunLock | None = None,
    *,
    debug: bool,
    again: str | None = None,
    only_plans: bool = False,
    put_back: Callable[[], None] = lambda: None,
) -> int:
    """Hold the folder, run, note the end, let go, and return the exit status.

    Args:
        run: is told who has died in the folder, if somebody has.
        lock: of the folder, if it is held already.
        again: the command with which a run goes on that a signal or Ctrl-C stopped.
        put_back: called after a config error, which promises that nothing is written.
    """

    def held() -> int:
        with storage_errors():
            mine = lock or run_lock.take(run_dir)
        try:
            # What is noted before the folder is held is another run's.
            status = exit_status_of(
                lambda: run(mine.left_by),
                debug=debug,
                log_file=str(run_dir / LOG_FILE),
                again=again,
                note=lambda status, line: note_end(run_dir, status, line, only_plans=only_plans),
            )
            if status == ConfigError.exit_status:
                put_back()
            return status
        finally:
            mine.release()

    return exit_status_of(held, debug=debug)
