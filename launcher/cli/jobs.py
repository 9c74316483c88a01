"""Submitting from the command line: one run with `mode=submit`, a sweep's points with `hydra/launcher=slurm`.

A job reads the config that was composed when it was submitted (`cli.job`), and nothing else: neither `conf/`
nor the command line. What jobs are, and how they are submitted, is `launcher.slurm`'s.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from launcher.cli.compose import to_config
from launcher.cli.job_checks import sweep_settings
from launcher.cli.report import INTERRUPTED_STATUS
from launcher.config import CustomConfig
from launcher.slurm.job_request import job_request
from launcher.slurm.submission import Job, Run, scripts, submit
from launcher.slurm.waiting import still_there, table, wait


def submit_one(composed: DictConfig, run_dir: Path, overrides: Sequence[str], again: str) -> int:
    """Submit a run of `mode=submit`; return the exit status.

    Args:
        composed: without `hydra`.
        again: The command that submits it again.
    """
    told = [text for text in overrides if text != "mode=submit"]
    run = _make_run(composed, run_dir, run_dir.name, told)
    return submit_runs([run], run_dir, again=again, waits=False, shows=composed.dry_run)


def run_of_point(composed: DictConfig, run_dir: Path) -> Run:
    """What is submitted for a point of a sweep, whose config is composed with `hydra`."""
    settings = composed.hydra
    sweep_dir = Path(settings.sweep.dir)
    task = composed.copy()
    with open_dict(task):
        del task["hydra"]
    if task.logger.group is None:
        task.logger.group = "/".join(sweep_dir.absolute().parts[-2:])
    return _make_run(
        task,
        run_dir,
        f"{sweep_dir.name}-{settings.job.num}",
        OmegaConf.to_container(settings.overrides.task),
        over=sweep_settings(settings),
    )


def _make_run(
    task: DictConfig, run_dir: Path, name: str, overrides: Sequence[str], **request: object
) -> Run:
    config = to_config(task)
    frozen = OmegaConf.create(OmegaConf.to_container(task, resolve=True))
    frozen.dry_run = False
    if config.mode == "submit":
        frozen.mode = "train"
    custom = config.model if isinstance(config.model, CustomConfig) else None
    return Run(
        name=name,
        run_dir=run_dir.absolute(),
        overrides=tuple(overrides),
        config_text=OmegaConf.to_yaml(frozen),
        request=job_request(config, **request),
        target=custom and custom.target,
    )


def submit_runs(runs: Sequence[Run], top: Path, *, again: str, waits: bool, shows: bool) -> int:
    """Submit, print the table, wait if asked to; return the exit status.

    Args:
        top: The folder of the sweep, or of the run.
        again: The command that submits what is missing.
        shows: Print the batch scripts instead.
    """
    top, folder = top.absolute(), Path.cwd()
    if shows:
        for run, script in zip(runs, scripts(runs, top, folder), strict=True):
            # A script alone can be submitted as it is printed: its first line must be that of bash.
            title = [title_of_script(run.run_dir, run.overrides)] * (len(runs) > 1)
            _say("\n".join((*title, script)))
        return 0
    jobs: list[Job] = []
    try:
        _collect(submit(runs, top, folder), jobs)
    finally:  # also of those that were submitted before something failed
        if jobs:
            _say(table(jobs))
    _say(_ways_on(jobs, again))
    return _wait(jobs) if waits else 0


def title_of_script(run_dir: Path, overrides: Sequence[str]) -> str:
    """The line before the batch script of a point among others: which one it is."""
    return f"# {run_dir}: {' '.join(overrides)}"


def _collect(found: Iterator[Job], jobs: list[Job]) -> None:
    for job in found:
        jobs.append(job)


def _ways_on(jobs: Sequence[Job], again: str) -> str:
    new = [job.job_id for job in jobs if job.is_new]
    counted = f"{len(new)} submitted, {len(jobs) - len(new)} left alone"
    ends = f"; watch: squeue --jobs={','.join(new)}; end: scancel {' '.join(new)}" if new else ""
    return f"{counted}{ends}; to submit what fails or is missing again: {again}"


def _wait(jobs: Sequence[Job]) -> int:
    """Wait for all; the exit status is that of the first point that failed."""
    try:
        ends = wait(jobs, _say)
    except KeyboardInterrupt:
        sys.stderr.write(f"launcher: stopped waiting by Ctrl-C: {still_there(jobs)}\n")
        return INTERRUPTED_STATUS
    return next((ends[job.job_id] for job in jobs if ends[job.job_id]), 0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
