"""Products whose result is turned around at once, computed the right way round.

JAX makes the gradient of a weight with its dims swapped, and then turns it. With the operands swapped there
is nothing to turn, and XLA's CPU backend has fast code for that alone: it is three times as fast.
"""

from collections import Counter
from dataclasses import replace

from jax import lax
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Graph, Op


def turn_products(graph: Graph) -> Graph:
    """The graph with products swapped whose result nobody reads but a transposition that swapping undoes."""
    reads = Counter(value for op in graph.ops for value in op.values)
    reads.update(value for value in graph.outputs if not isinstance(value, Literal))
    products = {
        op.results[0]: op for op in graph.ops if _can_be_swapped(op) and reads[op.results[0]] == 1
    }
    swapped: dict[Op, Op] = {}
    turns: set[Op] = set()
    for turn in graph.ops:
        if turn.primitive is not prim.transpose_p or products.keys().isdisjoint(turn.values):
            continue
        product = products[turn.values[0]]
        if turn.eqn.params["permutation"] == _undone_by_swapping(product):
            swapped[product] = _swapped(product, turn)
            turns.add(turn)
    ops = tuple(swapped.get(op, op) for op in graph.ops if op not in turns)
    return replace(graph, ops=ops).check()


def _can_be_swapped(op: Op) -> bool:
    """Whether an op is a product whose result may lie anyhow, by no algorithm that names its operands."""
    if op.primitive is not prim.dot_general_p:
        return False
    sharding, precision = op.eqn.params["out_sharding"], op.eqn.params["precision"]
    is_free = sharding is None or not any(sharding.spec)  # inside `shard_map` it names no axis
    return is_free and not isinstance(precision, lax.DotAlgorithm)


def _undone_by_swapping(product: Op) -> tuple[int, ...]:
    """The permutation of a product's dims to (batch, free of the second operand, free of the first)."""
    (contracted, _), (batch, _) = product.eqn.params["dimension_numbers"]
    rank, lhs_rank = product.eqn.outvars[0].aval.ndim, product.eqn.invars[0].aval.ndim
    second = lhs_rank - len(contracted)  # where the second operand's free dims begin
    return (*range(len(batch)), *range(second, rank), *range(len(batch), second))


def _swapped(product: Op, turn: Op) -> Op:
    """The product of the operands the other way round, which makes what the transposition made."""
    params = product.eqn.params
    contracted, batch = params["dimension_numbers"]
    precision = params["precision"]
    eqn = product.eqn.replace(
        invars=product.eqn.invars[::-1],
        outvars=turn.eqn.outvars,
        params=params
        | {
            "dimension_numbers": (contracted[::-1], batch[::-1]),
            "precision": precision[::-1] if isinstance(precision, tuple) else precision,
        },
    )
    return Op(eqn, product.operands[::-1], turn.results)
