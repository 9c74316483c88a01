"""What a job leaves in its run's folder, for the batch script, for later submissions and for people.

    job.json            job id, when and from where it was submitted
    slurm/              batch script and output, one file for each node (submitit's names)
    slurm/code/         the code that it runs; of a sweep it lies beside the points
    slurm/ends/         rank-0.done | .stopped | .lost | .failed, of the last start

The process of a node notes how it ended before it exits, so that a failure on any node has its reason, and
the batch script can tell a process that ended from one that died. The files are plain text for bash to read:
the exit status on the first line, the reason on the second.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

JOB_NAME, FOLDER_NAME = "job.json", "slurm"
ENDS_NAME, CODE_NAME, STOPS_NAME = "ends", "code", "stops.json"
_LARGEST_BYTES = 2**20

End = Literal["done", "stopped", "lost", "failed"]
ENDS = get_args(End)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How the process of one node ended; `rank` is None for what the batch script says of the job."""

    rank: int | None
    end: End
    exit_status: int
    reason: str


def slurm_folder(run_dir: Path) -> Path:
    """Where the batch script and the output are."""
    return run_dir / FOLDER_NAME


def ends_folder(run_dir: Path) -> Path:
    """Where each process notes how it ended."""
    return slurm_folder(run_dir) / ENDS_NAME


def log_file(run_dir: Path, job_id: str, rank: int = 0) -> Path:
    """The output of the process of a node; that of the first has the batch script's too."""
    return slurm_folder(run_dir) / f"{job_id}_{rank}_log.out"


def note_end(folder: Path, rank: int, end: End, exit_status: int, reason: str) -> None:
    """Note in a folder of ends how the process of a node ends."""
    folder.mkdir(parents=True, exist_ok=True)
    line = " ".join(reason.split())
    _write_whole(folder / f"rank-{rank}.{end}", f"{exit_status}\n{line}\n")


def read_ends(folder: Path) -> tuple[RankEnd, ...]:
    """How the processes of the last start ended, the first to end first, from a folder of ends."""
    found = []
    for path in folder.glob("*.*"):
        name, _, end = path.name.partition(".")
        rank = name.removeprefix("rank-")
        if end not in ENDS or not (rank.isdigit() or name == "job"):
            continue
        with contextlib.suppress(OSError, ValueError, UnicodeDecodeError):
            status, _, reason = path.read_text().partition("\n")
            one = RankEnd(
                rank=int(rank) if rank.isdigit() else None,
                end=end,
                exit_status=int(status),
                reason=reason.strip(),
            )
            found.append((path.stat().st_mtime_ns, one))
    return tuple(one for _, one in sorted(found, key=lambda pair: pair[0]))


def forget_ends(run_dir: Path) -> None:
    """Remove what the last start has noted."""
    for path in ends_folder(run_dir).glob("*.*"):
        path.unlink(missing_ok=True)


def failure(run_dir: Path) -> RankEnd | None:
    """The first failure of the last start."""
    return next((one for one in read_ends(ends_folder(run_dir)) if one.end == "failed"), None)


def is_done(run_dir: Path) -> bool:
    """Whether the job's run is finished: the first process says so, and no other one failed."""
    ends = read_ends(ends_folder(run_dir))
    first = any(one.rank == 0 and one.end == "done" for one in ends)
    return first and not any(one.end == "failed" for one in ends)


def write_job(run_dir: Path, job_id: str, **facts: object) -> None:
    """Note the job of a run."""
    job = {"job_id": job_id, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
    _write_whole(run_dir / JOB_NAME, json.dumps(job, indent=2) + "\n")


def read_job(run_dir: Path) -> Mapping[str, object] | None:
    """What is noted of the job of a run; None if there is none."""
    path = run_dir / JOB_NAME
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            return None
        job = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return job if isinstance(job, dict) and isinstance(job.get("job_id"), str) else None


def has_job(run_dir: Path) -> bool:
    """Whether the run was submitted."""
    return read_job(run_dir) is not None


def without_progress(run_dir: Path, step: int) -> int:
    """Note that a start was told to stop after `step`; return how many have stopped there in a row."""
    path = slurm_folder(run_dir) / STOPS_NAME
    try:
        before = json.loads(path.read_text())
        times = before["times"] + 1 if before["step"] == step else 1
    except (OSError, ValueError, KeyError, TypeError):
        times = 1
    _write_whole(path, json.dumps({"step": step, "times": times}))
    return times


def _write_whole(path: Path, text: str) -> None:
    """Write a file that readers see whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
