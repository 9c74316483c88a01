"""Rules for matrix products and convolutions: split a free dim, a batch dim, or a contracted dim."""

from collections.abc import Iterator, Sequence

from jax.extend.core import primitives as prim

from launcher.autopar.graph import Op
from launcher.autopar.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.spec import PARTIAL, REPLICATED

BILINEAR = (
    AxisStrategy((PARTIAL, REPLICATED), (PARTIAL,)),
    AxisStrategy((REPLICATED, PARTIAL), (PARTIAL,)),
)


def free_dims(rank: int, *taken: Sequence[int]) -> list[int]:
    """The dims that are neither batch nor contracted, in order."""
    used = {dim for dims in taken for dim in dims}
    return [dim for dim in range(rank) if dim not in used]


@rule(prim.dot_general_p)
def dot_general(op: Op) -> Iterator[AxisStrategy]:
    """Result dims are the batch dims, then the left free dims, then the right free dims."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.eqn.params["dimension_numbers"]
    lhs_free = free_dims(operand_rank(op, 0), lhs_contract, lhs_batch)
    rhs_free = free_dims(operand_rank(op, 1), rhs_contract, rhs_batch)
    result = iter(range(len(lhs_batch) + len(lhs_free) + len(rhs_free)))
    for lhs_dim, rhs_dim in zip(lhs_batch, rhs_batch, strict=True):
        yield AxisStrategy((lhs_dim, rhs_dim), (next(result),))
    for dim in lhs_free:
        yield AxisStrategy((dim, REPLICATED), (next(result),))
    for dim in rhs_free:
        yield AxisStrategy((REPLICATED, dim), (next(result),))
    for lhs_dim, rhs_dim in zip(lhs_contract, rhs_contract, strict=True):
        yield AxisStrategy((lhs_dim, rhs_dim), (PARTIAL,))
    yield from BILINEAR


@rule(prim.conv_general_dilated_p)
def convolution(op: Op) -> Iterator[AxisStrategy]:
    """Split the batch, the output channels or the input channels; spatial dims stay whole.

    Grouped convolutions split their batch only: a shard of channels would have to hold whole groups.
    """
    numbers = op.eqn.params["dimension_numbers"]
    batch, feature = numbers.lhs_spec[:2]
    out_feature, in_feature = numbers.rhs_spec[:2]
    result_batch, result_feature = numbers.out_spec[:2]
    groups = op.eqn.params["feature_group_count"]
    batch_groups = op.eqn.params["batch_group_count"]
    if batch_groups == 1:
        yield AxisStrategy((batch, REPLICATED), (result_batch,))
    if groups == batch_groups == 1:
        yield AxisStrategy((REPLICATED, out_feature), (result_feature,))
        yield AxisStrategy((feature, in_feature), (PARTIAL,))
    yield from BILINEAR
