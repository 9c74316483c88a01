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
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.spec import PARTIAL, REPLICATED, Shape, Spec, fits, local_shape


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


@lru_cache(maxsize=None)
def reshard(shape: Shape, itemsize: int, source: Spec, target: Spec, mesh: LogicalMesh):
    """Return the cheapest steps from one spec to another, as a tuple; () where they agree."""
    if source == target:
        return ()
    paths = _shortest_paths(shape, itemsize, source, mesh)
    return paths[target][1]


@lru_cache(maxsize=None)
def reshard_cost(shape: Shape, itemsize: int, source: Spec, target: Spec, mesh: LogicalMesh):
    """What `reshard` costs, in the mesh's unit; infinite where no path leads there."""
    if source == target:
        return 0.0
    paths = _shortest_paths(shape, itemsize, source, mesh)
    return paths[target][0] if target in paths else math.inf


@lru_cache(maxsize=None)
def _shortest_paths(shape: Shape, itemsize: int, source: Spec, mesh: LogicalMesh):
    """Dijkstra's algorithm from `source`: spec -> (cost, steps). Ties go to fewer steps."""
    settled: dict[Spec, tuple[float, tuple[Step, ...]]] = {}
    queue: list[tuple[float, int, int, Spec, tuple[Step, ...]]] = [(0.0, 0, 0, source, ())]
    pushed = 0
    while queue:
        cost, _, _, spec, steps = heapq.heappop(queue)
        if spec in settled:
            continue
        settled[spec] = (cost, steps)
        for step in _steps_from(shape, itemsize, spec, mesh):
            if step.target not in settled:
                pushed += 1
                entry = (cost + step_cost(step, mesh), len(steps) + 1, pushed, step.target)
                heapq.heappush(queue, (*entry, (*steps, step)))
    return settled


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
            if kind is None or not (_is_minor(spec, axis, entry) and _is_minor(spec, axis, target_entry)):
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
