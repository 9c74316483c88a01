"""Rules for windowed reductions and their gradients: pooling.

A dim may be split where no window reaches from one shard into the next: its windows are one element, or
lie side by side and fill the dim. Overlapping or padded windows would need their neighbours' edge (a
halo), and keep the dim whole.
"""

from collections.abc import Iterator

from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED


def separate_dims(op: Op, windowed: int) -> Iterator[int]:
    """The dims whose windows lie side by side and fill the windowed operand."""
    params, shape = op.eqn.params, op.eqn.invars[windowed].aval.shape
    undilated = (1,) * len(shape)
    for dim, size in enumerate(shape):
        window = params["window_dimensions"][dim]
        dilations = (
            params.get("base_dilation", undilated)[dim],
            params.get("window_dilation", undilated)[dim],
        )
        if (
            params["window_strides"][dim] == window
            and size % window == 0
            and tuple(params["padding"][dim]) == (0, 0)
            and dilations == (1, 1)
        ):
            yield dim


def split_separate_dims(op: Op, windowed: int) -> Iterator[AxisStrategy]:
    """Split such a dim of every operand and result; initial values are scalars and stay whole."""
    for dim in separate_dims(op, windowed):
        operands = (dim if operand_rank(op, i) else REPLICATED for i in range(len(op.operands)))
        yield AxisStrategy(tuple(operands), (dim,) * len(op.results))


@rule(prim.reduce_window_max_p, prim.reduce_window_min_p, prim.reduce_window_p)
@rule(prim.select_and_scatter_p)
def nonlinear_windows(op: Op) -> Iterator[AxisStrategy]:
    yield from split_separate_dims(op, windowed=0)


@rule(prim.reduce_window_sum_p)
def window_sums(op: Op) -> Iterator[AxisStrategy]:
    yield from split_separate_dims(op, windowed=0)
    yield AxisStrategy((PARTIAL,), (PARTIAL,))


@rule(prim.select_and_scatter_add_p, prim.select_and_gather_add_p)
def window_gradients(op: Op) -> Iterator[AxisStrategy]:
    """Linear in the values that are scattered or gathered; the other operand only selects."""
    yield from split_separate_dims(op, windowed=1)
    yield AxisStrategy((PARTIAL, REPLICATED), (PARTIAL,))
