"""Rules for ops that only move elements: broadcast, reshape, transpose, slice, pad, concatenate, iota.

All of them are linear. A dim that is cut at a fixed place (sliced, padded, concatenated, reversed) stays
whole: its shards would have to exchange elements.
"""

import math
from collections.abc import Iterator

import jax
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import (
    AxisStrategy,
    bind_with,
    local,
    local_result_shape,
    operand_rank,
    rule,
    shard_index,
)
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Shape

LINEAR = AxisStrategy((PARTIAL,), (PARTIAL,))


@rule(prim.broadcast_in_dim_p)
def broadcast_in_dim(op: Op) -> Iterator[AxisStrategy]:
    """A dim that the operand has is split on both sides; a new or stretched one on the result only."""
    source = op.eqn.invars[0].aval.shape
    target = op.eqn.outvars[0].aval.shape
    mapped = op.eqn.params["broadcast_dimensions"]
    operand_dim = {
        result: dim for dim, result in enumerate(mapped) if source[dim] == target[result]
    }
    for dim in range(len(target)):
        yield AxisStrategy((operand_dim.get(dim, REPLICATED),), (dim,))
    yield LINEAR


@local(prim.broadcast_in_dim_p)
def local_broadcast(op, strategy, mesh, values):
    return bind_with(op, values, shape=local_result_shape(op, strategy, mesh))


def aligned_dims(source: Shape, target: Shape) -> Iterator[tuple[int, int]]:
    """Pairs of dims that lead a group of dims with the same product: equal chunks of the same elements.

    Reshaping (6, 4) to (6, 2, 2) aligns 0 with 0 and 1 with 1; (2, 3, 4) to (6, 4) aligns 0 with 0 (a
    shard of the 2 is a shard of the 6) and 2 with 1. Dims of size 1 lead nothing. Several axes may split
    an aligned pair, in their order, as long as both dims divide. Left out: axes that split the leading
    dim completely and go on in the next one.
    """
    i = j = 0
    while i < len(source) and j < len(target):
        first_i, first_j = i, j
        left, right = source[i], target[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        lead_i = next((k for k in range(first_i, i) if source[k] > 1), None)
        lead_j = next((k for k in range(first_j, j) if target[k] > 1), None)
        if lead_i is not None and lead_j is not None:
            yield lead_i, lead_j


@rule(prim.reshape_p)
def reshape(op: Op) -> Iterator[AxisStrategy]:
    """The dims may be permuted first."""
    source, target = op.eqn.invars[0].aval.shape, op.eqn.outvars[0].aval.shape
    order = op.eqn.params["dimensions"] or range(len(source))
    if math.prod(source) > 0:
        for position, result in aligned_dims(tuple(source[dim] for dim in order), target):
            yield AxisStrategy((order[position],), (result,))
    yield LINEAR


@local(prim.reshape_p)
def local_reshape(op, strategy, mesh, values):
    return bind_with(op, values, new_sizes=local_result_shape(op, strategy, mesh))


@rule(prim.transpose_p)
def transpose(op: Op) -> Iterator[AxisStrategy]:
    for result, dim in enumerate(op.eqn.params["permutation"]):
        yield AxisStrategy((dim,), (result,))
    yield LINEAR


@rule(prim.squeeze_p)
def squeeze(op: Op) -> Iterator[AxisStrategy]:
    dropped = op.eqn.params["dimensions"]
    kept = [dim for dim in range(operand_rank(op, 0)) if dim not in dropped]
    for result, dim in enumerate(kept):
        yield AxisStrategy((dim,), (result,))
    yield LINEAR


@rule(prim.rev_p)
def reverse(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(operand_rank(op, 0)):
        if dim not in op.eqn.params["dimensions"]:
            yield AxisStrategy((dim,), (dim,))
    yield LINEAR


@rule(prim.slice_p)
def static_slice(op: Op) -> Iterator[AxisStrategy]:
    """Only a dim that is taken whole may be split."""
    source, target = op.eqn.invars[0].aval.shape, op.eqn.outvars[0].aval.shape
    for dim, (before, after) in enumerate(zip(source, target, strict=True)):
        if before == after:
            yield AxisStrategy((dim,), (dim,))
    yield LINEAR


@local(prim.slice_p)
def local_slice(op, strategy, mesh, values):
    strides = op.eqn.params["strides"] or (1,) * operand_rank(op, 0)
    limits = tuple(
        values[0].shape[dim] if dim in strategy.operand_spec(0) else limit
        for dim, limit in enumerate(op.eqn.params["limit_indices"])
    )
    return bind_with(op, values, limit_indices=limits, strides=tuple(strides))


@rule(prim.pad_p)
def pad(op: Op) -> Iterator[AxisStrategy]:
    """Only an unpadded dim may be split; what fills up a sum is a sum itself, or zero."""
    for dim, padding in enumerate(op.eqn.params["padding_config"]):
        if tuple(padding) == (0, 0, 0):
            yield AxisStrategy((dim, REPLICATED), (dim,))
    yield AxisStrategy((PARTIAL, PARTIAL), (PARTIAL,))


@rule(prim.concatenate_p)
def concatenate(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(operand_rank(op, 0)):
        if dim != op.eqn.params["dimension"]:
            yield AxisStrategy((dim,) * len(op.operands), (dim,))
    yield AxisStrategy((PARTIAL,) * len(op.operands), (PARTIAL,))


@rule(lax.split_p)
def split(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(operand_rank(op, 0)):
        if dim != op.eqn.params["axis"]:
            yield AxisStrategy((dim,), (dim,) * len(op.results))
    yield AxisStrategy((PARTIAL,), (PARTIAL,) * len(op.results))


@rule(lax.stack_p)
def stack(op: Op) -> Iterator[AxisStrategy]:
    """The new dim stays whole."""
    new = op.eqn.params["axis"]
    for dim in range(operand_rank(op, 0)):
        yield AxisStrategy((dim,) * len(op.operands), (dim + (dim >= new),))
    yield AxisStrategy((PARTIAL,) * len(op.operands), (PARTIAL,))


@rule(lax.unstack_p)
def unstack(op: Op) -> Iterator[AxisStrategy]:
    dropped = op.eqn.params["axis"]
    for dim in range(operand_rank(op, 0)):
        if dim != dropped:
            yield AxisStrategy((dim,), (dim - (dim > dropped),) * len(op.results))
    yield AxisStrategy((PARTIAL,), (PARTIAL,) * len(op.results))


@rule(lax.tile_p)
def tile(op: Op) -> Iterator[AxisStrategy]:
    """Where a dim is repeated, a shard of the result holds some of the repeats, each of them whole."""
    for dim, repeats in enumerate(op.eqn.params["reps"]):
        if repeats == 1:
            yield AxisStrategy((dim,), (dim,))
        else:
            yield AxisStrategy((REPLICATED,), (dim,), pieces=repeats)
    yield LINEAR


@local(lax.tile_p)
def local_tile(op, strategy, mesh, values):
    shape = local_result_shape(op, strategy, mesh)
    pairs = zip(shape, values[0].shape, strict=True)
    return bind_with(op, values, reps=tuple(size // item if item else 1 for size, item in pairs))


@rule(prim.iota_p, "empty")
def from_nothing(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(len(op.eqn.outvars[0].aval.shape)):
        yield AxisStrategy((), (dim,))


@local("empty")
def local_empty(op, strategy, mesh, values):
    return bind_with(op, values, shape=local_result_shape(op, strategy, mesh))


@local(prim.iota_p)
def local_iota(op, strategy, mesh, values):
    """A device counts on from where its shard begins."""
    (shape, dim) = local_result_shape(op, strategy, mesh), op.eqn.params["dimension"]
    (counted,) = bind_with(op, values, shape=shape)
    start = shard_index(strategy.result_spec(0), dim, mesh) * shape[dim]
    return (counted + jax.numpy.asarray(start, counted.dtype),)
