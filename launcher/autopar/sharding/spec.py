"""Sharding specs: for each axis of a mesh, what it does to a tensor.

    Spec  ::= one entry per mesh axis
    entry ::= d >= 0        the axis splits tensor dim d
            | REPLICATED    every device along the axis holds the whole
            | PARTIAL       every device along the axis holds a summand; the tensor is their sum

Where several axes split the same dim, the axis that comes first in the mesh is the major one.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache

from jax.sharding import PartitionSpec

REPLICATED = -1
PARTIAL = -2

Spec = tuple[int, ...]
Shape = tuple[int, ...]


def replicated(num_axes: int) -> Spec:
    """The spec of a tensor that every device holds whole."""
    return (REPLICATED,) * num_axes


def fits(spec: Spec, shape: Shape, mesh_shape: Sequence[int]) -> bool:
    """Whether the axes that split a dim divide it evenly: uneven shards are excluded."""
    shards: dict[int, int] = {}
    for entry, size in zip(spec, mesh_shape, strict=True):
        if entry >= 0:
            shards[entry] = shards.get(entry, 1) * size
    return all(dim < len(shape) and shape[dim] % count == 0 for dim, count in shards.items())


@cache
def all_specs(shape: Shape, mesh_shape: Shape, *, partial: bool = False) -> tuple[Spec, ...]:
    """Every spec that fits; axes of size 1 are always replicated."""
    entries = (REPLICATED, *range(len(shape)), *((PARTIAL,) if partial else ()))
    choices = [entries if size > 1 else (REPLICATED,) for size in mesh_shape]
    return tuple(s for s in itertools.product(*choices) if fits(s, shape, mesh_shape))


def num_shards(spec: Spec, mesh_shape: Sequence[int]) -> int:
    """How many pieces the tensor is cut into."""
    return math.prod(size for entry, size in zip(spec, mesh_shape, strict=True) if entry >= 0)


def local_shape(spec: Spec, shape: Shape, mesh_shape: Sequence[int]) -> Shape:
    """The shape of one device's shard."""
    local = list(shape)
    for entry, size in zip(spec, mesh_shape, strict=True):
        if entry >= 0:
            local[entry] //= size
    return tuple(local)


def partial_axes(spec: Spec) -> tuple[int, ...]:
    """The axes along which the tensor is an unreduced sum."""
    return tuple(axis for axis, entry in enumerate(spec) if entry == PARTIAL)


def to_dims(spec: Spec, rank: int, axis_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The axes that split each dim, major first."""
    return tuple(
        tuple(name for name, entry in zip(axis_names, spec, strict=True) if entry == dim)
        for dim in range(rank)
    )


def from_dims(dims: Sequence[Sequence[str]], axis_names: Sequence[str]) -> Spec:
    """The inverse of `to_dims`, for a tensor that is nowhere partial."""
    entry_of = {name: dim for dim, names in enumerate(dims) for name in names}
    return tuple(entry_of.get(name, REPLICATED) for name in axis_names)


def to_partition_spec(spec: Spec, rank: int, axis_names: Sequence[str]) -> PartitionSpec:
    """The spec as JAX writes it. A partial tensor gets one leading dim per partial axis, split by it."""
    leading = [axis_names[axis] for axis in partial_axes(spec)]
    dims = [names or None for names in to_dims(spec, rank, axis_names)]
    return PartitionSpec(*leading, *dims)


def to_text(spec: Spec, axis_names: Sequence[str]) -> str:
    """For people: `data:0 tensor:P`; an axis that replicates is left out, and `R` stands for none."""
    words = [
        f"{name}:{'P' if entry == PARTIAL else entry}"
        for name, entry in zip(axis_names, spec, strict=True)
        if entry != REPLICATED
    ]
    return " ".join(words) or "R"
