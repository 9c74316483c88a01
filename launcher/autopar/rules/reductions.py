"""Rules for reductions, cumulative ops, sorting and windows: the dims they leave alone may be split."""

from collections.abc import Iterator

from jax.extend.core import primitives as prim

from launcher.autopar.graph import Op
from launcher.autopar.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.spec import PARTIAL


def kept_dims(op: Op) -> Iterator[tuple[int, int]]:
    """Pairs (dim of the operand, dim of the result) of the dims that are not reduced."""
    reduced = op.eqn.params["axes"]
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


@rule(prim.reduce_max_p, prim.reduce_min_p)
def reduce_extremum(op: Op) -> Iterator[AxisStrategy]:
    """A split reduced dim is combined across the axis at once."""
    combine = "max" if op.primitive is prim.reduce_max_p else "min"
    for dim, position in kept_dims(op):
        yield AxisStrategy((dim,), (position,))
    for dim in op.eqn.params["axes"]:
        yield AxisStrategy((dim,), (-1,), combine=combine)


@rule(prim.reduce_prod_p, prim.reduce_and_p, prim.reduce_or_p, prim.reduce_xor_p)
@rule(prim.argmax_p, prim.argmin_p)
def reduce_other(op: Op) -> Iterator[AxisStrategy]:
    for dim, position in kept_dims(op):
        yield AxisStrategy((dim,), (position,))


@rule(prim.cumsum_p, prim.cumprod_p, prim.cummax_p, prim.cummin_p, prim.cumlogsumexp_p)
def cumulative(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(operand_rank(op, 0)):
        if dim != op.eqn.params["axis"]:
            yield AxisStrategy((dim,), (dim,))
    if op.primitive is prim.cumsum_p:
        yield AxisStrategy((PARTIAL,), (PARTIAL,))


@rule(prim.sort_p)
def sort(op: Op) -> Iterator[AxisStrategy]:
    for dim in range(operand_rank(op, 0)):
        if dim != op.eqn.params["dimension"]:
            yield AxisStrategy((dim,) * len(op.operands), (dim,) * len(op.results))


@rule(prim.top_k_p)
def top_k(op: Op) -> Iterator[AxisStrategy]:
    searched = op.eqn.params.get("axis", operand_rank(op, 0) - 1)
    for dim in range(operand_rank(op, 0)):
        if dim != searched:
            yield AxisStrategy((dim,), (dim, dim))


def unwindowed_dims(op: Op) -> Iterator[int]:
    """The dims whose window is one element, unpadded, undilated and unstrided."""
    params = op.eqn.params
    rank = operand_rank(op, 0)
    for dim in range(rank):
        dilations = (
            params.get("base_dilation", (1,) * rank)[dim],
            params.get("window_dilation", (1,) * rank)[dim],
        )
        if (
            params["window_dimensions"][dim] == 1
            and params["window_strides"][dim] == 1
            and tuple(params["padding"][dim]) == (0, 0)
            and dilations == (1, 1)
        ):
            yield dim


@rule(prim.reduce_window_sum_p, prim.reduce_window_max_p, prim.reduce_window_min_p)
@rule(prim.select_and_scatter_add_p, prim.select_and_gather_add_p)
def windows(op: Op) -> Iterator[AxisStrategy]:
    for dim in unwindowed_dims(op):
        yield AxisStrategy((dim,) * len(op.operands), (dim,))
    if op.primitive is prim.reduce_window_sum_p:
        yield AxisStrategy((PARTIAL,), (PARTIAL,))
