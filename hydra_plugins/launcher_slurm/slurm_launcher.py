"""Hydra's part of `hydra/launcher=slurm`: compose every point of a sweep, and hand all of them over.

Hydra imports this whenever it starts, so what submits (`launcher.cli.jobs`) is imported when there is
something to submit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write


@dataclass(kw_only=True)
class SlurmLauncherConf:
    """`hydra.launcher`: what is not null goes before `cluster.slurm` of each point, key by key."""

    _target_: str = "hydra_plugins.launcher_slurm.slurm_launcher.SlurmLauncher"
    wait: bool = False  # until all jobs have ended; Ctrl-C ends the waiting, and no job
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    exclusive: bool | None = None
    constraint: str | None = None
    sbatch: dict[str, Any] | None = None
    srun: list[str] | None = None
    setup: list[str] | None = None
    env: dict[str, str] | None = None
    python: str | None = None
    warn_s: int | None = None
    max_restarts: int | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=SlurmLauncherConf, provider="jax-launcher"
)


class SlurmLauncher(Launcher):
    """Submits each point of a sweep as a job of Slurm."""

    def __init__(self, wait: bool, **settings: object) -> None:
        """`settings` are read from the config of each point, where interpolations have their values."""
        del settings
        self._waits = wait

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit all points; without `wait` that is all."""
        from launcher.cli.jobs import run_of_point, submit_runs

        runs, shows = [], False
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            composed, run_dir = self._compose(overrides, number)
            runs.append(run_of_point(composed, run_dir))
            shows = shows or composed.dry_run
        sweep_dir = Path(self._config.hydra.sweep.dir)
        try:
            status = submit_runs(
                runs,
                sweep_dir,
                again=self._task.sweep_command(sweep_dir),
                waits=self._waits,
                shows=shows,
            )
        finally:
            _take_back(sweep_dir)
        self._task.statuses.append(status)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=status) for _ in runs]

    def _compose(self, overrides: Sequence[str], number: int) -> tuple[DictConfig, Path]:
        """The config of a point, and its folder; `${hydra:...}` is that of the point from then on."""
        composed = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        HydraConfig.instance().set_config(composed)
        run_dir = Path(composed.hydra.sweep.dir, composed.hydra.sweep.subdir).absolute()
        with read_write(composed.hydra.runtime), open_dict(composed.hydra.runtime):
            composed.hydra.runtime.output_dir = str(run_dir)
        HydraConfig.instance().set_config(composed)
        return composed, run_dir


def _take_back(sweep_dir: Path) -> None:
    """Remove what Hydra has written for a sweep of which nothing was submitted."""
    own = sweep_dir / "multirun.yaml"
    if [path.name for path in sweep_dir.iterdir()] != [own.name]:
        return
    own.unlink()
    for folder in (sweep_dir, *sweep_dir.parents):
        try:
            folder.rmdir()
        except OSError:  # it has something else
            return
