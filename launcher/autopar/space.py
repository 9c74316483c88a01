"""What the search may combine: the options as sets of choices, and which degrees fill a cluster.

In the modes without search a stage is one rectangle of data x tensor devices, and the data axis takes the
devices that remain. In `auto` a forced degree holds for every stage: stages get submeshes whose devices the
degrees can share, and a plan must exist that gives every device a stage. Experts are split over the data
axis, so parallel.ep=N forces that axis to N devices.

What to say where nothing fits is in `advice`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import optax

from launcher.autopar.cluster import Cluster
from launcher.autopar.restrictions import Experts
from launcher.autopar.schedules import LEAST_VIRTUAL_STAGES
from launcher.autopar.stage_costs import Choices

_VIRTUAL_STAGES = (2, 3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is asked of the planner; None leaves a choice to it.

    Attributes:
        mode: "single", "data", "zero", "manual" or "auto".
        equal_layers: stages get equally many layers, as where nobody balances them.
        optimizer: decides how many bytes of state a parameter has.
    """

    mode: str
    global_batch: int
    num_microbatches: int | None = None
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    equal_layers: bool = False
    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.adamw(1e-3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the search may combine, worked out from the options and the cluster.

    Attributes:
        num_submeshes: That the stages lie on; None leaves their number open.
        schedules: Names, and how many stages a submesh holds.
    """

    submeshes: tuple[tuple[int, int], ...]
    num_devices: int
    num_submeshes: int | None
    choices: Choices
    schedules: tuple[tuple[str, int], ...]

    def describe(self) -> str:
        """What a plan of the space may be, in words."""
        shapes = [hosts * devices for hosts, devices in self.submeshes]
        names = [name if v == 1 else f"{name} x {v}" for name, v in self.schedules]
        zero = self.choices.zero
        scarce = " (3 where memory is scarce)" if len(zero) > 1 and 3 in zero else ""
        return (
            f"schedules {', '.join(names)}; submeshes of {', '.join(map(str, sorted(set(shapes))))} "
            f"devices; recomputation {', '.join(self.choices.recompute)}; ZeRO "
            f"{', '.join(map(str, zero))}{scarce}; strategies of the sharding problems"
        )


@dataclass(frozen=True, slots=True)
class StageView:
    """One way for a stage to see the devices of its submesh."""

    hosts: int
    devices: int
    data: int
    tensor: int


def make_space(options: PlanOptions, cluster: Cluster) -> Space:
    """Turn options whose degrees fit the cluster into sets of choices."""
    searches = options.mode == "auto"
    zero = {"auto": (0, 2, 3), "zero": (2,)}.get(options.mode, (0,))
    recompute = ("none", "layer", "full") if searches else ("none",)
    data, tensor, pp = forced_degrees(options, cluster)
    views = stage_views(options, cluster)
    choices = Choices(
        zero=zero if options.zero is None else (options.zero,),
        recompute=recompute if options.recompute is None else (options.recompute,),
        tensor=tensor,
        data=data,
        experts=_experts(options),
    )
    return Space(
        submeshes=tuple(dict.fromkeys((view.hosts, view.devices) for view in views)),
        num_devices=num_devices(options, cluster),
        num_submeshes=pp,
        choices=choices,
        schedules=schedules(options),
    )


def schedules(options: PlanOptions) -> tuple[tuple[str, int], ...]:
    """The schedules that a plan may have, by name and stages on a submesh."""
    is_open = options.mode == "auto" and options.virtual_stages is None
    if not is_open or options.schedule not in (None, "interleaved"):
        return ((options.schedule or "1f1b", virtual_stages(options)),)
    interleaved = tuple(("interleaved", v) for v in _VIRTUAL_STAGES)
    return (
        interleaved if options.schedule else (("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), *interleaved)
    )


def virtual_stages(options: PlanOptions) -> int:
    """How many stages a submesh holds, where it is left open the least that the schedule takes."""
    least = LEAST_VIRTUAL_STAGES if options.schedule == "interleaved" else 1
    return options.virtual_stages or least


def num_devices(options: PlanOptions, cluster: Cluster) -> int:
    """How many devices of the cluster a mode uses."""
    return 1 if options.mode == "single" else cluster.num_devices


def forced_degrees(
    options: PlanOptions, cluster: Cluster
) -> tuple[int | None, int | None, int | None]:
    """The degrees (data, tensor, pipeline) that hold for every stage; None leaves one free."""
    if options.mode == "auto":
        return options.ep if _splits_experts(options) else options.dp, options.tp, options.pp
    tensor, stages = options.tp or 1, options.pp or 1
    remaining = max(1, num_devices(options, cluster) // (tensor * stages))
    return options.dp or remaining, tensor, stages


def stage_views(options: PlanOptions, cluster: Cluster) -> tuple[StageView, ...]:
    """Every mesh that a stage may get; a tensor axis stays inside a host."""
    data, tensor, _ = forced_degrees(options, cluster)
    return tuple(
        StageView(hosts, devices, hosts * devices // degree, degree)
        for hosts, devices in _submeshes(options, cluster)
        for degree in range(1, devices + 1)
        if devices % degree == 0
        and tensor in (None, degree)
        and data in (None, hosts * devices // degree)
    )


def _submeshes(options: PlanOptions, cluster: Cluster) -> Iterator[tuple[int, int]]:
    if options.mode == "auto":
        yield from ((submesh.hosts, submesh.devices) for submesh in cluster.submeshes())
        return
    data, tensor, _ = forced_degrees(options, cluster)
    width, per_host = data * tensor, cluster.devices_per_host
    if width < per_host and per_host % width == 0:
        yield 1, width
    elif width % per_host == 0 and width <= cluster.num_devices:
        yield width // per_host, per_host


def fits(options: PlanOptions, cluster: Cluster, microbatch_size: int | None = None) -> bool:
    """Whether stages of the forced degrees can use up the devices.

    Args:
        microbatch_size: Samples that the data axis of every stage must be able to share evenly.
    """
    if not experts_fit(options, cluster):
        return False
    sizes = {
        view.hosts * view.devices
        for view in stage_views(options, cluster)
        if microbatch_size is None or microbatch_size % view.data == 0
    }
    _, _, stages = forced_degrees(options, cluster)
    return _adds_up(sizes, num_devices(options, cluster), stages)


def experts_fit(options: PlanOptions, cluster: Cluster) -> bool:
    """Whether experts are left whole, or the data axis has the devices that they are split over."""
    if not _splits_experts(options):
        return True
    data, _, _ = forced_degrees(options, cluster)
    return data == options.ep and options.dp in (None, options.ep)


def _adds_up(sizes: set[int], total: int, number: int | None) -> bool:
    """Whether `number` terms out of `sizes` (None: any number) make up `total`."""
    if any(total % size == 0 and number in (None, total // size) for size in sizes):
        return True  # stages of one size
    reached, mask = 1, (1 << (total + 1)) - 1  # bit d: d devices can be used up
    for _ in range(total if number is None else number):
        sums = reached if number is None else 0
        for size in sizes:
            sums |= reached << size & mask
        if sums == reached:
            break
        reached = sums
    return bool(reached >> total)


def microbatch_counts(options: PlanOptions, cluster: Cluster) -> tuple[int, ...]:
    """The divisors of the global batch whose microbatches every data axis can share, descending.

    And that the schedule can group, where it must.
    """
    batch = options.global_batch
    sizes = (size for size in divisors(batch) if fits(options, cluster, size))
    counts = (batch // size for size in sizes)
    # The interleaved schedule takes its microbatches in groups of a submesh each.
    group = (options.pp or 1) if virtual_stages(options) > 1 else 1
    return tuple(number for number in counts if number % group == 0)


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})


def _splits_experts(options: PlanOptions) -> bool:
    return options.ep is not None and options.ep > 1


def _experts(options: PlanOptions) -> Experts:
    if options.ep is None:
        return Experts.FREE
    return Experts.FORCED if _splits_experts(options) else Experts.NEVER
