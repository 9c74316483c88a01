"""Which hosts and devices a stage gets: rectangles of given shapes, side by side on the cluster."""

import math
from collections.abc import Sequence

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.inter_op.stage_table import shapes_text
from launcher.errors import InfeasiblePlanError

Placement = tuple[tuple[int, ...], tuple[int, ...]]
"""The hosts of a stage, and the devices that it takes of each of them."""


def place_on(
    cluster: AnyCluster, submeshes: Sequence[tuple[int, int]], kinds: Sequence[int]
) -> tuple[Placement, ...]:
    """Give every stage hosts of its kind; they are numbered one kind after the other."""
    placed: dict[int, Placement] = {}
    first_host = 0
    for number, kind in enumerate(cluster.kinds):
        own = [stage for stage, its in enumerate(kinds) if its == number]
        shapes = [submeshes[stage] for stage in own]
        key = "cluster.hosts" if len(cluster.kinds) == 1 else f"cluster.groups[{number}].hosts"
        places = place(shapes, kind.num_hosts, kind.devices_per_host, key)
        for stage, (hosts, devices) in zip(own, places, strict=True):
            placed[stage] = tuple(first_host + host for host in hosts), devices
        first_host += kind.num_hosts
    return tuple(placed[stage] for stage in range(len(submeshes)))


def place(
    submeshes: Sequence[tuple[int, int]], num_hosts: int, devices_per_host: int,
    key: str = "cluster.hosts",
) -> tuple[Placement, ...]:  # fmt: skip
    """Give every stage its hosts and devices: a rectangle of its shape (hosts, devices per host).

    Whole hosts first, the largest submeshes before the others; then one host after the other is
    filled with slices. With powers of two there is always room (appendix A of the paper), and every
    slice is aligned to its size; slices of other sizes may not fit though their sum does.

    Args:
        key: by which the number of hosts is set.
    """
    order = sorted(range(len(submeshes)), key=lambda stage: -math.prod(submeshes[stage]))
    placed: dict[int, Placement] = {}
    next_host = 0
    for stage in order:
        hosts, devices = submeshes[stage]
        if devices == devices_per_host and next_host + hosts <= num_hosts:
            placed[stage] = tuple(range(next_host, next_host + hosts)), tuple(range(devices))
            next_host += hosts
    slices = {stage: submeshes[stage][1] for stage in order if submeshes[stage][0] == 1}
    for host in range(next_host, num_hosts):
        first = 0
        left = {stage: width for stage, width in slices.items() if stage not in placed}
        for stage in _fullest(left, devices_per_host):
            placed[stage] = (host,), tuple(range(first, first + slices[stage]))
            first += slices[stage]
    if len(placed) < len(submeshes):
        raise InfeasiblePlanError(
            f"submeshes of {shapes_text(submeshes)} cannot be cut side by side out of {num_hosts} hosts "
            f"of {devices_per_host} devices ({key}={num_hosts}); set parallel.pp, "
            f"parallel.dp and parallel.tp so that stages take whole hosts or equal parts of one"
        )
    return tuple(placed[stage] for stage in range(len(submeshes)))


def _fullest(widths: dict[int, int], room: int) -> tuple[int, ...]:
    """The stages that fill a host best, with the first that fits among them."""
    chosen: dict[int, tuple[int, ...]] = {}  # by the sum of their widths
    for stage, width in widths.items():
        for total, stages in list(chosen.items()) or [(0, ())]:
            if total + width <= room:
                chosen.setdefault(total + width, (*stages, stage))
    return chosen[max(chosen)] if chosen else ()
