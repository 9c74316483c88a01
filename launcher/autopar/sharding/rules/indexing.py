"""Rules for ops that read by index: gather, dynamic slices; and for writing a dynamic slice.

An indexed dim may be split too (a vocabulary split over devices): every device looks up what lies in its
shard and contributes zeros elsewhere, so the gathered result is a partial sum. That is so where one dim
is indexed by itself (an embedding, the label's logit); a slice of several elements at a dynamic place, or
an index over several dims, keeps its dims whole.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import (
    AxisStrategy,
    bind_with,
    local,
    rule,
    shard_index,
)
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED


def single_indexed_dim(indexed: tuple[int, ...], removed: tuple[int, ...]) -> int | None:
    """The dim that is looked up, where the op is a plain look-up of whole rows (an embedding)."""
    return indexed[0] if len(indexed) == 1 and indexed == removed else None


def wide(indices: jax.Array) -> jax.Array:
    """A small type may be too small for the size of what it indexes."""
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def shifted(indices: jax.Array, spec, dim: int, shard_size: int, mesh) -> jax.Array:
    """Count indices from the start of this device's shard; those of other shards fall out of bounds."""
    start = shard_index(spec, dim, mesh) * shard_size
    counted = indices - jnp.asarray(start, indices.dtype)
    return jnp.where(counted < 0, jnp.asarray(shard_size, indices.dtype), counted)


@rule(prim.gather_p)
def gather(op: Op) -> Iterator[AxisStrategy]:
    numbers = op.eqn.params["dimension_numbers"]
    operand_shape = op.eqn.invars[0].aval.shape
    sizes = op.eqn.params["slice_sizes"]
    result_rank = len(op.eqn.outvars[0].aval.shape)
    batch_results = [dim for dim in range(result_rank) if dim not in numbers.offset_dims]
    for index_dim, result_dim in enumerate(batch_results):
        if index_dim in numbers.start_indices_batching_dims:
            where = numbers.start_indices_batching_dims.index(index_dim)
            operand_dim = numbers.operand_batching_dims[where]
            yield AxisStrategy((operand_dim, index_dim), (result_dim,))
        else:
            yield AxisStrategy((REPLICATED, index_dim), (result_dim,))
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [dim for dim in range(len(operand_shape)) if dim not in removed]
    for dim, result_dim in zip(kept, numbers.offset_dims, strict=True):
        if sizes[dim] == operand_shape[dim]:
            yield AxisStrategy((dim, REPLICATED), (result_dim,))
    looked_up = single_indexed_dim(numbers.start_index_map, numbers.collapsed_slice_dims)
    if looked_up is not None:
        yield AxisStrategy((looked_up, REPLICATED), (PARTIAL,))
    fill = _fill_value(op)
    if fill == 0 or math.isnan(fill):  # the sum of what fills is what fills
        yield AxisStrategy((PARTIAL, REPLICATED), (PARTIAL,))


def _fill_value(op: Op) -> float | int:
    """What an index out of bounds yields; 0 where it yields an element.

    Left open, it is not-a-number or, for integers, the lowest or highest, as `lax.gather` has it.
    """
    if op.eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return 0
    fill, dtype = op.eqn.params["fill_value"], op.eqn.outvars[0].aval.dtype
    if fill is not None:
        return np.asarray(fill).item()
    if not jnp.issubdtype(dtype, jnp.integer):
        return math.nan
    limits = jnp.iinfo(dtype)
    return int(limits.min if jnp.issubdtype(dtype, jnp.signedinteger) else limits.max)


@local(prim.gather_p)
def local_gather(op, strategy, mesh, values):
    operand, indices = values
    numbers = op.eqn.params["dimension_numbers"]
    spec = strategy.operand_spec(0)
    whole = op.eqn.invars[0].aval.shape
    sizes = tuple(
        operand.shape[dim]
        if size == whole[dim] and dim not in numbers.collapsed_slice_dims
        else size
        for dim, size in enumerate(op.eqn.params["slice_sizes"])
    )
    dim = single_indexed_dim(numbers.start_index_map, numbers.collapsed_slice_dims)
    if dim is None or dim not in spec:
        return bind_with(op, values, slice_sizes=sizes)
    indices = wide(indices)
    if op.eqn.params["mode"] in (
        lax.GatherScatterMode.CLIP,
        lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    ):
        indices = jnp.clip(indices, 0, whole[dim] - 1)  # as XLA does for broken promises
    (found,) = bind_with(
        op,
        (operand, shifted(indices, spec, dim, operand.shape[dim], mesh)),
        slice_sizes=sizes,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
        unique_indices=False,
    )
    if _fill_value(op) == 0:
        return (found,)
    is_outside = (indices[..., 0] < 0) | (indices[..., 0] >= whole[dim])
    return (_filled(op, found, is_outside, shard_index(spec, dim, mesh) == 0),)


def _filled(op: Op, found: jax.Array, is_outside: jax.Array, is_first: jax.Array) -> jax.Array:
    """What no shard of the operand has: the first shard yields what the op fills in."""
    offset_dims = op.eqn.params["dimension_numbers"].offset_dims
    batch_dims = [dim for dim in range(found.ndim) if dim not in offset_dims]
    where = lax.broadcast_in_dim(is_outside & is_first, found.shape, batch_dims)
    return jnp.where(where, jnp.asarray(_fill_value(op), found.dtype), found)


@rule(prim.dynamic_slice_p)
def dynamic_slice(op: Op) -> Iterator[AxisStrategy]:
    source, target = op.eqn.invars[0].aval.shape, op.eqn.outvars[0].aval.shape
    indices = (REPLICATED,) * (len(op.operands) - 1)
    for dim, (before, after) in enumerate(zip(source, target, strict=True)):
        if before == after:
            yield AxisStrategy((dim, *indices), (dim,))
    yield AxisStrategy((PARTIAL, *indices), (PARTIAL,))


@local(prim.dynamic_slice_p)
def local_dynamic_slice(op, strategy, mesh, values):
    spec = strategy.operand_spec(0)
    sizes = tuple(
        values[0].shape[dim] if dim in spec else size
        for dim, size in enumerate(op.eqn.params["slice_sizes"])
    )
    return bind_with(op, values, slice_sizes=sizes)


@rule(prim.dynamic_update_slice_p)
def dynamic_update_slice(op: Op) -> Iterator[AxisStrategy]:
    whole, update = op.eqn.invars[0].aval.shape, op.eqn.invars[1].aval.shape
    indices = (REPLICATED,) * (len(op.operands) - 2)
    for dim, (before, after) in enumerate(zip(whole, update, strict=True)):
        if before == after:
            yield AxisStrategy((dim, dim, *indices), (dim,))
    yield AxisStrategy((PARTIAL, PARTIAL, *indices), (PARTIAL,))
