"""Emulated machines with two kinds of hosts, for the tests that plan for them and run on them."""

from dataclasses import replace

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.device import Device
from launcher.autopar.clusters.hosts import Cluster, MixedCluster


def times_faster(device: Device, factor: float) -> Device:
    """The same device at so many times its rates."""
    return replace(
        device,
        kind=f"{device.kind} x {factor:g}",
        peak_flops_per_s={k: v * factor for k, v in device.peak_flops_per_s.items()},
        memory_bytes_per_s=device.memory_bytes_per_s * factor,
    )


def mixed(*kinds: Cluster, **figures) -> MixedCluster:
    """The kinds together, with the network of `cpu8` between them."""
    given = {"inter_host": load_cluster("cpu8").inter_host, "nominal": True, "sources": {}}
    return MixedCluster(name="mixed", kinds=kinds, **given | figures)


def ragged(factor: float = 2.0) -> MixedCluster:
    """Two hosts of 2 slow devices, and one host of 4 that are faster."""
    slow = replace(load_cluster("cpu8"), name="slow", num_hosts=2, devices_per_host=2)
    fast = replace(slow, name="fast", num_hosts=1, devices_per_host=4)
    return mixed(slow, replace(fast, device=times_faster(fast.device, factor)))
