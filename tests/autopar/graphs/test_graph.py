"""A graph computes what its function computes, whole, cut, renumbered, and without its dead ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import (
    CALLS,
    CUSTOM_CALLS,
    Graph,
    eliminate_dead_code,
    evaluate,
    flat_graph,
    from_jaxpr,
    live_ops,
    renumber,
    subgraph,
    trace,
    used_values,
)

TABLE = np.linspace(0.0, 1.0, 12).reshape(3, 4).astype(np.float32)
X = np.linspace(-1.0, 1.0, 12).reshape(3, 4).astype(np.float32)


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


@straight_through.defjvp
def _straight_through_rule(primals, tangents):
    return straight_through(*primals), 3.0 * tangents[0]


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.sin(x)


reversed_gradient.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (-g,))


@jax.jit
def inner(x, scale=2.0):
    return jax.jit(lambda y: y * scale + jnp.asarray(TABLE))(jnp.tanh(x))


CASES = {
    "nested jit": lambda x: inner(inner(x)) - x,
    "custom_jvp": lambda x: straight_through(5.0 * x) + jax.nn.relu(x),
    "custom_vjp": lambda x: reversed_gradient(x) * x,
    "remat": lambda x: jax.checkpoint(lambda y: jnp.sin(inner(y)))(x),
    "closed-over arrays": lambda x: (x + TABLE) @ jnp.asarray(TABLE).T,
    "several results": lambda x: (jnp.max(x), lax.top_k(x, 2), {"twice": 2.0 * x}),
    "an input and a literal as results": lambda x: (x, 1.0, x + 1.0),
    "unused input": lambda x: jnp.zeros(3),
    "scan": lambda x: lax.scan(lambda c, row: (c + row, jnp.tanh(c)), jnp.zeros(4), x),
    "scan over a closed-over array": lambda x: lax.scan(lambda c, r: (c * r, r), x[0], TABLE)[0],
    "cond": lambda x: lax.cond(x.sum() > 0, jnp.sin, lambda y: y * TABLE, x),
}


def flat(function):
    return lambda *args: jax.tree.leaves(function(*args))


def graph_of(function, *arguments, inline=CALLS | CUSTOM_CALLS):
    return from_jaxpr(jax.make_jaxpr(function)(*arguments), inline=inline)


def run(graph, *arguments):
    return evaluate(graph, (*arguments, *graph.constants.values()))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inline", [frozenset(), CALLS, CALLS | CUSTOM_CALLS])
@pytest.mark.parametrize("name", CASES)
def test_evaluating_the_graph_is_calling_the_function(name, inline):
    function = flat(CASES[name])
    graph = graph_of(function, X, inline=inline)
    assert_same(run(graph, X), function(X))
    assert not {op.primitive for op in graph.ops} & inline


def test_inputs_are_the_arguments_and_then_the_closed_over_arrays():
    graph, structure = trace(lambda x, y: {"b": x + TABLE, "a": y}, X, X)
    assert graph.inputs[:2] == (0, 1)
    assert set(graph.inputs[2:]) == set(graph.constants)
    assert_same(list(graph.constants.values()), [TABLE])
    found = jax.tree.unflatten(structure, run(graph, X, 2.0 * X))
    assert_same([found["a"], found["b"]], [2.0 * X, X + TABLE])


@pytest.mark.parametrize("name", ["nested jit", "custom_jvp", "custom_vjp", "remat"])
def test_a_traced_graph_can_be_differentiated_with_its_custom_rules(name):
    function = CASES[name]
    graph, _ = trace(function, X)
    found = jax.grad(lambda x: run(graph, x)[0].sum())(X)
    assert_same([found], [jax.grad(lambda x: function(x).sum())(X)])


def test_the_custom_rules_above_are_not_those_of_calculus():
    """Else the test before this one would show nothing."""
    assert float(jax.grad(straight_through)(0.2)) == 3.0
    assert float(jax.grad(reversed_gradient)(0.0)) == -1.0


def test_check_catches_a_use_before_the_definition():
    graph = graph_of(lambda x: jnp.sin(jnp.cos(x)), X)
    swapped = Graph(graph.avals, graph.inputs, graph.ops[::-1], graph.outputs, {})
    with pytest.raises(AssertionError):
        swapped.check()


@pytest.mark.parametrize("broken", ["op twice", "missing op", "unknown output", "input twice"])
def test_check_catches(broken):
    graph = graph_of(lambda x: jnp.sin(jnp.cos(x)), X)
    inputs, ops, outputs = graph.inputs, graph.ops, graph.outputs
    match broken:
        case "op twice":
            ops = (*ops, ops[0])
        case "missing op":
            ops = ops[1:]
        case "unknown output":
            outputs = (len(graph.avals),)
        case "input twice":
            inputs = (*inputs, *inputs)
    with pytest.raises(AssertionError):
        Graph(graph.avals, inputs, ops, outputs, {}).check()


def test_dead_code_goes_and_the_result_stays():
    def function(x, unused):
        dead = jnp.exp(x) @ x.T
        jnp.sum(dead)
        kept, _ = lax.top_k(x, 2)
        return kept + 1.0

    graph = graph_of(function, X, X)
    lean = eliminate_dead_code(graph).check()
    assert lean.inputs == graph.inputs
    assert [op.primitive for op in lean.ops] == [prim.top_k_p, prim.add_p]
    assert_same(run(lean, X, X), [function(X, X)])


@pytest.mark.parametrize("name", CASES)
def test_the_flat_graph_computes_the_same(name):
    function = flat(CASES[name])
    graph = flat_graph(jax.make_jaxpr(function)(X))
    assert_same(run(graph, X), function(X))
    assert not {op.primitive for op in graph.ops} & (CALLS | CUSTOM_CALLS)


@pytest.mark.parametrize(("wrap", "count"), [(jax.jit, 2), (jax.checkpoint, 3)])
def test_what_is_computed_twice_is_computed_once_unless_it_is_recomputed(wrap, count):
    inner = wrap(lambda x: jnp.sin(jnp.sin(x)))

    def function(x):
        y, pull = jax.vjp(inner, x)
        return inner(x), y, *pull(y)  # a `checkpoint` takes the inner sine again, for its cosine

    graph = flat_graph(jax.make_jaxpr(function)(X))
    assert [op.primitive for op in graph.ops].count(prim.sin_p) == count
    assert_same(run(graph, X), function(X))


def random_function(seed: int):
    """A function of two matrices whose values feed one another at random; some feed nothing."""
    rng = np.random.default_rng(seed)
    unary = (jnp.sin, jnp.tanh, lambda x: x * 0.5, lambda x: x.T @ x @ x.T)
    binary = (jnp.add, jnp.multiply, lambda x, y: x + y.T)
    plan = [(rng.integers(2), rng.integers(4), rng.random(2)) for _ in range(12)]

    def function(x, y):
        values = [x, y]
        for is_binary, which, places in plan:
            a, b = (values[int(place * len(values))] for place in places)
            values.append(binary[which % 3](a, b) if is_binary else unary[which](a))
        return values[-1], values[5]

    return function


@pytest.mark.parametrize("seed", range(10))
def test_cut_anywhere_the_pieces_compute_the_whole(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 3, 3)).astype(np.float32)
    function = random_function(seed)
    graph = graph_of(function, x, y)
    expected = function(x, y)
    env = dict(zip(graph.inputs, (x, y), strict=True))
    cuts = sorted({0, *rng.integers(0, len(graph.ops), 3).tolist(), len(graph.ops)})
    for first, last in zip(cuts, cuts[1:], strict=False):
        ops = graph.ops[first:last]
        later = used_values(graph.ops[last:]) | set(graph.outputs)
        outputs = [value for op in ops for value in op.results if value in later]
        piece = renumber(subgraph(graph, ops, outputs))
        assert piece.inputs == tuple(range(len(piece.inputs)))
        assert len(piece.avals) == len(piece.inputs) + sum(len(op.results) for op in ops)
        arguments = [env[value] for value in subgraph(graph, ops, outputs).inputs]
        env |= dict(zip(outputs, evaluate(piece, arguments), strict=True))
    assert_same([env[value] for value in graph.outputs], expected)
    lean = renumber(eliminate_dead_code(graph))
    assert_same(run(lean, x, y), expected)


def test_a_piece_passes_on_an_input_that_it_does_not_read_and_keeps_its_constants():
    graph = graph_of(lambda x, y: (x + jnp.asarray(TABLE), y), X, X)
    piece = subgraph(graph, graph.ops, [graph.outputs[1], graph.outputs[0]])
    assert set(piece.constants) == set(graph.constants)
    arguments = [{0: X, 1: 2.0 * X, **graph.constants}[value] for value in piece.inputs]
    assert_same(evaluate(renumber(piece), arguments), [2.0 * X, X + TABLE])


def test_live_ops_of_one_result_of_several():
    graph = graph_of(lambda x: (jnp.sin(x), jnp.cos(x)), X)
    (sine,) = live_ops(graph.ops, graph.outputs[:1])
    assert sine.primitive is prim.sin_p
