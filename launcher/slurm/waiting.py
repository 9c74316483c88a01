"""The table of jobs, and waiting for them.

Waiting only looks: the jobs go on whatever becomes of who waits.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.errors import ClusterError, LauncherError, StoppedBySignal
from launcher.slurm.commands import last_state, states_of_jobs
from launcher.slurm.job_folder import failure, is_done, log_file
from launcher.slurm.submission import DONE, Job

POLL_S = 5.0


def table(jobs: Sequence[Job]) -> str:
    """The jobs, one a line, with the overrides that not all of them have."""
    head = ("job", "state", "run directory", "overrides")
    shared = set.intersection(*(set(job.run.overrides) for job in jobs))
    rows = []
    for job in jobs:
        own = (text for text in job.run.overrides if text not in shared)
        rows.append((job.job_id, job.state, _short(job.run.run_dir), " ".join(own)))
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    return "\n".join(
        "  ".join((*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3])).rstrip()
        for row in (head, *rows)
    )  # fmt: skip


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def wait(
    jobs: Sequence[Job], say: Callable[[str], None], *, poll_s: float = POLL_S
) -> dict[str, int]:
    """Wait until no job is left in the queue; return the exit status of each, and say what changes."""
    open_jobs = {job.job_id: job for job in jobs if job.state != DONE}
    ends = {job.job_id: 0 for job in jobs if job.state == DONE}
    before = {job.job_id: "pending" if job.is_new else job.state for job in jobs}
    while open_jobs:
        states = states_of_jobs()
        for job_id in list(open_jobs):
            state = states.get(job_id)
            if state is None:
                ends[job_id] = _end(open_jobs.pop(job_id), say)
            elif state != before[job_id]:
                before[job_id] = state
                say(f"job {job_id} is {state}")
        if open_jobs:
            time.sleep(poll_s)
    return ends


def _end(job: Job, say: Callable[[str], None]) -> int:
    """How a job that has left the queue ended."""
    run_dir, log = job.run.run_dir, _short(log_file(job.run.run_dir, job.job_id))
    if is_done(run_dir):
        say(f"job {job.job_id} is done")
        return 0
    failed = failure(run_dir)
    if failed is not None:
        where = "" if failed.rank is None else f" on its node {failed.rank}"
        say(
            f"job {job.job_id} failed{where}: {failed.reason} (exit status {failed.exit_status}): see {log}"
        )
        return failed.exit_status or LauncherError.exit_status
    state = last_state(job.job_id) or "gone"
    say(f"job {job.job_id} has left the queue without an end ({state}): see {log}")
    stopped = "cancelled" in state
    return StoppedBySignal.exit_status if stopped else ClusterError.exit_status


def still_there(jobs: Sequence[Job]) -> str:
    """What to say to who stops waiting: the jobs go on."""
    states = states_of_jobs()
    there = [job.job_id for job in jobs if job.job_id in states]
    if not there:
        return "no job is left in the queue"
    return (
        f"{', '.join(f'job {job_id} ({states[job_id]})' for job_id in there)}: going on without this "
        f"command; end with: scancel {' '.join(there)}"
    )
