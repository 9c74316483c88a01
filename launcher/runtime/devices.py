"""The devices that a run gets: real ones, or CPU devices that stand for a cluster of any shape.

How many CPU devices a process has is decided before JAX starts its backends, so `emulate` and `discover`
come before anything that touches a device.
"""

import itertools
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.plans.plan import Plan
from launcher.autopar.text.wording import count, size
from launcher.errors import ClusterError
from launcher.runtime.allocator import keep_freed_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The accelerators of this machine; `count` is 0 where there is none."""

    kind: str
    count: int
    memory_bytes: int | None


def emulate(num_devices: int) -> None:
    """Make this process's CPU so many devices, and use no other."""
    keep_freed_memory()
    _give_threads(num_devices)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)


def _give_threads(num_devices: int) -> None:
    """Collectives of emulated devices wait in threads; with too few of them they wait for ever."""
    os.environ.setdefault("NPROC", str(2 * num_devices + 4))


def discover(num_cpu_devices: int) -> Found:
    """Look for accelerators; starts JAX's backends, with so many CPU devices for the case of none."""
    _give_threads(num_cpu_devices)
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
        return Found(kind="cpu", count=0, memory_bytes=None)
    stats = devices[0].memory_stats() or {}
    return Found(
        kind=devices[0].device_kind, count=len(devices), memory_bytes=stats.get("bytes_limit")
    )


def discover_apart(num_cpu_devices: int) -> Found:
    """The same in a process of its own, so that this one takes no accelerator."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(discover, num_cpu_devices).result()


def acquire(cluster: AnyCluster, *, emulated: bool) -> np.ndarray:
    """The devices of a cluster as an array, hosts by devices per host; None where a host has fewer.

    Args:
        emulated: whether CPU devices may stand for the cluster's.

    Raises:
        ClusterError: they are not there; the message names the ways on.
    """
    found = jax.devices()
    fits_kind = emulated or (found[0].platform == "cpu") != cluster.has_accelerators
    if len(found) < cluster.num_devices or not fits_kind:
        shapes = (f"{k.num_hosts} x {k.devices_per_host} {k.device.kind}" for k in cluster.kinds)
        raise ClusterError(
            f"cluster={cluster.name} needs {' and '.join(shapes)} "
            f"({cluster.num_devices} devices), this machine has {len(found)} "
            f"({found[0].device_kind}); the plan is saved. Ways on: run this inside the cluster (several "
            f"hosts: with Ray on each, and runtime.address=HEAD:6379); submit it with mode=submit; or "
            f"rehearse that cluster's shape on this CPU by adding runtime=emulate model.size=tiny "
            "(a plan from a file is for its own model: leave it out)"
        )
    widths = [kind.devices_per_host for kind in cluster.kinds for _ in range(kind.num_hosts)]
    grid, left = np.full((len(widths), max(widths)), None, dtype=object), iter(found)
    for host, width in enumerate(widths):
        grid[host, :width] = list(itertools.islice(left, width))
    return grid


def warn_of_shared_memory(plan: Plan, free_bytes: int | None) -> None:
    """CPU devices share the machine's memory: say so where a plan needs more than is free of it."""
    peaks = plan.predicted.peak_bytes_per_device
    needed_bytes = sum(
        stage.num_devices * peaks[index] for index, stage in enumerate(plan.submeshes)
    )
    if free_bytes is None or needed_bytes <= free_bytes:
        return
    log.warning(
        "the plan needs %s on %s together, which share this machine's memory, and %s are free of it "
        "(model.size=%s, cluster=%s): look at the plan alone with mode=plan, or take a smaller "
        "model.size or cluster",
        size(needed_bytes), count(plan.num_devices, "CPU device"), size(free_bytes),
        plan.model.size, plan.cluster.name,
    )  # fmt: skip
