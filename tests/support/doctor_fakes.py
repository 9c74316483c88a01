"""What the doctor's checks are given in tests: commands that answer from a table."""

import json
from collections.abc import Mapping, Sequence

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, Status

HANGS = Outcome(status=None)


def says(stdout: str = "", *, status: int = 0, stderr: str = "") -> Outcome:
    """How a command ends that prints something."""
    return Outcome(status=status, stdout=stdout, stderr=stderr)


def answers(table: Mapping[str, Outcome]) -> Runner:
    """A runner: the first key of the table that is in the command line decides; else no such command."""

    def run(command: Sequence[str], limit_s: float, environment: Mapping[str, str]):
        line = " ".join(command)
        return next((outcome for sign, outcome in table.items() if sign in line), None)

    return run


def devices(**changes: object) -> Outcome:
    """What the probe of the devices prints."""
    found = {
        "platform": "cpu",
        "kind": "cpu",
        "count": 1,
        "memory_bytes": None,
        "wrong": [],
        "sum": 1,
        "compute_s": 0.1,
    }
    return says(f"a line of a library\n{json.dumps(found | changes)}\n")


def only(findings) -> Finding:
    """The single finding of a check."""
    (finding,) = findings
    return finding


def statuses(findings) -> list[Status]:
    """How each line of a check went."""
    return [finding.status for finding in findings]
