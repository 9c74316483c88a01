"""Where a plan puts the model's tensors, folded for people: 48 equal blocks are one line.

Parameters are of one group if their paths differ in numbers only (`blocks/3/mlp/up/kernel`) and
their shapes are equal. What a group's members have in common per stage is one placement.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from launcher.autopar.plans.plan import DimSpec, Plan, SpecList, Stage

Shape = tuple[int, ...]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
_NUMBER = re.compile(r"(?<![^/])\d+(?![^/])")  # a whole part of a path


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a tensor is cut.

    Attributes:
        text: Per dim the axes that split it and into how many, as `[-, tensor=4]`; `-`: whole.
        shards: Per dim, into how many.
    """

    text: str
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How tensors lie in some stages; `optimizer_state` is None where the plan does not say."""

    stages: tuple[int, ...]
    weights: Split
    optimizer_state: Split | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Parameters that differ in the numbers of their paths only.

    Attributes:
        name: Their path, with `*` for the numbers if there are several.
        shape: None if the model's shapes are not at hand.
        num_bytes: Of all members together; 0 without a shape.
    """

    name: str
    members: int
    shape: Shape | None
    num_bytes: int
    placements: tuple[Placement, ...]


def tensor_groups(plan: Plan, params: Shapes) -> tuple[TensorGroup, ...]:
    """Fold the parameters of a plan, the group with the most bytes first.

    Args:
        params: Of the model, by path; without them tensors with more dims come first.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for index, stage in enumerate(plan.stages):
        for path in stage.params:
            places[path].append(index)
    families: dict[tuple[str, Shape | None, int], list[str]] = defaultdict(list)
    for path, stages in places.items():
        shape = params[path].shape if path in params else None
        rank = len(plan.stages[stages[0]].params[path])
        families[_NUMBER.sub("*", path), shape, rank].append(path)
    groups = {
        (pattern, shape, rank): _group(plan, pattern, shape, paths, places, params)
        for (pattern, shape, rank), paths in families.items()
    }
    order = sorted(groups, key=lambda key: (-groups[key].num_bytes, -key[2], key[0]))
    return tuple(groups[key] for key in order)


def _group(
    plan: Plan,
    pattern: str,
    shape: Shape | None,
    paths: list[str],
    places: Mapping[str, list[int]],
    params: Shapes,
) -> TensorGroup:
    found: dict[tuple[Split, Split | None], set[int]] = defaultdict(set)
    for path in paths:
        for index in places[path]:
            found[_splits(plan.stages[index], path)].add(index)
    each_bytes = 0 if shape is None else math.prod(shape) * params[paths[0]].dtype.itemsize
    return TensorGroup(
        name=pattern if len(paths) > 1 else paths[0],
        members=len(paths),
        shape=shape,
        num_bytes=each_bytes * len(paths),
        placements=tuple(
            Placement(stages=tuple(sorted(stages)), weights=weights, optimizer_state=state)
            for (weights, state), stages in sorted(found.items(), key=lambda item: min(item[1]))
        ),
    )


def _splits(stage: Stage, path: str) -> tuple[Split, Split | None]:
    lengths = dict(stage.mesh)
    state = stage.optimizer_state.get(path)
    return _split(stage.params[path], lengths), None if state is None else _split(state, lengths)


def _split(spec: SpecList, lengths: Mapping[str, int]) -> Split:
    """Describe a spec; an axis of one device splits nothing, and is left out."""
    dims, shards = [], []
    for dim in spec:
        axes = [axis for axis in _axes(dim) if lengths.get(axis, 1) > 1]
        shards.append(math.prod(lengths[axis] for axis in axes))
        dims.append(f"{'*'.join(axes)}={shards[-1]}" if axes else "-")
    return Split(text=f"[{', '.join(dims)}]", shards=tuple(shards))


def _axes(dim: DimSpec) -> tuple[str, ...]:
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, str) else dim
