"""Which hosts form one world of `jax.distributed`, and forming it.

A stage that lies on several hosts needs one; a stage inside a host none. Hosts that such stages connect, one
after the other, share a world: most often the hosts of one submesh. No collective reaches further, so
worlds know nothing of one another.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.errors import ClusterError


def worlds(stage_hosts: Iterable[Sequence[int]], num_hosts: int) -> list[tuple[int, ...]]:
    """The world of each host, itself included, in the order of the hosts."""
    found = [{host} for host in range(num_hosts)]
    for hosts in stage_hosts:
        joined = set().union(*(found[host] for host in hosts))
        for host in joined:
            found[host] = joined
    return [tuple(sorted(world)) for world in found]


def join(world: Sequence[int], host: int, coordinator: str, local_devices: int | None) -> None:
    """Become a process of the world; the backend must not have been started.

    Args:
        coordinator: "ip:port" that the world's first host listens at.
        local_devices: how many accelerators are this process's; None on CPU.
    """
    if len(world) == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes=len(world),
            process_id=world.index(host),
            local_device_ids=None if local_devices is None else list(range(local_devices)),
        )
    except RuntimeError as error:
        raise ClusterError(
            f"host {host} cannot join the world of hosts {', '.join(map(str, world))} at {coordinator} "
            f"({str(error).splitlines()[0][:200]}): see whether the hosts reach one another there"
        ) from error


def world_grid(
    world: Sequence[int], host: int, cluster: AnyCluster, *, emulated: bool
) -> np.ndarray:
    """The devices of a world as an array, the cluster's hosts by devices per host; None elsewhere.

    `emulated`: CPU devices may stand for the cluster's.
    """
    platform = jax.local_devices()[0].platform
    fits = emulated or (platform != "cpu") == cluster.has_accelerators
    widths = [kind.devices_per_host for kind in cluster.kinds for _ in range(kind.num_hosts)]
    grid = np.full((len(widths), max(widths)), None, dtype=object)
    for process, member in enumerate(world):
        own = [device for device in jax.devices() if device.process_index == process]
        if len(own) < widths[member] or not fits:
            raise ClusterError(
                f"cluster={cluster.name} has {widths[member]} devices on host {member}, and {len(own)} "
                f"({own[0].device_kind if own else 'none'}) are there, as host {host} sees it: take the "
                f"hosts that the cluster describes, or another cluster"
            )
        grid[member, : widths[member]] = sorted(own, key=lambda device: device.id)[: widths[member]]
    return grid
