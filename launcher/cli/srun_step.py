"""`python -m launcher` as one of several processes of an `srun`: one launcher process for each node.

The first one composes and drives the run; those of other nodes join it. Further processes of a node have
nothing to do. In a job of ours this is `cli.job`'s; here nobody has prepared a folder, and the processes meet
in the cache of the user's home.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.cli.report import exit_status_of, noting, reason_of
from launcher.slurm import ray_nodes
from launcher.slurm.job_folder import note_end, read_ends
from launcher.slurm.meeting import SignsOfLife
from launcher.slurm.step import Step, meeting_folder

_PATIENCE_S = 30.0  # for the other nodes' ends


def take_part(step: Step | None, lead: Callable[[], int]) -> int:
    """Do this process's part of a step, and return its exit status.

    Args:
        step: None: it is alone.
        lead: what the first process does.
    """
    if step is None:
        return lead()
    if step.is_surplus:
        return 0
    meeting = meeting_folder(step, os.environ)
    if not step.leads:
        return join(step, meeting)
    if step.num_tasks > step.num_nodes:
        sys.stderr.write(
            f"launcher: srun has started {step.num_tasks} processes on {step.num_nodes} nodes, and one a "
            f"node is used: srun --ntasks-per-node=1 gives it all GPUs of its node\n"
        )
    if step.num_nodes == 1:
        return lead()
    shutil.rmtree(meeting, ignore_errors=True)
    with SignsOfLife(meeting):
        status = lead()
        note_end(meeting, 0, "done" if status == 0 else "failed", status, "")
    _clear_away(meeting, step.num_nodes)
    return status


def join(step: Step, meeting: Path) -> int:
    """Be the process of a node that is not the first, until that one has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # the first node decides, and may need this one to stop well
    raised: list[BaseException] = []
    status = exit_status_of(noting(raised, lambda: ray_nodes.work(step, meeting) or 0), debug=False)
    reason = reason_of(raised[-1] if raised else None)
    note_end(meeting, step.node, "failed" if status else "done", status, reason)
    return status


def _clear_away(meeting: Path, num_nodes: int) -> None:
    """Remove the folder when the others have seen the end."""
    until_s = time.monotonic() + _PATIENCE_S
    while len(read_ends(meeting)) < num_nodes and time.monotonic() < until_s:
        time.sleep(0.2)
    shutil.rmtree(meeting, ignore_errors=True)
