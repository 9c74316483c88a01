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

from launcher import __version__
from launcher.cli import compose, jobs, sweep
from launcher.cli.explain import USER_ERRORS, explain
from launcher.cli.report import FULL_ERROR, exit_status_of
from launcher.cli.run_folder import (
    CONFIG_FILE,
    LOG_FILE,
    missing_folders,
    run_dir_override,
    storage_errors,
    sweep_dir_override,
    take_back,
)
from launcher.cli.running import run_logged
from launcher.cli.srun_step import take_part
from launcher.config import Config, conf_dir, register_schemas
from launcher.errors import ConfigError, StoppedBySignal
from launcher.slurm.job_folder import has_job
from launcher.slurm.step import meeting_folder, step_here


def main() -> int:
    """Run the command line and return the exit status."""
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
    run_dir = compose.check(line)
    if run_dir is None:
        _check_alone()
    with storage_errors():
        missing = () if run_dir is None else missing_folders(run_dir)
    task = _Task(line=line, debug=debug, missing=missing)
    try:
        with storage_errors():  # of making the run's folder, since the task itself raises nothing
            _hand_to_hydra(task)
    except USER_ERRORS as error:
        raise explain(error, line.overrides) from error
    except SystemExit as stop:  # the task's, to leave out the rest of a sweep
        return stop.code
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
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # Hydra has said what is wrong and exits with 1 after it
        return ConfigError.exit_status if end.code else 0
    return 0


def _hand_to_hydra(task: Callable[[DictConfig], None]) -> None:
    register_schemas()
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
    missing: tuple[pathlib.Path, ...]  # folders that this run will make
    statuses: list[int] = field(default_factory=list)

    def __call__(self, composed: DictConfig) -> None:
        settings = HydraConfig.get()
        run_dir = pathlib.Path(settings.runtime.output_dir)
        if settings.mode == RunMode.MULTIRUN:
            self._run_point(settings, run_dir)
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

    def _run_point(self, settings: DictConfig, run_dir: pathlib.Path) -> None:
        given = OmegaConf.to_container(settings.overrides)  # interpolations are for the point
        command = sweep.command(
            (*given["hydra"], *given["task"]),
            flags=self.line.config_flags(),
            run_dir=run_dir,
            number=settings.job.num,
        )
        status = sweep.run(command, folder=settings.runtime.cwd, debug=self.debug)
        self.statuses.append(status)
        if status:
            point = f"{settings.job.num} of the sweep ({' '.join(settings.overrides.task)})"
            sys.stderr.write(
                f"launcher: point {point} ended with exit status {status}: see {run_dir}\n"
            )
        if status in sweep.STOPPED_STATUSES:
            sys.exit(status)

    def _run_here(self, composed: DictConfig, run_dir: pathlib.Path) -> None:
        submits = composed.mode == "submit"
        action = self._submit if submits else self._train
        status = exit_status_of(
            lambda: action(composed, run_dir),
            debug=self.debug or composed.debug,
            log_file=str(run_dir / LOG_FILE),
            again=self._command(run_dir),
        )
        if status == ConfigError.exit_status or (submits and not has_job(run_dir)):
            take_back(run_dir, self.missing)
        self.statuses.append(status)

    def _train(self, composed: DictConfig, run_dir: pathlib.Path) -> int:
        return run_logged(lambda: _read(composed, run_dir), run_dir, _meeting())

    def _submit(self, composed: DictConfig, run_dir: pathlib.Path) -> int:
        return jobs.submit_one(composed, run_dir, self.line.overrides, self._command(run_dir))


def _read(composed: DictConfig, run_dir: pathlib.Path) -> Config:
    config = compose.to_config(composed)
    with storage_errors():
        (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(composed, resolve=True))
    return config


def _meeting() -> pathlib.Path | None:
    """Where this process meets those of the other nodes, if it is one of several."""
    step = step_here(os.environ)
    return step and meeting_folder(step, os.environ)
