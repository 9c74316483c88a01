"""What Slurm says of jobs: those in its queue, and nothing of any other.

A job that has ended leaves the queue after some minutes; what became of it is in the run's folder.
"""

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_LIMIT_S = 15.0  # Slurm itself tries for nine seconds
_QUERY = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r")
_FORGOTTEN = "Invalid job id"  # what it says where the only job that is asked for has left
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "PREEMPTED", "REVOKED")  # fmt: skip
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job in the queue: Slurm's word for its state, and why it is in it."""

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        """Whether it will start."""
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in _OVER


def ask(command: tuple[str, ...]) -> str | None:
    """Return what squeue prints; None if it fails, hangs or is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    answers = done.returncode == 0 or _FORGOTTEN in done.stderr
    return done.stdout if answers else None


def find_jobs(
    job_ids: Iterable[str], ask: Callable[[tuple[str, ...]], str | None] = ask
) -> Mapping[str, Job] | None:
    """Look jobs up in the queue; None if Slurm does not answer.

    A job of an array is `123_4`. What is no such number is in no queue.
    """
    wanted = {job_id for job_id in job_ids if re.fullmatch(r"[0-9]+(_[0-9]+)?", job_id)}
    if not wanted:
        return {}
    told = ask((*_QUERY, f"--jobs={','.join(sorted(wanted))}"))
    if told is None:
        return None
    found = {}
    for line in told.splitlines():
        job_id, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        if job_id in wanted:
            found[job_id] = Job(state=state, reason=reason)
    return found
