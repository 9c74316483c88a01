"""Rules for ops that write by index: scatter, and the gradients of gathers.

Operand and updates may be split together along whole windows and along batching dims, whatever the writes
are combined with. Writes of different indices to the same element are where kinds differ: sums may be
spread over devices as partial sums, extrema are combined across them, products and overwriting are not.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op, evaluate_op
from launcher.autopar.sharding.rules.indexing import shifted, single_indexed_dim, wide
from launcher.autopar.sharding.rules.registry import (
    AxisStrategy,
    bind_with,
    local,
    operand_rank,
    rule,
)
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED

SCATTERS = (
    prim.scatter_p, prim.scatter_add_p, lax.scatter_sub_p, prim.scatter_mul_p, prim.scatter_min_p,
    prim.scatter_max_p,
)  # fmt: skip


def along_windows(op: Op) -> Iterator[AxisStrategy]:
    """Split what no index moves in; or the indexed dim, each device keeping the writes to its shard."""
    numbers = op.eqn.params["dimension_numbers"]
    removed = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [dim for dim in range(operand_rank(op, 0)) if dim not in removed]
    whole, update = op.eqn.invars[0].aval.shape, op.eqn.invars[2].aval.shape
    for dim, update_dim in zip(kept, numbers.update_window_dims, strict=True):
        if whole[dim] == update[update_dim]:
            yield AxisStrategy((dim, REPLICATED, update_dim), (dim,))
    written = single_indexed_dim(numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims)
    if written is not None:
        yield AxisStrategy((written, REPLICATED, REPLICATED), (written,))


def index_dims(op: Op) -> Iterator[tuple[int, int, int | None]]:
    """Each dim of the indices, with the dim of the updates and, for a batching dim, of the operand."""
    numbers = op.eqn.params["dimension_numbers"]
    update_dims = range(operand_rank(op, 2))
    batch_dims = [dim for dim in update_dims if dim not in numbers.update_window_dims]
    batching = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    for index_dim, update_dim in enumerate(batch_dims):
        yield index_dim, update_dim, batching.get(index_dim)


def along_batching_dims(op: Op) -> Iterator[AxisStrategy]:
    for index_dim, update_dim, operand_dim in index_dims(op):
        if operand_dim is not None:
            yield AxisStrategy((operand_dim, index_dim, update_dim), (operand_dim,))


def _other_index_dims(op: Op) -> Iterator[tuple[int, int]]:
    for index_dim, update_dim, operand_dim in index_dims(op):
        if operand_dim is None:
            yield index_dim, update_dim


@rule(prim.scatter_add_p, lax.scatter_sub_p)
def scatter_add(op: Op) -> Iterator[AxisStrategy]:
    """Linear in operand and updates together."""
    yield from along_windows(op)
    yield from along_batching_dims(op)
    for index_dim, update_dim in _other_index_dims(op):
        yield AxisStrategy((PARTIAL, index_dim, update_dim), (PARTIAL,))
    yield AxisStrategy((PARTIAL, REPLICATED, PARTIAL), (PARTIAL,))


@rule(prim.scatter_min_p, prim.scatter_max_p)
def scatter_extremum(op: Op) -> Iterator[AxisStrategy]:
    yield from along_windows(op)
    yield from along_batching_dims(op)
    combine = "max" if op.primitive is prim.scatter_max_p else "min"
    for index_dim, update_dim in _other_index_dims(op):
        yield AxisStrategy((REPLICATED, index_dim, update_dim), (REPLICATED,), combine=combine)


@rule(prim.scatter_mul_p)
def scatter_mul(op: Op) -> Iterator[AxisStrategy]:
    """Linear in the operand alone."""
    yield from along_windows(op)
    yield from along_batching_dims(op)
    yield AxisStrategy((PARTIAL, REPLICATED, REPLICATED), (PARTIAL,))


@rule(prim.scatter_p)
def scatter(op: Op) -> Iterator[AxisStrategy]:
    """Linear in operand and updates together, if no two writes meet: else either may be the last."""
    yield from along_windows(op)
    yield from along_batching_dims(op)
    if op.eqn.params["unique_indices"]:
        yield AxisStrategy((PARTIAL, REPLICATED, PARTIAL), (PARTIAL,))


@local(*SCATTERS)
def local_scatter(op, strategy, mesh, values):
    """Writes to other shards are dropped."""
    operand, indices, updates = values
    numbers = op.eqn.params["dimension_numbers"]
    spec = strategy.operand_spec(0)
    dim = single_indexed_dim(numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims)
    if dim is None or dim not in spec:
        return evaluate_op(op, values)
    if math.prod(indices.shape[:-1]) == 1:
        # XLA makes this a dynamic slice and its update, and merges the slice with one that the operand
        # came from: then it no longer clamps at the shard's end, and a dropped write leaves garbage.
        operand = lax.optimization_barrier(operand)
    indices = wide(indices)
    if op.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, op.eqn.invars[0].aval.shape[dim] - 1)
    return bind_with(
        op,
        (operand, shifted(indices, spec, dim, operand.shape[dim], mesh), updates),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        indices_are_sorted=False,
        unique_indices=False,
    )
