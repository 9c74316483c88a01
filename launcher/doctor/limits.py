"""Whether what this process may use is enough: memory, CPUs, open files, shared memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.doctor.findings import Finding, failed, ok, warning
from launcher.doctor.wording import GIB_BYTES, counted, size

LEAST_MEMORY_BYTES = GIB_BYTES
LOW_MEMORY_BYTES = 4 * GIB_BYTES
LOW_FILES = 4096
LOW_SHM_BYTES = 1 * GIB_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What was found; None where the system does not tell, or sets no limit."""

    available_bytes: int | None  # by the kernel's own estimate
    cgroup_memory_bytes: int | None
    cgroup_used_bytes: int | None
    num_cpus: int  # that this process may run on
    cgroup_cpus: float | None
    open_files: int
    open_files_most: int  # to which a process may raise it by itself
    shm_bytes: int | None  # free in /dev/shm


def check_memory(limits: Limits) -> Iterator[Finding]:
    """Compare the memory that is left with what small runs take."""
    left = [limits.available_bytes] if limits.available_bytes is not None else []
    limit, used = limits.cgroup_memory_bytes, limits.cgroup_used_bytes
    within = ""
    if limit is not None:
        left.append(limit - (used or 0))
        within = f"; the limit of this job or container is {size(limit)}"
    if not left:
        yield ok("memory: this system does not tell what is left")
        return
    left_bytes = min(left)
    what = f"{size(left_bytes)} of memory are left{within}"
    if left_bytes < LEAST_MEMORY_BYTES:
        yield failed(
            f"{what}; {size(LEAST_MEMORY_BYTES)} is the least",
            "the system ends runs in the middle, with no message but 'Killed'",
            "end what else runs here (`top`), or ask for more (--mem of sbatch, -m of docker)",
        )
    elif left_bytes < LOW_MEMORY_BYTES:
        yield warning(
            what,
            "planning and tiny models fit; weights on their way to GPUs may not",
            "ask for more memory (--mem of sbatch, -m of docker) for larger models",
        )
    else:
        yield ok(what)


def check_cpus(limits: Limits) -> Iterator[Finding]:
    """Say how many CPUs there are to work on."""
    quota = limits.cgroup_cpus
    usable = limits.num_cpus if quota is None else min(limits.num_cpus, quota)
    within = f" (this job or container may use {quota:g})" if quota is not None else ""
    if usable < 2:
        yield warning(
            f"{counted(limits.num_cpus, 'CPU')}{within}",
            "making batches, planning and dispatching take turns, and GPUs may wait for them",
            "ask for more (--cpus-per-task of sbatch, --cpus of docker)",
        )
    else:
        yield ok(f"{counted(limits.num_cpus, 'CPU')}{within}")


def check_files(limits: Limits) -> Iterator[Finding]:
    """Compare the limit on open files with what Ray and data loading take."""
    soft, hard = limits.open_files, limits.open_files_most
    if soft < LOW_FILES:
        yield warning(
            f"a process may have {soft} files open (it may raise that to {hard})",
            "Ray and connections between many hosts take thousands: 'Too many open files'",
            f"ulimit -n {max(min(hard, 65_536), soft)} before the run"
            + ("" if hard >= LOW_FILES else "; the administrators can raise the upper limit"),
        )
    else:
        yield ok(f"a process may have {soft} files open")


def check_shm(limits: Limits) -> Iterator[Finding]:
    """Compare the shared memory with what Ray and NCCL take."""
    if limits.shm_bytes is None:
        yield warning(
            "there is no /dev/shm",
            "Ray keeps its objects on disk instead, and NCCL cannot share memory between GPUs",
            "on Linux mount it; elsewhere (macOS) this is as it should be",
        )
    elif limits.shm_bytes < LOW_SHM_BYTES:
        yield warning(
            f"/dev/shm has {size(limits.shm_bytes)} free",
            "Ray keeps its objects on disk instead, and NCCL may end with 'unhandled system error'",
            "docker run --shm-size=8g (or --ipc=host); elsewhere remove what is left in /dev/shm",
        )
    else:
        yield ok(f"/dev/shm has {size(limits.shm_bytes)} free")
