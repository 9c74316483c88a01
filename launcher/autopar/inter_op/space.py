"""What the search may combine: the options as sets of choices, and which degrees fill a cluster.

In the modes without search a stage is one rectangle of data x tensor devices, and the data axis takes the
devices that remain. In `auto` a forced degree holds for every stage: stages get submeshes whose devices the
degrees can share, and a plan must exist that gives every device a stage. Experts are split over the data
axis, so parallel.ep=N forces that axis to N devices.

What to say where nothing fits is in `advice`.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import optax

from launcher.autopar.clusters.hosts import AnyCluster, Cluster
from launcher.autopar.inter_op.stage_costs import Choices
from launcher.autopar.programs.schedules import LEAST_VIRTUAL_STAGES
from launcher.autopar.sharding.restrictions import Experts

_VIRTUAL_STAGES = (2, 3, 4)
_MOST_PIECES, _MOST_PIECES_OF_FEW = 24, 48  # of a model, on many devices and on few
_FEW_DEVICES = 8
_MOST_LEFT = 200  # numbers of devices that the DP over stages counts on several kinds of hosts


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
        submeshes: Shapes that a stage may have; beside them, `kinds` says of which kind of hosts each is.
        devices: How many there are to use, by kind.
        num_submeshes: That the stages lie on; None leaves their number open.
        schedules: Names, and how many stages a submesh holds.
        most_pieces: That the layers are cut into, unless there are more stages.
    """

    submeshes: tuple[tuple[int, int], ...]
    kinds: tuple[int, ...]
    devices: tuple[int, ...]
    num_submeshes: int | None
    choices: Choices
    schedules: tuple[tuple[str, int], ...]
    most_pieces: int = _MOST_PIECES

    @property
    def num_devices(self) -> int:
        return sum(self.devices)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The devices that submeshes may have."""
        return tuple(sorted({hosts * devices for hosts, devices in self.submeshes}))

    def only(self, submeshes: Collection[int]) -> "Space":
        """The part of it with these submeshes."""
        kept = sorted(submeshes)
        return replace(
            self,
            submeshes=tuple(self.submeshes[index] for index in kept),
            kinds=tuple(self.kinds[index] for index in kept),
        )

    def like(self, submeshes: Collection[int], times: int) -> "Space":
        """The part with submeshes of as many devices as these, or up to so many times as many or as few."""
        sizes = [hosts * devices for hosts, devices in self.submeshes]
        least = min(sizes[number] for number in submeshes) / times
        most = max(sizes[number] for number in submeshes) * times
        return self.only({n for n, size in enumerate(sizes) if least <= size <= most})

    def numbers_in(self, whole: "Space") -> list[int]:
        """Of each submesh, its number in the space that this is a part of."""
        numbers = {
            place: n for n, place in enumerate(zip(whole.submeshes, whole.kinds, strict=True))
        }
        return [numbers[place] for place in zip(self.submeshes, self.kinds, strict=True)]

    @property
    def has_pipelines(self) -> bool:
        """Whether plans may have more than one stage."""
        return self.num_submeshes != 1 or any(v > 1 for _, v in self.schedules)

    def describe_limits(self, whole: "Space") -> str:
        """What this part of a space is limited to, in words; nothing for all of it."""
        limits = []
        if self.sizes != whole.sizes:
            limits.append(f" on submeshes of {', '.join(map(str, self.sizes))} devices")
        if self.choices.zero != whole.choices.zero:
            limits.append(f" with ZeRO {', '.join(map(str, self.choices.zero))}")
        return "".join(limits)

    def describe(self) -> str:
        """What a plan of the space may be, in words."""
        names = [name if v == 1 else f"{name} x {v}" for name, v in self.schedules]
        zero = self.choices.zero
        last = ["3"] if len(zero) > 1 and 3 in zero else []
        last += ["scattered gradients"] if max(zero) > 1 else []
        scarce = f" ({' and '.join(last)} where memory is scarce)" if last else ""
        return (
            f"schedules {', '.join(names)}; submeshes of {', '.join(map(str, self.sizes))} "
            f"devices; recomputation {', '.join(self.choices.recompute)}; ZeRO "
            f"{', '.join(map(str, zero))}{scarce}; strategies of the sharding problems"
        )


@dataclass(frozen=True, slots=True)
class StageView:
    """One way for a stage to see the devices of its submesh, on hosts of a kind."""

    kind: int
    hosts: int
    devices: int
    data: int
    tensor: int

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices


def make_space(options: PlanOptions, cluster: AnyCluster) -> Space:
    """Turn options whose degrees fit the cluster into sets of choices."""
    searches = options.mode == "auto"
    zero = {"auto": (0, 2, 3), "zero": (2,)}.get(options.mode, (0,))
    recompute = ("none", "layer", "full") if searches else ("none",)
    data, tensor, pp = forced_degrees(options, cluster)
    views = stage_views(options, cluster)
    places = tuple(dict.fromkeys((view.kind, view.hosts, view.devices) for view in views))
    devices = devices_by_kind(options, cluster)
    choices = Choices(
        zero=zero if options.zero is None else (options.zero,),
        recompute=recompute if options.recompute is None else (options.recompute,),
        tensor=tensor,
        data=data,
        experts=_experts(options),
    )
    return Space(
        submeshes=tuple((hosts, devices) for _, hosts, devices in places),
        kinds=tuple(kind for kind, _, _ in places),
        devices=devices,
        num_submeshes=pp,
        choices=choices,
        schedules=schedules(options, cluster),
        most_pieces=_MOST_PIECES if sum(devices) > _FEW_DEVICES else _MOST_PIECES_OF_FEW,
    )


def schedules(options: PlanOptions, cluster: AnyCluster) -> tuple[tuple[str, int], ...]:
    """The schedules that a plan may have, by name and stages on a submesh.

    Several stages on a submesh take equal submeshes, which several kinds of hosts do not have.
    """
    is_open = options.mode == "auto" and options.virtual_stages is None
    if not is_open or options.schedule not in (None, "interleaved"):
        return ((options.schedule or "1f1b", virtual_stages(options)),)
    alike = len(cluster.kinds) == 1
    interleaved = tuple(("interleaved", v) for v in _VIRTUAL_STAGES if alike)
    return (
        interleaved if options.schedule else (("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), *interleaved)
    )


def virtual_stages(options: PlanOptions) -> int:
    """How many stages a submesh holds, where it is left open the least that the schedule takes."""
    least = LEAST_VIRTUAL_STAGES if options.schedule == "interleaved" else 1
    return options.virtual_stages or least


def devices_by_kind(options: PlanOptions, cluster: AnyCluster) -> tuple[int, ...]:
    """How many devices of each kind a mode uses: all, or the very first."""
    if options.mode == "single":
        return tuple(int(number == 0) for number in range(len(cluster.kinds)))
    return tuple(kind.num_devices for kind in cluster.kinds)


def num_devices(options: PlanOptions, cluster: AnyCluster) -> int:
    """How many devices of the cluster a mode uses."""
    return sum(devices_by_kind(options, cluster))


def forced_degrees(
    options: PlanOptions, cluster: AnyCluster
) -> tuple[int | None, int | None, int | None]:
    """The degrees (data, tensor, pipeline) that hold for every stage; None leaves one free.

    The devices that remain for a data axis are not the same on every kind of hosts.
    """
    if options.mode == "auto":
        return options.ep if _splits_experts(options) else options.dp, options.tp, options.pp
    tensor, stages = options.tp or 1, options.pp or 1
    if options.mode == "manual" and len(cluster.kinds) > 1:
        return options.dp, tensor, stages
    remaining = max(1, num_devices(options, cluster) // (tensor * stages))
    return options.dp or remaining, tensor, stages


def stage_views(options: PlanOptions, cluster: AnyCluster) -> tuple[StageView, ...]:
    """Every mesh that a stage may get; a tensor axis stays inside a host."""
    data, tensor, stages = forced_degrees(options, cluster)
    views = tuple(
        StageView(number, hosts, devices, hosts * devices // degree, degree)
        for number, kind in enumerate(cluster.kinds)
        for hosts, devices in _submeshes(options, cluster, kind)
        for degree in range(1, devices + 1)
        if devices % degree == 0
        and tensor in (None, degree)
        and data in (None, hosts * devices // degree)
    )
    if len(cluster.kinds) > 1 and stages is None:
        return _coarse_enough(views, devices_by_kind(options, cluster))
    return views


def _coarse_enough(views: tuple[StageView, ...], totals: Sequence[int]) -> tuple[StageView, ...]:
    """Without the smallest submeshes, until few enough numbers of devices can be left to other stages.

    The DP over stages counts the devices of every kind, each with each (`device_axis`).
    """
    unit = 1
    while _num_left(views, totals) > _MOST_LEFT and not any(total % (2 * unit) for total in totals):
        unit *= 2
        coarser = tuple(view for view in views if view.num_devices % unit == 0)
        if len({view.kind for view in coarser}) < len(totals):
            break
        views = coarser
    return views


def _num_left(views: Sequence[StageView], totals: Sequence[int]) -> int:
    """How many numbers of devices of all kinds there are to count."""
    sizes = [{view.num_devices for view in views if view.kind == k} for k in range(len(totals))]
    units = [math.gcd(*own, total) for own, total in zip(sizes, totals, strict=True)]
    return math.prod(total // unit + 1 for total, unit in zip(totals, units, strict=True))


def _submeshes(
    options: PlanOptions, cluster: AnyCluster, kind: Cluster
) -> Iterator[tuple[int, int]]:
    """The shapes that a stage may have on hosts of a kind."""
    data, tensor, _ = forced_degrees(options, cluster)
    if options.mode == "auto" or data is None:
        yield from ((submesh.hosts, submesh.devices) for submesh in kind.submeshes())
        return
    width, per_host = data * tensor, kind.devices_per_host
    if width < per_host and per_host % width == 0:
        yield 1, width
    elif width % per_host == 0 and width <= kind.num_devices:
        yield width // per_host, per_host


def fits(options: PlanOptions, cluster: AnyCluster, microbatch_size: int | None = None) -> bool:
    """Whether stages of the forced degrees can use up the devices.

    Args:
        microbatch_size: Samples that the data axis of every stage must be able to share evenly.
    """
    if not experts_fit(options, cluster):
        return False
    totals = devices_by_kind(options, cluster)
    sizes = [set() for _ in totals]
    for view in stage_views(options, cluster):
        if microbatch_size is None or microbatch_size % view.data == 0:
            sizes[view.kind].add(view.num_devices)
    _, _, stages = forced_degrees(options, cluster)
    if len(totals) == 1:
        return _adds_up(sizes[0], totals[0], stages)
    return _all_add_up(sizes, totals, stages)


def experts_fit(options: PlanOptions, cluster: AnyCluster) -> bool:
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


def _all_add_up(sizes: Sequence[set[int]], totals: Sequence[int], number: int | None) -> bool:
    """Whether the totals are sums out of their sizes, with `number` terms (None: any) altogether."""
    reached = {0}
    for own, total in zip(sizes, totals, strict=True):
        reached = {n + more for n in reached for more in _numbers_of_terms(frozenset(own), total)}
    return bool(reached) if number is None else number in reached


@lru_cache
def _numbers_of_terms(sizes: frozenset[int], total: int) -> frozenset[int]:
    """With how many terms out of `sizes` a total can be made up."""
    if not total:
        return frozenset({0})
    found, sums, mask = set(), 1, (1 << (total + 1)) - 1  # bit d: d devices can be used up
    for number in range(1, total // min(sizes, default=total + 1) + 1):
        before, sums = sums, 0
        for size in sizes:
            sums |= before << size & mask
        if sums >> total & 1:
            found.add(number)
    return frozenset(found)


def microbatch_counts(options: PlanOptions, cluster: AnyCluster) -> tuple[int, ...]:
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
