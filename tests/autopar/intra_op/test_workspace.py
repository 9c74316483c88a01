"""Which values of a pass get a buffer, and how many bytes they are at the worst moment, in closed form."""

import jax
import jax.numpy as jnp
import pytest

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import trace
from launcher.autopar.intra_op.tape import Tape
from launcher.autopar.intra_op.workspace import temporary_bytes
from launcher.autopar.sharding.rules import strategies
from launcher.autopar.sharding.rules.registry import axis_choices, shapes_of

MESH = LogicalMesh(shape=(1, 1), alpha=(0.0, 0.0), beta=(0.0, 0.0))
ROWS, COLUMNS, SHORT = 64, 32, 16
WHOLE = (-1, -1)
X = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((COLUMNS, COLUMNS), jnp.float32)
SIZE = 4 * ROWS * COLUMNS


def written(function, *arguments):
    """The tape of a function on one device, its inputs and its results."""
    graph, _ = trace(function, *arguments)
    tape = Tape(graph.avals, MESH)
    for value in graph.inputs:
        tape.put(value, WHOLE)
    first = [axis for axis in (axis_choices(op)[:1] for op in graph.ops)]
    tape.run(
        (op, strategies(op, shapes_of(op), MESH.shape, [choices, choices])[0])
        for op, choices in zip(graph.ops, first, strict=True)
    )
    inputs, outputs = ([(v, WHOLE, None) for v in many] for many in (graph.inputs, graph.outputs))
    return tape, inputs, outputs


def held(function, *arguments) -> float:
    """The temporary bytes of a function on one device; its results have buffers of their own."""
    tape, _, outputs = written(function, *arguments)
    return temporary_bytes(tape, outputs)


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


def test_what_is_there_from_the_start_ends_when_it_is_read_for_the_last_time():
    def chain(x, w):
        return (x @ w) @ w @ w

    tape, (x, _), outputs = written(chain, X, SQUARE)
    assert temporary_bytes(tape, outputs) == 2 * SIZE
    assert temporary_bytes(tape, outputs, there=[x]) == 2 * SIZE  # x is gone by then
    assert temporary_bytes(tape, outputs, there=[(7, WHOLE, None)]) == 2 * SIZE  # nobody reads it


def test_what_lasts_is_counted_from_when_it_is_made():
    def both(x, w):
        first = x @ w
        return first, jnp.tanh(first) @ w

    tape, _, outputs = written(both, X, SQUARE)
    assert temporary_bytes(tape, outputs) == SIZE
    assert temporary_bytes(tape, lasting=outputs) == 3 * SIZE


def test_a_dear_value_whose_reader_is_computed_in_several_shapes_has_a_buffer():
    """Its sum is computed once for each shape in which it is read: the exponential is not."""

    def flattened(x, y, w):
        both = (jnp.exp(x) + y).reshape(-1, 4, SHORT)
        return jnp.sum(both, axis=(0, 1)), both @ w

    def once(x, y, w):
        return (jnp.exp(x) + y).reshape(-1, 4, SHORT) @ w

    small = jax.ShapeDtypeStruct((SHORT, 1), jnp.float32)
    assert held(once, X, X, small) == SIZE
    assert held(flattened, X, X, small) == 3 * SIZE


def test_a_gradient_waits_for_being_added():
    def gradient(x, w):
        return x @ w

    tape, _, outputs = written(gradient, X, SQUARE)
    assert temporary_bytes(tape) == SIZE
    tape.accumulate(*outputs)
    assert len(tape.lines) == 2
    assert temporary_bytes(tape) == SIZE


def test_what_would_be_scattered_into_zeros_is_scattered_into_the_sum():
    """The gradient of an embedding."""
    indices = jax.ShapeDtypeStruct((SHORT, 1), jnp.int32)
    rows = jax.ShapeDtypeStruct((SHORT, COLUMNS), jnp.float32)

    def gradient(indices, rows):
        numbers = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
        zeros = jnp.zeros((ROWS, COLUMNS))
        return jax.lax.scatter_add(zeros, indices, rows, numbers, mode="clip")

    tape, _, outputs = written(gradient, indices, rows)
    before = temporary_bytes(tape)
    assert before >= SIZE
    tape.accumulate(*outputs)
    assert tape.lines[-1].name == "scatter-add"
    assert temporary_bytes(tape) <= before - SIZE


@pytest.mark.parametrize(("pixels", "kernel", "copies"), [(2, 3, 0), (8, 3, 1)])
def test_a_kernel_larger_than_its_input_is_read_backwards(pixels, kernel, copies):
    def gradient(image, weights):
        return jax.lax.conv_general_dilated(
            image,
            jnp.flip(weights, (0, 1)),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    image = jax.ShapeDtypeStruct((1, pixels, pixels, 4), jnp.float32)
    weights = jax.ShapeDtypeStruct((kernel, kernel, 4, 4), jnp.float32)
    assert held(gradient, image, weights) == copies * 4 * 16 * kernel**2


def test_a_call_gathers_all_its_inputs_first_and_a_program_each_when_it_is_read():
    mesh = LogicalMesh(shape=(4, 1), alpha=(0.0, 0.0), beta=(0.0, 0.0))
    graph, _ = trace(lambda x, v, w: (x @ v) @ w, X, SQUARE, SQUARE)
    tape = Tape(graph.avals, mesh)
    x, v, w = graph.inputs
    for value, spec in ((x, WHOLE), (v, (0, -1)), (w, (0, -1))):
        tape.put(value, spec)
    whole = [axis_choices(op)[:1] for op in graph.ops]
    tape.run(
        (op, strategies(op, shapes_of(op), mesh.shape, [choices, choices])[0])
        for op, choices in zip(graph.ops, whole, strict=True)
    )
    weight = 4 * COLUMNS**2
    results = [(value, WHOLE, None) for value in graph.outputs]
    assert temporary_bytes(tape, results) == SIZE + weight
    assert temporary_bytes(tape, results, is_call=True) == SIZE + 2 * weight


def test_a_gather_along_an_inner_dim_is_put_in_order_afterwards():
    mesh = LogicalMesh(shape=(4, 1), alpha=(0.0, 0.0), beta=(0.0, 0.0))
    for dim, copies in ((0, 1), (1, 2)):
        graph, _ = trace(lambda x: x, X)
        tape = Tape(graph.avals, mesh)
        tape.put(graph.inputs[0], (dim, -1))
        tape.accumulate(tape.get(graph.inputs[0], WHOLE))
        assert [line.name for line in tape.lines][:copies] == ["all-gather", "transpose"][:copies]
