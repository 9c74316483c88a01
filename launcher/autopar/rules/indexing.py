"""Rules for ops that address elements by index: gather, scatter, dynamic slices.

An indexed dim may be split too (a vocabulary split over devices): every device looks up what lies in its
shard and contributes zeros elsewhere, so the gathered result is a partial sum.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graph import Op
from launcher.autopar.rules.registry import (
    AxisStrategy,
    bind_with,
    evaluate_op,
    local,
    operand_rank,
    rule,
    shard_index,
)
from launcher.autopar.spec import PARTIAL, REPLICATED


def _single_indexed_dim(indexed: tuple[int, ...], removed: tuple[int, ...]) -> int | None:
    """The dim that is looked up, where the op is a plain look-up of whole rows (an embedding)."""
    return indexed[0] if len(indexed) == 1 and indexed == removed else None


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
    looked_up = _single_indexed_dim(numbers.start_index_map, numbers.collapsed_slice_dims)
    if looked_up is not None and jnp.issubdtype(op.eqn.invars[0].aval.dtype, jnp.inexact):
        yield AxisStrategy((looked_up, REPLICATED), (PARTIAL,))
    yield AxisStrategy((PARTIAL, REPLICATED), (PARTIAL,))


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
    looked_up = _single_indexed_dim(numbers.start_index_map, numbers.collapsed_slice_dims)
    if looked_up is None or looked_up not in spec:
        return bind_with(op, values, slice_sizes=sizes)
    shifted = _shift(_clamped(op, indices, whole[looked_up]), spec, looked_up, operand, mesh)
    changed = {"slice_sizes": sizes, "mode": lax.GatherScatterMode.FILL_OR_DROP, "fill_value": 0}
    return bind_with(op, (operand, shifted), **changed)


def _clamped(op: Op, indices: jax.Array, size: int) -> jax.Array:
    """Indices as the op's own mode reads them: only clipping moves an index that is out of bounds."""
    if op.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return jnp.clip(indices, 0, size - 1)
    return indices


def _shift(indices, spec, dim, operand, mesh) -> jax.Array:
    """Count indices from the start of this device's shard; those of other shards fall out of bounds."""
    start = shard_index(spec, dim, mesh) * operand.shape[dim]
    shifted = indices - jnp.asarray(start, indices.dtype)
    return jnp.where(shifted < 0, operand.shape[dim], shifted)


@rule(prim.scatter_add_p)
def scatter_add(op: Op) -> Iterator[AxisStrategy]:
    numbers = op.eqn.params["dimension_numbers"]
    operand_rank_, update_rank = operand_rank(op, 0), operand_rank(op, 2)
    batch_updates = [dim for dim in range(update_rank) if dim not in numbers.update_window_dims]
    for index_dim, update_dim in enumerate(batch_updates):
        if index_dim in numbers.scatter_indices_batching_dims:
            where = numbers.scatter_indices_batching_dims.index(index_dim)
            dim = numbers.operand_batching_dims[where]
            yield AxisStrategy((dim, index_dim, update_dim), (dim,))
        else:
            yield AxisStrategy((PARTIAL, index_dim, update_dim), (PARTIAL,))
    removed = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [dim for dim in range(operand_rank_) if dim not in removed]
    whole, update = op.eqn.invars[0].aval.shape, op.eqn.invars[2].aval.shape
    for dim, update_dim in zip(kept, numbers.update_window_dims, strict=True):
        if whole[dim] == update[update_dim]:
            yield AxisStrategy((dim, REPLICATED, update_dim), (dim,))
    looked_up = _single_indexed_dim(
        numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims
    )
    if looked_up is not None:
        yield AxisStrategy((looked_up, REPLICATED, REPLICATED), (looked_up,))
    yield AxisStrategy((PARTIAL, REPLICATED, PARTIAL), (PARTIAL,))


@local(prim.scatter_add_p)
def local_scatter_add(op, strategy, mesh, values):
    operand, indices, updates = values
    numbers = op.eqn.params["dimension_numbers"]
    spec = strategy.operand_spec(0)
    looked_up = _single_indexed_dim(
        numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims
    )
    if looked_up is None or looked_up not in spec:
        return evaluate_op(op, values)
    clamped = _clamped(op, indices, op.eqn.invars[0].aval.shape[looked_up])
    shifted = _shift(clamped, spec, looked_up, operand, mesh)
    changed = {"mode": lax.GatherScatterMode.FILL_OR_DROP, "indices_are_sorted": False}
    return bind_with(op, (operand, shifted, updates), **changed)


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
