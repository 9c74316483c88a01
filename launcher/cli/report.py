"""How a run ends: the exit status, and the one line that says why.

The statuses are those of `launcher.errors`; 1 is a bug of ours, with its traceback; 130 is
Ctrl-C, and 75 a scheduler's signal.
"""

import errno
import sys
import traceback
from collections.abc import Callable

from launcher.errors import LauncherError, StoppedBySignal, StorageError
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
    action: Callable[[], int], *, debug: bool, log_file: str | None = None, again: str | None = None
) -> int:
    """Run `action`; turn what it raises into one line on stderr and an exit status.

    Args:
        again: the command with which a run that a signal stopped goes on.
    """
    try:
        return action()
    except LauncherError as error:
        return _fail(error, debug=debug)
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            return _fail_with_bug(log_file)
        return _fail(
            StorageError(f"{error}: free some space, or take another hydra.run.dir"), debug=debug
        )
    except StoppedBySignal as stop:
        cure = f"; to go on: {again}" if again else ""
        sys.stderr.write(f"launcher: stopped by {stop}{cure}\n")
        return stop.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("launcher: stopped by Ctrl-C\n")
        return INTERRUPTED_STATUS
    except Exception:  # whatever it is, the user learns where to report it
        return _fail_with_bug(log_file)


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


def _fail(error: LauncherError, *, debug: bool) -> int:
    if debug:
        sys.stderr.write(redacted("".join(traceback.format_exception(error))))
    sys.stderr.write(f"launcher: {one_line(str(error))}\n")
    return error.exit_status


def _fail_with_bug(log_file: str | None) -> int:
    sys.stderr.write(redacted(traceback.format_exc()))
    attachment = f", with the lines above and {log_file}" if log_file else ", with the lines above"
    sys.stderr.write(f"launcher: this is a bug of ours: please report it{attachment}\n")
    return BUG_STATUS
