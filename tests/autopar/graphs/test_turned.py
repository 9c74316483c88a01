"""Products computed the right way round: the same numbers with fewer ops, and nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher.autopar.graphs.graph import CALLS, evaluate, from_jaxpr
from launcher.autopar.graphs.turned import turn_products


def graphs_of(function, *arrays):
    graph = from_jaxpr(jax.make_jaxpr(function)(*arrays), inline=CALLS)
    return graph, turn_products(graph)


def count(graph, name):
    return sum(str(op.primitive) == name for op in graph.ops)


def drawn(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_same(before, after, arrays):
    expected, found = evaluate(before, arrays), evaluate(after, arrays)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


GRADIENTS = {
    "a layer": ("btk,kn->btn", (2, 3, 4), (4, 5)),
    "a matrix": ("tk,kn->tn", (3, 4), (4, 5)),
    "experts": ("egk,ekn->egn", (2, 3, 4), (2, 4, 5)),
    "several free dims": ("btk,khd->bthd", (2, 3, 4), (4, 5, 6)),
    "a vector": ("tk,k->t", (3, 4), (4,)),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_weights_are_the_same_and_not_turned(case):
    equation, *shapes = GRADIENTS[case]
    values, weight = drawn(*shapes)

    def gradients(values, weight):
        return jax.grad(lambda *x: (jnp.einsum(equation, *x) ** 2).sum(), argnums=(0, 1))(
            values, weight
        )

    before, after = graphs_of(gradients, values, weight)
    assert_same(before, after, [values, weight])
    assert count(after, "dot_general") == count(before, "dot_general") == 3
    assert count(before, "transpose") == (case != "a vector")
    assert count(after, "transpose") == 0


@pytest.mark.parametrize("precision", [None, "highest", ("default", "highest")])
def test_what_a_product_is_asked_for_stays(precision):
    lhs, rhs = drawn((3, 4), (4, 5))

    def turned(lhs, rhs):
        return jnp.matmul(
            lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), precision=precision,
            preferred_element_type=jnp.float32,
        ).T  # fmt: skip

    before, after = graphs_of(turned, lhs, rhs)
    assert count(after, "transpose") == 0
    assert_same(before, after, [lhs, rhs])
    wanted = [op.eqn.params["precision"] for op in before.ops if "precision" in op.eqn.params]
    found = [op.eqn.params["precision"] for op in after.ops if "precision" in op.eqn.params]
    assert [p[::-1] if p else p for p in wanted] == found


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: [(p := a @ b), p.T],  # the result is read as it is, too
        lambda a, b: [(p := a @ b).T + 1.0, p.sum()],
        lambda a, b: jnp.einsum("ij,jk->ik", a, b) + 1.0,  # nothing is turned
        lambda a, b: a.T.sum() + b.sum(),  # no product is
        lambda a, b: a + jax.lax.transpose(np.float32(2.0), ()) + b.sum(),
        lambda a, b: (
            jnp.matmul(
                a,
                b,
                precision=jax.lax.DotAlgorithm(np.float32, np.float32, np.float32, 1, 1, 1, False),
            ).T
        ),
    ],
)
def test_everything_else_stays(function):
    before, after = graphs_of(function, *drawn((3, 4), (4, 5)))
    assert after.ops == before.ops


def test_another_order_than_that_of_the_swapped_operands_stays():
    before, after = graphs_of(
        lambda a, b: jnp.transpose(a @ b, (1, 0, 2)), *drawn((2, 3, 4), (4, 5))
    )
    assert after.ops == before.ops
