"""Which values of a pass get a buffer, and how many bytes they are at the worst moment, in closed form."""

import jax
import jax.numpy as jnp
import pytest

from launcher.autopar.graph import trace
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.rules import strategies
from launcher.autopar.rules.registry import axis_choices, shapes_of
from launcher.autopar.workspace import Tape, temporary_bytes

MESH = LogicalMesh(shape=(1, 1), alpha=(0.0, 0.0), beta=(0.0, 0.0))
ROWS, COLUMNS = 64, 32
WHOLE = (-1, -1)
X = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((COLUMNS, COLUMNS), jnp.float32)
SIZE = 4 * ROWS * COLUMNS


def held(function, *arguments) -> float:
    """The temporary bytes of a function on one device; its results have buffers of their own."""
    graph, _ = trace(function, *arguments)
    tape = Tape(graph.avals, MESH)
    for value in graph.inputs:
        tape.put(value, WHOLE)
    first = [axis for axis in (axis_choices(op)[:1] for op in graph.ops)]
    tape.run(
        (op, strategies(op, shapes_of(op), MESH.shape, [choices, choices])[0])
        for op, choices in zip(graph.ops, first, strict=True)
    )
    return temporary_bytes(tape, [(value, WHOLE, None) for value in graph.outputs])


def test_a_chain_of_elementwise_ops_needs_nothing():
    assert held(lambda x: jnp.tanh(x * 2.0 + x) - x, X) == 0


def test_what_a_matrix_product_reads_has_a_buffer():
    assert held(lambda x, w: jnp.tanh(x * 2.0) @ w, X, SQUARE) == SIZE


def test_a_dear_value_with_two_readers_is_computed_once():
    def twice(x, w):
        y = jnp.exp(x)
        return y @ w, y - x

    assert held(twice, X, SQUARE) == SIZE


def test_a_cheap_value_with_two_elementwise_readers_is_computed_in_both():
    def dear(x):
        y = jnp.exp(x)
        return y + x, y - x

    def cheap(x):
        y = -x
        return y + x, y - x

    assert (held(dear, X), held(cheap, X)) == (SIZE, 0)


def test_an_elementwise_op_takes_the_place_of_its_operand_and_a_product_does_not():
    assert held(lambda x, w: jnp.tanh(x @ w) @ w, X, SQUARE) == SIZE
    assert held(lambda x, w: x @ w @ w @ w, X, SQUARE) == 2 * SIZE


def test_what_is_read_late_is_held_until_then():
    def late(x, w):
        first = x @ w
        return (first @ w @ w) @ w + first

    assert held(late, X, SQUARE) == 3 * SIZE


def test_the_gradient_of_a_weight_reads_a_transposed_operand():
    assert held(lambda x, y: jnp.einsum("bi,bj->ij", x, y), X, X) == SIZE
    assert held(lambda x, y: jnp.einsum("bi,ji->bj", x, y), X, SQUARE) == 0


@pytest.mark.parametrize("count", [2, 5])
def test_the_temporaries_of_a_chain_of_products_do_not_grow_with_its_length(count):
    def chain(x, w):
        for _ in range(count):
            x = jnp.tanh(x @ w)
        return x

    assert held(chain, X, SQUARE) == 2 * SIZE
