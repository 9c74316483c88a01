"""The GPUs that NVIDIA's driver knows of, whatever JAX makes of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.doctor.commands import Outcome, Runner
from launcher.doctor.findings import Finding, absent, failed, ok, warning
from launcher.doctor.wording import MIB_BYTES, size

LIMIT_S = 15.0
# What CUDA 12's programs need (NVIDIA's table of minor-version compatibility).
LEAST_DRIVER = 525
QUERY = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.used",
    "--format=csv,noheader,nounits",
)
_USED_FRACTION = 0.1  # of a GPU's memory: more than a display takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One line of nvidia-smi; None is what the driver does not tell."""

    name: str
    driver: str
    memory_bytes: int | None
    used_bytes: int | None


def find_gpus(run: Runner) -> tuple[Gpu, ...]:
    """List the GPUs of this machine; none, too, where nvidia-smi is not there or fails."""
    return _parse(run(QUERY, LIMIT_S, {}))


def check_gpus(run: Runner, *, on_login_node: bool) -> Iterator[Finding]:
    """Look at the driver, its GPUs, and who uses their memory."""
    outcome = run(QUERY, LIMIT_S, {})
    if outcome is None:
        yield absent("nvidia-smi: no NVIDIA driver, so JAX computes on the CPU or a TPU")
        return
    gpus = _parse(outcome)
    if not gpus:
        yield _no_answer(outcome, on_login_node)
        return
    yield _driver(gpus[0].driver, len(gpus), gpus[0])
    for number, gpu in enumerate(gpus):
        yield from _in_use(number, gpu)


def _parse(outcome: Outcome | None) -> tuple[Gpu, ...]:
    if outcome is None or outcome.status != 0:
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in outcome.stdout.splitlines()]
    return tuple(
        Gpu(name=row[0], driver=row[1], memory_bytes=_mib(row[2]), used_bytes=_mib(row[3]))
        for row in rows
        if len(row) == 4
    )


def _mib(text: str) -> int | None:
    return int(text) * MIB_BYTES if text.isdecimal() else None


def _no_answer(outcome: Outcome, on_login_node: bool) -> Finding:
    if outcome.status is None:
        return failed(
            f"nvidia-smi did not answer within {LIMIT_S:.0f} s",
            "the driver hangs, and so will every run on these GPUs",
            "look for NVRM and Xid lines in `dmesg`; a host in this state has to be restarted",
        )
    what = f"nvidia-smi finds no GPU (status {outcome.status}): {outcome.last_words}"
    if on_login_node:
        return absent(f"{what}; this is a login node: srun --gpus=1 python -m launcher.doctor")
    return failed(
        what,
        "the driver's tools are here, but no driver at work, or no GPU was given to this job",
        "in a job ask for GPUs (--gpus of sbatch), in a container give it some (--gpus of docker); "
        "else load or install the driver again",
    )


def _driver(driver: str, count: int, gpu: Gpu) -> Finding:
    each = f", {size(gpu.memory_bytes)} each" if gpu.memory_bytes else ""
    what = f"NVIDIA driver {driver}, {count} x {gpu.name}{each}"
    major = driver.partition(".")[0]
    if major.isdecimal() and int(major) < LEAST_DRIVER:
        return failed(
            f"{what}; CUDA 12 needs driver {LEAST_DRIVER} or later",
            "JAX's CUDA programs do not start under this driver",
            f"install driver {LEAST_DRIVER} or later, or ask for a host that has one",
        )
    return ok(what)


def _in_use(number: int, gpu: Gpu) -> Iterator[Finding]:
    if gpu.memory_bytes and gpu.used_bytes and gpu.used_bytes > _USED_FRACTION * gpu.memory_bytes:
        yield warning(
            f"GPU {number} has {size(gpu.used_bytes)} of {size(gpu.memory_bytes)} in use",
            "someone else computes there; a run that plans with all of its memory runs out of it",
            "see `nvidia-smi` for whose it is; CUDA_VISIBLE_DEVICES chooses other GPUs",
        )


def visible(environment: Mapping[str, str]) -> str | None:
    """Return what limits the GPUs that a process sees, as it would be written in a shell."""
    platforms = environment.get("JAX_PLATFORMS", "")  # set to nothing, it leaves the choice to JAX
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"JAX_PLATFORMS={platforms}"
    name = "CUDA_VISIBLE_DEVICES"  # set to nothing, it hides all
    return f"{name}={environment[name]}" if name in environment else None
