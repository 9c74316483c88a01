"""What a check finds: one line, and for a warning or a failure what it means and what to do."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check went, in the word that is printed."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    ABSENT = "not here"  # a part that this machine lacks, and that not every run needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; `meaning` and `cure` are of warnings and failures."""

    status: Status
    what: str
    meaning: str = ""
    cure: str = ""
    is_crash: bool = False  # the check itself broke, whatever it was to look at


def ok(what: str) -> Finding:
    """Something is as it should be."""
    return Finding(status=Status.OK, what=what)


def absent(what: str) -> Finding:
    """Something is not here, and need not be."""
    return Finding(status=Status.ABSENT, what=what)


def warning(what: str, meaning: str, cure: str) -> Finding:
    """Runs work, but less well than they might, or not all of them."""
    return Finding(status=Status.WARNING, what=what, meaning=meaning, cure=cure)


def failed(what: str, meaning: str, cure: str) -> Finding:
    """Runs that need this will not work."""
    return Finding(status=Status.FAILED, what=what, meaning=meaning, cure=cure)
