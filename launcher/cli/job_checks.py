"""What a command line says of jobs, checked before Hydra makes a folder."""

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from launcher.config import Config
from launcher.errors import ConfigError
from launcher.slurm.batch_script import need_submitit
from launcher.slurm.commands import need_slurm
from launcher.slurm.job_request import FIELDS, job_request

LAUNCHER = "hydra_plugins.launcher_slurm.slurm_launcher.SlurmLauncher"


def check_job(config: Config, settings: DictConfig, *, sweeps: bool) -> None:
    """Check what a command line says of jobs, and that jobs can be submitted from here.

    Args:
        settings: `hydra` of the composed config.
    """
    by_sweep = settings.launcher.get("_target_") == LAUNCHER
    if by_sweep and not sweeps:
        raise ConfigError(
            "hydra/launcher=slurm submits the points of a sweep, and there is no --multirun: add it, or "
            "submit a single job with mode=submit"
        )
    if by_sweep and config.mode == "submit":
        raise ConfigError(
            "mode=submit contradicts hydra/launcher=slurm, which submits already: leave one out"
        )
    if config.mode != "submit" and not by_sweep:
        if config.dry_run:
            raise ConfigError(
                f"dry_run=true shows the batch script of a job, and mode={config.mode} makes none: take "
                f"mode=submit, or --multirun hydra/launcher=slurm"
            )
        return
    job_request(config, sweep_settings(settings) if by_sweep else None)
    need_submitit()
    if not config.dry_run:
        need_slurm()


def sweep_settings(settings: DictConfig) -> Mapping[str, object]:
    """What the sweep sets itself of `cluster.slurm`, from `hydra.launcher`."""
    given = OmegaConf.to_container(settings.launcher, resolve=True)
    return {name: given.get(name) for name in FIELDS}
