"""Resharding: the steps that turn one sharding of a tensor into another, and their price.

Every step changes the entry of one mesh axis:

    split d -> replicated   all-gather          partial -> replicated   all-reduce
    split d -> split e      all-to-all          partial -> split d      reduce-scatter
    replicated -> split d   slice (free)        replicated -> partial   mask (free)

`reshard` returns the cheapest sequence: the shortest path over the specs of the tensor. The planner
prices that list and the emitter executes it. Where several axes split one dim, only the minor one may be
added or removed, since the shards must stay contiguous. Axes are never reduced or gathered jointly.
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial

import numpy as np

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.sharding.spec import (
    PARTIAL,
    REPLICATED,
    Shape,
    Spec,
    all_specs,
    fits,
    local_shape,
)


class Kind(Enum):
    """What a step does; the value is the name of the collective, as HLO writes it."""

    ALL_GATHER = "all-gather"
    ALL_REDUCE = "all-reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"
    SLICE = "slice"
    MASK = "mask"

    @property
    def communicates(self) -> bool:
        return self not in (Kind.SLICE, Kind.MASK)


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one axis: `source` and `target` are the specs before and after."""

    kind: Kind
    axis: int
    source: Spec
    target: Spec
    num_bytes: int  # per device: what an all-gather ends with, what the others begin with


@cache
def reshard(
    shape: Shape, itemsize: int, source: Spec, target: Spec, mesh: LogicalMesh
) -> tuple[Step, ...]:
    """Return the cheapest steps from one spec to another; () where they agree."""
    return () if source == target else _paths_from(shape, itemsize, source, mesh).to(target)


def reshard_cost(
    shape: Shape, itemsize: int, source: Spec, target: Spec, mesh: LogicalMesh
) -> float:
    """What `reshard` costs, in the mesh's unit."""
    costs = reshard_costs(shape, itemsize, mesh)
    return float(costs.between[costs.number[source], costs.number[target]])


@dataclass(frozen=True, slots=True, eq=False)
class ReshardCosts:
    """The costs between all specs of a tensor: `between[number[source], number[target]]`."""

    number: Mapping[Spec, int]
    between: np.ndarray


@cache
def reshard_costs(shape: Shape, itemsize: int, mesh: LogicalMesh) -> ReshardCosts:
    """The cost of `reshard` for every pair of specs, by Floyd's algorithm."""
    splits = tuple(
        tuple(size % count == 0 for count in _split_counts(mesh.shape)) for size in shape
    )
    number, alike = _single_steps(splits, mesh)
    between = np.full((len(number), len(number)), np.inf)
    np.fill_diagonal(between, 0.0)
    for (step, fraction), pairs in alike.items():
        num_bytes = fraction * itemsize * math.prod(shape)
        between[tuple(zip(*pairs, strict=True))] = step_cost(
            replace(step, num_bytes=num_bytes), mesh
        )
    for via in range(len(number)):
        np.minimum(between, between[:, via, None] + between[None, via, :], out=between)
    return ReshardCosts(number, between)


def _split_counts(mesh_shape: Shape) -> tuple[int, ...]:
    """Into how many shards a dim may be cut, by one axis or several."""
    chosen = itertools.product((False, True), repeat=len(mesh_shape))
    return tuple(math.prod(itertools.compress(mesh_shape, mask)) for mask in chosen)


@cache
def _single_steps(splits: tuple[tuple[bool, ...], ...], mesh: LogicalMesh):
    """Single steps between the specs of all tensors with the same evenly divisible dims.

    Returns the specs' numbers, and for each (step, bytes as a fraction of the tensor's) the pairs of specs
    between which it goes: what it costs depends on nothing else.
    """
    counts = _split_counts(mesh.shape)
    divisors = [math.lcm(*itertools.compress(counts, even)) for even in splits]
    shape = tuple(divisors)  # the smallest tensor with just these dims divisible
    specs = all_specs(shape, mesh.shape, partial=True)
    number = {spec: i for i, spec in enumerate(specs)}
    alike: dict[tuple[Step, float], list[tuple[int, int]]] = defaultdict(list)
    for spec in specs:
        for step in _steps_from(shape, 1, spec, mesh):
            pattern = replace(step, source=(), target=(), num_bytes=0)
            pair = number[spec], number[step.target]
            alike[pattern, step.num_bytes / math.prod(shape)].append(pair)
    return number, alike


@cache
def _paths_from(shape: Shape, itemsize: int, source: Spec, mesh: LogicalMesh) -> "_Paths":
    return _Paths(shape, itemsize, source, mesh)


class _Paths:
    """Dijkstra's algorithm from one spec, as far as it has been asked for. Ties go to fewer steps."""

    def __init__(self, shape: Shape, itemsize: int, source: Spec, mesh: LogicalMesh):
        self._steps_from = partial(_steps_from, shape, itemsize, mesh=mesh)
        self._mesh = mesh
        self._settled: dict[Spec, tuple[Step, ...]] = {}
        self._queue: list[tuple[float, int, int, Spec, tuple[Step, ...]]] = [
            (0.0, 0, 0, source, ())
        ]
        self._pushed = 0

    def to(self, target: Spec) -> tuple[Step, ...]:
        """The steps to a spec; KeyError where none lead there."""
        while self._queue and target not in self._settled:
            cost, _, _, spec, steps = heapq.heappop(self._queue)
            if spec not in self._settled:
                self._settled[spec] = steps
                self._push_from(spec, cost, steps)
        return self._settled[target]

    def _push_from(self, spec: Spec, cost: float, steps: tuple[Step, ...]) -> None:
        for step in self._steps_from(spec):
            self._pushed += 1
            entry = (cost + step_cost(step, self._mesh), len(steps) + 1, self._pushed, step.target)
            heapq.heappush(self._queue, (*entry, (*steps, step)))


def step_cost(step: Step, mesh: LogicalMesh) -> float:
    """The price of one step, in the mesh's unit."""
    match step.kind:
        case Kind.ALL_GATHER:
            return mesh.all_gather(step.axis, step.num_bytes)
        case Kind.ALL_REDUCE:
            return mesh.all_reduce(step.axis, step.num_bytes)
        case Kind.REDUCE_SCATTER:
            return mesh.reduce_scatter(step.axis, step.num_bytes)
        case Kind.ALL_TO_ALL:
            return mesh.all_to_all(step.axis, step.num_bytes)
        case Kind.SLICE | Kind.MASK:
            return 0.0


def _steps_from(shape: Shape, itemsize: int, spec: Spec, mesh: LogicalMesh) -> Iterator[Step]:
    held_bytes = itemsize * math.prod(local_shape(spec, shape, mesh.shape))
    for axis, entry in enumerate(spec):
        if mesh.shape[axis] == 1:
            continue
        for target_entry in (REPLICATED, PARTIAL, *range(len(shape))):
            kind = _kind(entry, target_entry)
            if kind is None or kind.value in mesh.forbidden:
                continue
            if not (_is_minor(spec, axis, entry) and _is_minor(spec, axis, target_entry)):
                continue
            target = (*spec[:axis], target_entry, *spec[axis + 1 :])
            if fits(target, shape, mesh.shape):
                gathered = held_bytes * mesh.shape[axis] if kind is Kind.ALL_GATHER else held_bytes
                yield Step(kind, axis, spec, target, gathered)


def _kind(entry: int, target: int) -> Kind | None:
    """The step that changes an entry so, if there is one."""
    if entry == target:
        return None
    if entry == REPLICATED:
        return Kind.MASK if target == PARTIAL else Kind.SLICE
    if entry == PARTIAL:
        return Kind.ALL_REDUCE if target == REPLICATED else Kind.REDUCE_SCATTER
    if target == PARTIAL:
        return None
    return Kind.ALL_GATHER if target == REPLICATED else Kind.ALL_TO_ALL


def _is_minor(spec: Spec, axis: int, entry: int) -> bool:
    """Whether no later axis splits the same dim."""
    return entry < 0 or entry not in spec[axis + 1 :]
