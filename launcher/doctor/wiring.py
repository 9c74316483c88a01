"""The list of checks, each with what it needs from this machine: the only place that brings them together."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor import (
    devices,
    gpus,
    installation,
    limits,
    machine,
    planning,
    ray_session,
    slurm,
    storage,
    tracking,
)
from launcher.doctor.checkup import Check
from launcher.doctor.commands import Runner
from launcher.doctor.findings import Finding
from launcher.doctor.versions import Requirement
from launcher.errors import ClusterError, ConfigError, StorageError
from launcher.machine_limits import text_of
from launcher.runtime.compiled.cache_folder import cache_folder
from launcher.runtime.records.wandb_login import is_logged_in

_MOUNTS = Path("/proc/self/mounts")
_SPARE_S = 15.0  # beside the command that a check waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the checks look at."""

    environment: Mapping[str, str]
    run: Runner
    folder: Path  # where runs are written


def checks(around: Surroundings) -> tuple[Check, ...]:
    """List all checks, in the order of their lines: what others stand on comes first."""
    return (
        *_installation(around),
        *_devices(around),
        *_machine(),
        *_storage(around),
        *_services(around),
    )


GROUPS = ("installation", "devices", "limits", "storage", "ray", "slurm", "wandb")


def _installation(around: Surroundings) -> Iterable[Check]:
    def packages() -> Iterable[Finding]:
        installed = installation.look()
        yield from installation.check_python(installed)
        yield from installation.check_packages(installed)
        yield from installation.check_jax_parts(installed)

    status = ConfigError.exit_status
    yield Check(group="installation", run=packages, exit_status=status)
    yield Check(
        group="installation",
        run=lambda: planning.check_plan(around.run),
        limit_s=planning.LIMIT_S + _SPARE_S,
        progress="planning a tiny model",
        exit_status=status,
    )


def _devices(around: Surroundings) -> Iterable[Check]:
    status = ClusterError.exit_status
    yield Check(
        group="devices",
        run=lambda: gpus.check_gpus(around.run, on_login_node=_is_login_node(around)),
        limit_s=gpus.LIMIT_S + _SPARE_S,
        exit_status=status,
    )
    yield Check(
        group="devices",
        run=lambda: devices.check_devices(around.run, around.environment),
        limit_s=devices.LIMIT_S + gpus.LIMIT_S + _SPARE_S,
        progress="computing on JAX's devices",
        exit_status=status,
    )
    yield Check(
        group="devices",
        run=lambda: devices.check_emulated(around.run),
        limit_s=devices.LIMIT_S + _SPARE_S,
        progress=f"computing on {devices.NUM_EMULATED} emulated devices",
        exit_status=status,
    )


def _machine() -> Iterable[Check]:
    def all_limits() -> Iterable[Finding]:
        found = machine.read_limits()
        for check in (
            limits.check_memory,
            limits.check_cpus,
            limits.check_files,
            limits.check_shm,
        ):
            yield from check(found)

    yield Check(group="limits", run=all_limits, exit_status=ClusterError.exit_status)


def _storage(around: Surroundings) -> Iterable[Check]:
    status = StorageError.exit_status
    mounts = text_of(_MOUNTS)
    yield Check(
        group="storage",
        run=lambda: storage.check_space(around.folder, os.statvfs, mounts),
        exit_status=status,
    )
    yield Check(
        group="storage",
        run=lambda: storage.check_speed(around.folder, storage.measure_speed),
        limit_s=storage.WRITE_LIMIT_S + 3 * _SPARE_S,
        progress=f"writing {storage.FILE_BYTES / 1e6:.0f} MB into {around.folder}",
        exit_status=status,
    )
    yield Check(
        group="storage",
        run=lambda: storage.check_cache(cache_folder(around.environment)),
        exit_status=status,
    )


def _services(around: Surroundings) -> Iterable[Check]:
    status = ClusterError.exit_status
    yield Check(
        group="ray",
        run=lambda: ray_session.check_ray(around.run, around.environment, machine.connect),
        limit_s=ray_session.LIMIT_S + _SPARE_S,
        progress="running a task on Ray",
        exit_status=status,
    )
    yield Check(
        group="slurm",
        run=lambda: slurm.check_slurm(
            around.run,
            lambda name: _which(around, name),
            around.environment,
            (_submitit(), installation.version_of("submitit")),
        ),
        limit_s=slurm.LIMIT_S + _SPARE_S,
        exit_status=status,
    )
    yield Check(
        group="wandb",
        run=lambda: tracking.check_wandb(
            installation.version_of("wandb"),
            around.environment,
            is_logged_in(around.environment),
            machine.reach,
        ),
        exit_status=status,
    )


def _which(around: Surroundings, name: str) -> str | None:
    return shutil.which(name, path=around.environment.get("PATH"))


def _is_login_node(around: Surroundings) -> bool:
    return "SLURM_JOB_ID" not in around.environment and _which(around, "sbatch") is not None


def _submitit() -> Requirement:
    """What the launcher's metadata asks of submitit; any version, if it is not installed."""
    asked = (need for need in installation.look().requirements if need.name == "submitit")
    return next(asked, Requirement(name="submitit", bounds=""))
