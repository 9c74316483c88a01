"""How a run stands, worked out from its files and from the queue.

A run notes what it begins and how it ends, and holds its folder until then. So the note of a phase in
a folder that nobody holds is of a run that has died, unless its job waits to be started again.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from launcher.run_state import End, Phase
from launcher.runtime.records.metrics import WARM_UP_STEPS
from launcher.runtime.records.progress_text import duration
from launcher.status.queue import Job
from launcher.status.run_files import RunFiles, number, text

# What stands in the table beside the words of `run_state`.
QUEUED, DIED, NOT_BEGUN, GONE = "queued", "died", "not begun", "gone"
_OTHERS = {"stopped": "run it again", "interrupted": "by Ctrl-C"}
UNITS = ("tokens", "samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One line of the table.

    Attributes:
        detail: What there is to say beside the state; None: nothing.
        unit: Of `per_s`: tokens or samples.
        compares: Whether measured and predicted times are of the same devices; None: not known yet.
    """

    folder: Path
    state: str
    detail: str | None
    exit_status: int | None
    mode: str | None
    step: int
    steps: int | None
    loss: float | None
    best_loss: float | None
    eval_loss: float | None
    per_s: float | None
    unit: str | None
    mfu: float | None
    measured_step_s: float | None
    predicted_step_s: float | None
    measured_over_predicted: float | None
    log: Path
    job: str | None

    @property
    def has_ended_well(self) -> bool:
        """Whether it did what it was asked for."""
        return self.state in ("done", "planned")


def standing(files: RunFiles, jobs: Mapping[str, Job] | None) -> Standing:
    """Say how a run stands; `jobs` is the queue, None if that cannot be asked."""
    row, summary = (files.rows[-1] if files.rows else {}), files.summary
    state, detail = _state(files, jobs)
    # A summary is of the end before, once the run goes on.
    ended = state in get_args(End)
    measured_s = number(summary, "measured_step_s") if ended else None
    unit, per_s = _throughput(summary if ended else {}, row)
    steps = number(files.config, "train", "steps")
    evaluated = number(files.eval_row, "eval_loss")
    only_plans = text(files.config, "mode") == "plan"
    return Standing(
        folder=files.folder,
        state=state,
        detail=detail,
        exit_status=int(number(files.state, "exit_status") or 0) if ended else None,
        mode=text(files.config, "mode"),
        step=int(number(row, "step") or (number(summary, "steps") if ended else 0) or 0),
        steps=None if steps is None or only_plans else int(steps),
        loss=number(row, "loss"),
        best_loss=number(summary, "best_loss") if ended else None,
        eval_loss=evaluated,
        per_s=per_s,
        unit=unit,
        mfu=number(summary, "measured_mfu") if ended else number(row, "mfu"),
        measured_step_s=_median_step_s(files) if measured_s is None else measured_s,
        predicted_step_s=(
            number(files.plan, "predicted", "step_s") or number(summary, "predicted_step_s")
        ),
        measured_over_predicted=(
            number(summary, "measured_over_predicted_step_s") if ended else None
        ),
        log=files.log,
        job=job_id(files),
    )


def job_id(files: RunFiles) -> str | None:
    """The number of the job that a run was submitted as; None if it was not."""
    found = files.job.get("job_id")
    return str(found) if isinstance(found, str | int) else None


def _state(files: RunFiles, jobs: Mapping[str, Job] | None) -> tuple[str, str | None]:
    noted, reason = text(files.state, "state"), text(files.state, "reason")
    job = (jobs or {}).get(job_id(files) or "")
    if files.is_held:
        phase = noted if noted in get_args(Phase) else "starting"
        return phase, f"by {files.holder}" if files.holder else None
    if job is not None and not job.is_over:
        return _in_queue(files, job)
    if noted in get_args(End):
        return noted, reason or _OTHERS.get(noted)
    if noted in get_args(Phase):
        return DIED, _last_sign(files, noted, job)
    return _not_noted(files, jobs, job)


def _in_queue(files: RunFiles, job: Job) -> tuple[str, str | None]:
    where = f"job {job_id(files)}: {job.state}"
    if job.waits:
        return QUEUED, f"{where} ({job.reason})"
    noted = text(files.state, "state")
    # On a host whose locks are not seen here, or between two lines of a script.
    return (noted if noted in (*get_args(Phase), "done", "planned") else "starting"), where


def _last_sign(files: RunFiles, phase: str, job: Job | None) -> str:
    since_s = number(files.state, "since_s") or 0.0
    until_s = max(since_s, number(files.goodput, "until_s") or 0.0)
    when = f"last sign of life {duration(max(time.time() - until_s, 0.0))} ago"
    how = f"job {job_id(files)}: {job.state}" if job else "its process is gone"
    return f"while {phase}, {when}; {how}: run it again"


def _not_noted(
    files: RunFiles, jobs: Mapping[str, Job] | None, job: Job | None
) -> tuple[str, str | None]:
    status = text(files.summary, "status")
    if status in get_args(End):  # of a version that noted nothing
        return status, _OTHERS.get(status)
    submitted = job_id(files)
    if submitted is None:
        return NOT_BEGUN, None
    if job is not None:
        return GONE, f"job {submitted}: {job.state}, before the run began"
    if jobs is None:
        return NOT_BEGUN, f"job {submitted}; squeue does not answer here"
    return GONE, f"job {submitted} is no longer in the queue, and the run has not begun"


def _throughput(summary: Mapping[str, object], row: Mapping[str, object]):
    for unit in UNITS:
        for tree, name in ((summary, f"measured_{unit}_per_s"), (row, f"{unit}_per_s")):
            value = number(tree, name)
            if value is not None:
                return unit, value
    return None, None


def _median_step_s(files: RunFiles) -> float | None:
    times = [number(row, "step_s") for row in files.rows if row["step"] > WARM_UP_STEPS]
    known = [value for value in times if value is not None]
    return statistics.median(known) if known else None
