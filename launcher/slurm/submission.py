"""Submit runs as jobs: all of them are asked about before the first is submitted.

A run whose job is done, waits or is at work is left alone, so that a sweep that was cut short can be
submitted again as it was. One that is submitted again goes on from its newest checkpoint.
"""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError, ConfigError
from launcher.slurm.batch_script import JobPlace, batch_command, batch_script, make_executor
from launcher.slurm.code_copy import copy_code
from launcher.slurm.commands import need_slurm, refused, states_of_jobs, test_request
from launcher.slurm.frozen_run import check_same_run, goes_further
from launcher.slurm.job_folder import (
    CODE_NAME,
    forget_ends,
    is_done,
    read_job,
    slurm_folder,
    write_job,
)
from launcher.slurm.job_request import JobRequest

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is to become a job.

    Attributes:
        name: What Slurm shows.
        overrides: What tells it from other runs, for people.
        config_text: The composed config, as the job will read it.
        target: Its `model.target`, whose code is copied too.
    """

    name: str
    run_dir: Path
    overrides: tuple[str, ...]
    config_text: str
    request: JobRequest
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run and its job; `state` says whether it was submitted now, or why not."""

    run: Run
    job_id: str
    state: str

    @property
    def is_new(self) -> bool:
        """Whether it was submitted now."""
        return self.state == SUBMITTED


SUBMITTED, DONE = "submitted", "done"


def left_alone(runs: Sequence[Run]) -> Mapping[Path, Job]:
    """Which runs need no job: done, waiting, or at work. Checks that the others' folders are theirs."""
    known = {run.run_dir: job for run in runs if (job := read_job(run.run_dir)) is not None}
    states = states_of_jobs() if known else {}
    found = {}
    _check_apart(runs)
    for run in runs:
        _check_path(run.run_dir)
        check_same_run(run.run_dir / CONFIG_NAME, run.config_text)
        job_id = str(known[run.run_dir]["job_id"]) if run.run_dir in known else None
        if job_id in states:
            found[run.run_dir] = Job(run=run, job_id=job_id, state=states[job_id])
        elif job_id and is_done(run.run_dir) and not _has_more(run):
            found[run.run_dir] = Job(run=run, job_id=job_id, state=DONE)
    return found


def _check_apart(runs: Sequence[Run]) -> None:
    folders = [run.run_dir for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(
                f"{folders.count(folder)} points of the sweep have the folder {folder}: give each its own, "
                f"such as hydra.sweep.subdir='${{hydra.job.num}}'"
            )


def _check_path(run_dir: Path) -> None:
    """Slurm replaces what follows a % in the names of output files."""
    if "%" in str(run_dir):
        raise ConfigError(
            f"{run_dir} has a %, which Slurm takes for a sign of its own: take another folder "
            f"(hydra.sweep.dir, hydra.run.dir)"
        )


def _has_more(run: Run) -> bool:
    return goes_further(run.run_dir / CONFIG_NAME, run.config_text)


def submit(runs: Sequence[Run], top: Path, folder: Path) -> Iterator[Job]:
    """Submit those that need it, one by one; yield the jobs of all.

    Args:
        top: of the sweep, or of the run, in which the copy of the code lies.
        folder: the working folder of the jobs.

    Raises:
        ConfigError, ClusterError: before anything is written or submitted, but for what Slurm says only then.
    """
    need_slurm()
    kept = left_alone(runs)
    code = slurm_folder(top) / f"{CODE_NAME}-{time.strftime('%Y%m%d-%H%M%S')}"
    places = {run.run_dir: _place(run, code, folder) for run in runs}
    new = [run for run in runs if run.run_dir not in kept]
    asked = set()
    for run in new:
        script = batch_script(run.request, places[run.run_dir])
        head = _head(script)
        if head not in asked:
            test_request(script, run.request)
        asked.add(head)
    if new:
        copy_code(code, {run.target for run in new if run.target})
    for run in runs:
        yield kept.get(run.run_dir) or _submit_one(run, places[run.run_dir])


def scripts(runs: Sequence[Run], top: Path, folder: Path) -> Iterator[str]:
    """The batch scripts, without Slurm and without writing."""
    code = slurm_folder(top) / CODE_NAME
    return (batch_script(run.request, _place(run, code, folder)) for run in runs)


def _place(run: Run, code: Path, folder: Path) -> JobPlace:
    return JobPlace(name=run.name, run_dir=run.run_dir, code=code, folder=folder)


def _head(script: str) -> tuple[str, ...]:
    """What of a script Slurm decides by."""
    own = ("--job-name", "--output")
    lines = (line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH " in line)
    return tuple(line for line in lines if not line.startswith(own))


def _submit_one(run: Run, place: JobPlace) -> Job:
    executor = make_executor(run.request, place)
    slurm_folder(run.run_dir).mkdir(parents=True, exist_ok=True)
    (run.run_dir / CONFIG_NAME).write_text(run.config_text)
    forget_ends(run.run_dir)
    try:
        # What is submitted is a command and not, as by `submit`, a pickle: it can be read, and run by hand.
        # submitit prints the words that it raises too.
        with contextlib.redirect_stderr(io.StringIO()):
            job = executor._submit_command(batch_command(run.request, place))
    except ClusterError:
        raise
    except Exception as error:  # submitit's own, with what sbatch wrote somewhere in them
        raise refused(str(error), run.request) from error
    write_job(
        run.run_dir,
        job.job_id,
        code=str(place.code),
        nodes=run.request.nodes,
        overrides=list(run.overrides),
    )
    return Job(run=run, job_id=job.job_id, state=SUBMITTED)
