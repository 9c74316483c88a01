"""Rules for matrix products: split a free dim, a batch dim, or a contracted dim."""

from collections.abc import Iterator, Sequence

from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op
from launcher.autopar.sharding.rules.registry import AxisStrategy, operand_rank, rule
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED

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


@rule("ragged_dot_general")
def ragged_dot(op: Op) -> Iterator[AxisStrategy]:
    """As `dot_general`, but the ragged dim, whose groups differ in size, and the groups' dim stay whole.

    A ragged contracted dim leaves one result per group: a new dim in front.
    """
    numbers = op.eqn.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    lhs_free = free_dims(operand_rank(op, 0), lhs_contract, lhs_batch)
    rhs_free = free_dims(operand_rank(op, 1), rhs_contract, rhs_batch, groups)
    first = int(any(dim in lhs_contract for dim in ragged))
    result = iter(range(first, first + len(lhs_batch) + len(lhs_free) + len(rhs_free)))
    pairs = [
        *((lhs, rhs, next(result)) for lhs, rhs in zip(lhs_batch, rhs_batch, strict=True)),
        *((dim, REPLICATED, next(result)) for dim in lhs_free),
        *((REPLICATED, dim, next(result)) for dim in rhs_free),
        *((lhs, rhs, PARTIAL) for lhs, rhs in zip(lhs_contract, rhs_contract, strict=True)),
    ]
    has_common_groups = operand_rank(op, 2) == 1  # else its dims are split along with the others'
    for lhs_dim, rhs_dim, result_dim in pairs:
        if lhs_dim not in ragged and (has_common_groups or lhs_dim == REPLICATED):
            yield AxisStrategy((lhs_dim, rhs_dim, REPLICATED), (result_dim,))
    for choice in BILINEAR:
        yield AxisStrategy((*choice.operands, REPLICATED), choice.results)
