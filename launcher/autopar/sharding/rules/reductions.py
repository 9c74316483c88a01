"""Rules for reductions, cumulative ops and sorting: the dims they leave alone may be split.

Along a dim that is scanned, sorted or searched, every element may depend on every other: it stays whole.
So does one that is multiplied up or searched for the place of an extremum, for which there is no single
collective.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED

_COMBINES = {
    prim.reduce_max_p: "max",
    prim.reduce_min_p: "min",
    prim.reduce_or_p: "max",
    prim.reduce_and_p: "min",
}


def kept_dims(op: Op) -> Iterator[tuple[int, int]]:
    """Pairs (dim of the operand, dim of the result) of the dims that are not reduced."""
    params = op.eqn.params
    reduced = params["axes"] if "axes" in params else params["dimensions"]
    kept = [dim for dim in range(operand_rank(op, 0)) if dim not in reduced]
    yield from ((dim, position) for position, dim in enumerate(kept))


@rule(prim.reduce_sum_p)
def reduce_sum(op: Op) -> Iterator[AxisStrategy]:
    """A split reduced dim leaves a partial sum, and a partial sum stays one."""
    for dim, position in kept_dims(op):
        yield AxisStrategy((dim,), (position,))
    for dim in op.eqn.params["axes"]:
        yield AxisStrategy((dim,), (PARTIAL,))
    yield AxisStrategy((PARTIAL,), (PARTIAL,))


@rule(*_COMBINES)
def reduce_extremum(op: Op) -> Iterator[AxisStrategy]:
    """A split reduced dim is combined across the axis at once.

    Not for "and" and "or" of integers, which work bit by bit.
    """
    for dim, position in kept_dims(op):
        yield AxisStrategy((dim,), (position,))
    is_bitwise = op.primitive in (prim.reduce_or_p, prim.reduce_and_p) and jnp.issubdtype(
        op.eqn.invars[0].aval.dtype, jnp.integer
    )
    for dim in () if is_bitwise else op.eqn.params["axes"]:
        yield AxisStrategy((dim,), (REPLICATED,), combine=_COMBINES[op.primitive])


@rule(prim.reduce_prod_p, prim.reduce_xor_p, prim.argmax_p, prim.argmin_p, prim.reduce_p)
def reduce_other(op: Op) -> Iterator[AxisStrategy]:
    """A generic reduction has an initial value beside every operand."""
    for dim, position in kept_dims(op):
        operands = (dim if operand_rank(op, i) else REPLICATED for i in range(len(op.operands)))
        yield AxisStrategy(tuple(operands), (position,) * len(op.results))


@rule(prim.cumsum_p, prim.cumprod_p, prim.cummax_p, prim.cummin_p, prim.cumlogsumexp_p)
def cumulative(op: Op) -> Iterator[AxisStrategy]:
    yield from _other_dims(op, op.eqn.params["axis"])
    if op.primitive is prim.cumsum_p:
        yield AxisStrategy((PARTIAL,), (PARTIAL,))


@rule(prim.sort_p)
def sort(op: Op) -> Iterator[AxisStrategy]:
    yield from _other_dims(op, op.eqn.params["dimension"])


@rule(prim.top_k_p)
def top_k(op: Op) -> Iterator[AxisStrategy]:
    yield from _other_dims(op, op.eqn.params.get("axis", -1))


@rule(prim.approx_top_k_p)
def approx_top_k(op: Op) -> Iterator[AxisStrategy]:
    yield from _other_dims(op, op.eqn.params["reduction_dimension"])


def _other_dims(op: Op, whole: int) -> Iterator[AxisStrategy]:
    """Split any dim but one, of all operands and results alike."""
    rank = operand_rank(op, 0)
    for dim in range(rank):
        if dim != whole % rank:
            yield AxisStrategy((dim,) * len(op.operands), (dim,) * len(op.results))
