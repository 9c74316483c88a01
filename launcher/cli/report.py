"""How a run ends: the exit status, and the one line that says why.

The statuses are those of `launcher.errors`; 1 is a bug of ours, with its traceback; 130 is
Ctrl-C, and 75 a scheduler's signal.
"""

import errno
import sys
import traceback
from collections.abc import Callable

from launcher.errors import LauncherError, StoppedBySignal, StorageError
from launcher.run_state import TO_GO_ON
from launcher.secrets import redacted

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: Hydra raises, instead of printing and exiting with 1
BUG_STATUS = 1
INTERRUPTED_STATUS = 130
STORAGE_ERRNOS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


# A line is to be read: a value that goes on for longer shows its begin and its end.
_LONGEST_WORD, _LONGEST_LINE = 240, 960
_SHOWN_BEGIN, _SHOWN_END = 2 / 3, 1 / 6


def one_line(text: str) -> str:
    """Make a message one line of a readable length, whatever its values hold.

    Control characters, and those that turn the direction of writing, are shown by their code.
    """
    words = (_shortened(word, _LONGEST_WORD) for word in map(_printable, redacted(text).split()))
    return _shortened(" ".join(words), _LONGEST_LINE)


def _printable(word: str) -> str:
    if word.isprintable():
        return word
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in word
    )


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    begin, end = text[: int(_SHOWN_BEGIN * longest)], text[-int(_SHOWN_END * longest) :]
    return f"{begin}...({len(text) - len(begin) - len(end)} more characters)...{end}"


def exit_status_of(
    action: Callable[[], int],
    *,
    debug: bool,
    log_file: str | None = None,
    again: str | None = None,
    note: Callable[[int, str | None], None] = lambda status, line: None,
) -> int:
    """Run `action`; turn what it raises into one line on stderr and an exit status.

    Args:
        again: the command with which a run goes on that a signal or Ctrl-C stopped.
        note: is told the status and the line, if there is one.
    """
    try:
        status, line = action(), None
    except LauncherError as error:
        status, line = _failure(error, debug=debug)
    except OSError as error:
        status, line = _failed_file(error, debug=debug, log_file=log_file)
    except StoppedBySignal as stop:
        status, line = stop.exit_status, f"stopped by {stop}{_way_on(again)}"
    except KeyboardInterrupt:
        status, line = INTERRUPTED_STATUS, f"stopped by Ctrl-C{_way_on(again)}"
    except Exception:  # whatever it is, the user learns where to report it
        status, line = _bug(log_file)
    note(status, line)
    if line is not None:
        sys.stderr.write(f"launcher: {line}\n")
    return status


def _way_on(again: str | None) -> str:
    return f"{TO_GO_ON}{again}" if again else ""


def noting(raised: list[BaseException], action: Callable[[], int]) -> Callable[[], int]:
    """Return the action, which appends what it raises to `raised`."""

    def noted() -> int:
        try:
            return action()
        except BaseException as error:
            raised.append(error)
            raise

    return noted


def reason_of(error: BaseException | None) -> str:
    """What ended a run, as one line; nothing for one that ended well."""
    return (one_line(str(error)) or type(error).__name__) if error else ""


def _failure(error: LauncherError, *, debug: bool) -> tuple[int, str]:
    if debug:
        sys.stderr.write(redacted("".join(traceback.format_exception(error))))
    return error.exit_status, one_line(str(error))


def _failed_file(error: OSError, *, debug: bool, log_file: str | None) -> tuple[int, str]:
    if error.errno not in STORAGE_ERRNOS:
        return _bug(log_file)
    cure = "free some space, or take another hydra.run.dir"
    return _failure(StorageError(f"{error}: {cure}"), debug=debug)


def _bug(log_file: str | None) -> tuple[int, str]:
    sys.stderr.write(redacted(traceback.format_exc()))
    attachment = f", with the lines above and {log_file}" if log_file else ", with the lines above"
    return BUG_STATUS, f"this is a bug of ours: please report it{attachment}"
