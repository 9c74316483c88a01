"""The entry: check the command line, hand it to Hydra, and end with an exit status.

Hydra composes, makes the run's folder (several in a sweep) and calls back; the callback turns the
config into typed objects and calls `launcher.main.run`. Nothing here imports JAX: help and config
errors answer at once, and `main` sets the environment of emulated devices before JAX starts.
"""

import logging
import os
import pathlib
import shlex
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launcher import __version__, early_stop, run_lock
from launcher.cli import compose, jobs, sweep
from launcher.cli.explain import USER_ERRORS, explain
from launcher.cli.held import run_held
from launcher.cli.report import FULL_ERROR, exit_status_of, one_line
from launcher.cli.run_folder import (
    CONFIG_FILE,
    FolderBefore,
    missing_folders,
    override,
    put_back,
    remembered,
    run_dir_override,
    storage_errors,
    sweep_dir_override,
    take_back,
)
from launcher.cli.running import run_logged
from launcher.cli.srun_step import take_part
from launcher.cli.trained_folder import beside_training
from launcher.config import Config, conf_dir
from launcher.errors import ConfigError, StoppedBySignal
from launcher.slurm.job_folder import has_job
from launcher.slurm.step import meeting_folder, step_here


def main() -> int:
    """Run the command line and return the exit status."""
    early_stop.hand_over_ctrl_c()
    inherited = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # or Hydra prints several lines of its own and exits with 1
    debug = inherited == "1" or "debug=true" in (argument.lower() for argument in sys.argv)
    step = step_here(os.environ)
    try:
        status = take_part(step, lambda: exit_status_of(lambda: _answer(debug), debug=debug))
        if status == StoppedBySignal.exit_status:
            _leave_at_once(status)
        return status
    finally:
        os.environ.pop(FULL_ERROR)
        if inherited is not None:
            os.environ[FULL_ERROR] = inherited


def _leave_at_once(status: int) -> None:
    """End the process now if threads still compile: who sent the signal will not wait for them."""
    is_busy = any(thread.name.startswith("compile") for thread in threading.enumerate())
    if is_busy:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _answer(debug: bool) -> int:
    if "--version" in sys.argv[1:]:  # Hydra's parser would print Hydra's alone
        sys.stdout.write(f"launcher {__version__} (Hydra {hydra.__version__})\n")
        return 0
    line = compose.parse(sys.argv[1:])
    if line.only_informs:
        return _inform(line)
    point = compose.check(line)
    beside = beside_training(point, sys.argv[1:]) if point else None
    if beside is not None:
        sys.argv[1:] = beside
        line = compose.parse(beside)
        point = compose.check(line)
    run_dir = point and point.run_dir
    if run_dir is None:
        _check_alone()
    with storage_errors():
        before = FolderBefore() if run_dir is None else missing_folders(run_dir)
        # Before Hydra, which writes into the folder of whatever else runs there.
        works = point is not None and point.config.mode != "submit"
        lock = run_lock.take(run_dir) if works and not before.missing else None
        before = remembered(run_dir) if lock is not None else before
    task = _Task(line=line, debug=debug, before=before, lock=lock)
    try:
        with storage_errors():  # of making the run's folder, since the task itself raises nothing
            _hand_to_hydra(task)
    except USER_ERRORS as error:
        raise explain(error, line.overrides) from error
    except SystemExit as stop:  # the task's, to leave out the rest of a sweep
        return stop.code
    finally:
        if lock is not None:  # Hydra may have failed before there was a run
            lock.release()
        task.compare_points()
    return task.exit_status()


def _check_alone() -> None:
    """The points of a sweep have processes of their own, which the other nodes cannot join."""
    step = step_here(os.environ)
    if step is not None and step.num_nodes > 1:
        raise ConfigError(
            f"--multirun in a step of {step.num_nodes} nodes of Slurm: submit the points as jobs, with "
            f"hydra/launcher=slurm, or give each its own srun"
        )


def _inform(line: compose.CommandLine) -> int:
    """Let Hydra print what it is asked for."""
    try:
        _hand_to_hydra(lambda composed: None)
        sys.stdout.flush()
    except (*USER_ERRORS, KeyError) as error:
        if line.completes:  # the shell would print it into the line that is being typed
            return ConfigError.exit_status
        raise explain(error, line.overrides) from error
    except SystemExit as end:  # Hydra has said what is wrong and exits with 1 after it
        return ConfigError.exit_status if end.code else 0
    return 0


def _hand_to_hydra(task: Callable[[DictConfig], None]) -> None:
    compose.prepare()
    hydra.main(
        version_base=compose.VERSION_BASE,
        config_path=str(conf_dir()),
        config_name=compose.CONFIG_NAME,
    )(task)()


@dataclass(kw_only=True)
class _Task:
    """What Hydra calls for each run; it never raises, or Hydra would add lines of its own."""

    line: compose.CommandLine
    debug: bool
    before: FolderBefore  # the folder of a run, as it was
    lock: run_lock.RunLock | None  # on the folder of a run, if that was there before
    statuses: list[int] = field(default_factory=list)
    sweep_dir: pathlib.Path | None = None
    points: list[pathlib.Path] = field(default_factory=list)  # the folders of a sweep's runs so far

    def __call__(self, composed: DictConfig) -> None:
        settings = HydraConfig.get()
        run_dir = pathlib.Path(settings.runtime.output_dir)
        if settings.mode == RunMode.MULTIRUN:
            self._run_point(composed, settings, run_dir)
        else:
            self._run_here(composed, run_dir)

    def exit_status(self) -> int:
        """Return the exit status of the run, or of the first point of the sweep that failed."""
        return next((status for status in self.statuses if status), 0)

    def _command(self, run_dir: pathlib.Path) -> str:
        """The command line that goes on in this run's folder."""
        given = [text for text in self.line.overrides if not text.startswith("hydra.run.dir=")]
        command = (*self.line.config_flags(), *given, run_dir_override(run_dir))
        return shlex.join(("python", "-m", "launcher", *command))

    def sweep_command(self, sweep_dir: pathlib.Path) -> str:
        """The command line that submits the points of this sweep that are missing."""
        given = [text for text in self.line.overrides if not text.startswith("hydra.sweep.dir=")]
        command = (*self.line.config_flags(), *given, sweep_dir_override(sweep_dir))
        return shlex.join(("python", "-m", "launcher", "--multirun", *command))

    def _run_point(self, composed: DictConfig, settings: DictConfig, run_dir: pathlib.Path) -> None:
        self.sweep_dir = pathlib.Path(settings.sweep.dir)
        self.points.append(run_dir)
        given = OmegaConf.to_container(settings.overrides)  # interpolations are for the point
        is_ungrouped = composed.logger.name == "wandb" and composed.logger.group is None
        group = (override("logger.group", sweep.group_of(self.sweep_dir)),) * is_ungrouped
        command = sweep.command(
            (*given["hydra"], *given["task"], *group),
            flags=self.line.config_flags(),
            run_dir=run_dir,
            number=settings.job.num,
        )
        if composed.mode == "submit" and composed.dry_run:
            sys.stdout.write(f"{jobs.title_of_script(run_dir, settings.overrides.task)}\n")
            sys.stdout.flush()
        status = sweep.run(command, folder=settings.runtime.cwd, debug=self.debug)
        self.statuses.append(status)
        if status:
            point = f"{settings.job.num} of the sweep ({' '.join(settings.overrides.task)})"
            sys.stderr.write(
                f"launcher: point {point} ended with exit status {status}: see {run_dir}\n"
            )
        if status in sweep.STOPPED_STATUSES:
            sys.exit(status)

    def compare_points(self) -> None:
        """Print the table of a sweep, and write its comparison; what fails there ends no sweep."""
        if self.sweep_dir is None:
            return
        # Not at the top: it brings JAX, which help and config errors do not wait for.
        from launcher.status.report import report

        found = report(self.sweep_dir, self.points)
        sys.stdout.write("".join(f"{line}\n" for line in found.lines))
        sys.stdout.flush()
        for error in found.errors:
            sys.stderr.write(f"launcher: {one_line(str(error))}\n")

    def _run_here(self, composed: DictConfig, run_dir: pathlib.Path) -> None:
        submits = composed.mode == "submit"
        status = (self._submit if submits else self._train)(composed, run_dir)
        if status == ConfigError.exit_status or (submits and not has_job(run_dir)):
            take_back(run_dir, self.before)
        self.statuses.append(status)

    def _train(self, composed: DictConfig, run_dir: pathlib.Path) -> int:
        return run_held(
            lambda left_by: run_logged(
                lambda: _read(composed, run_dir), run_dir, left_by, _meeting()
            ),
            run_dir,
            self.lock,
            debug=self.debug or composed.debug,
            again=self._command(run_dir),
            only_plans=composed.mode == "plan",
            put_back=lambda: put_back(run_dir, self.before),
        )

    def _submit(self, composed: DictConfig, run_dir: pathlib.Path) -> int:
        """The folder is held by nobody: a job may be at work in it, which is then left alone."""
        again = self._command(run_dir)
        return exit_status_of(
            lambda: jobs.submit_one(composed, run_dir, self.line.overrides, again),
            debug=self.debug or composed.debug,
        )


def _read(composed: DictConfig, run_dir: pathlib.Path) -> Config:
    config = compose.to_config(composed)
    with storage_errors():
        (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(composed, resolve=True))
    return config


def _meeting() -> pathlib.Path | None:
    """Where this process meets those of the other nodes, if it is one of several."""
    step = step_here(os.environ)
    return step and meeting_folder(step, os.environ)
