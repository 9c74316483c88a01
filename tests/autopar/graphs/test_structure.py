"""What is alike, and what repeats; the longest repetition against a search of all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from launcher.autopar.graphs.graph import trace
from launcher.autopar.graphs.structure import Run, find_repeats, op_signature

X = np.ones((4, 6), np.float32)


def signatures(function, *arguments):
    graph, _ = trace(function, *arguments)
    return [op_signature(op) for op in graph.ops]


def straight_through(slope):
    @jax.custom_jvp
    def rounded(x):
        return jnp.round(x)

    @rounded.defjvp
    def rule(primals, tangents):
        return rounded(*primals), slope * tangents[0]

    return rounded


def with_own_gradient(rule, forward=jnp.sin):
    """A function whose gradient is what a rule makes of its argument and the result's cotangent."""
    function = jax.custom_vjp(forward)
    function.defvjp(lambda x: (forward(x), x), lambda x, g: (rule(x, g),))
    return function


HALVES = np.repeat([1.0, 0.5], 3000).astype(np.float32)
ALIKE = {
    "the same op on other values": lambda x: (jnp.sin(x), jnp.sin(2.0 * x)),
    "the same literal": lambda x: (x * 2.0, x * 2.0),
    "the same call": lambda x: (jax.nn.relu(x), jax.nn.relu(-x)),
    "equal custom gradients": lambda x: (
        with_own_gradient(lambda x, g: x * g)(x),
        with_own_gradient(lambda a, b: a * b)(-x),
    ),
    "equal custom derivatives": lambda x: (straight_through(2.0)(x), straight_through(2.0)(x)),
    "the same loop": lambda x: tuple(lax.fori_loop(0, 3, lambda i, c: c * x, x) for _ in range(2)),
}
UNLIKE = {
    "another primitive": lambda x: (jnp.sin(x), jnp.cos(x)),
    "another literal": lambda x: (x * 2.0, x * 3.0),
    "another parameter": lambda x: (x.sum(0), x.sum(1)),
    "another shape": lambda x: (jnp.sin(x), jnp.sin(x[0])),
    "another dtype": lambda x: (jnp.sin(x), jnp.sin(x.astype(jnp.float16))),
    "another side of a literal": lambda x: (x - 2.0, 2.0 - x),
    "another trip count": lambda x: tuple(
        lax.scan(lambda c, _: (c * x, None), x, length=n)[0] for n in (2, 3)
    ),
    "another custom derivative": lambda x: (straight_through(1.0)(x), straight_through(2.0)(x)),
    "another array in a custom derivative": lambda x: tuple(
        straight_through(slopes)(jnp.ones(6000, jnp.float32)) for slopes in (HALVES, HALVES[::-1])
    ),
    "another custom gradient": lambda x: tuple(
        with_own_gradient(rule)(x) for rule in (lambda x, g: x * x, lambda x, g: g * g)
    ),
    "another array in a custom gradient": lambda x: tuple(
        with_own_gradient(lambda x, g, s=slopes: g * s)(jnp.ones(6000, jnp.float32))
        for slopes in (HALVES, HALVES[::-1])
    ),
    "another function under a custom gradient": lambda x: tuple(
        with_own_gradient(lambda x, g: g, forward)(x) for forward in (jnp.sin, jnp.cos)
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name):
    graph, _ = trace(ALIKE[name], X)
    ops = [op for op in graph.ops if set(op.results) & set(graph.outputs)]
    assert len(ops) == 2
    assert op_signature(ops[0]) == op_signature(ops[1])


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike(name):
    graph, _ = trace(UNLIKE[name], X)
    ops = [op for op in graph.ops if set(op.results) & set(graph.outputs)]
    assert len(ops) == 2
    assert op_signature(ops[0]) != op_signature(ops[1])


def test_signatures_can_be_compared_across_traces():
    def block(x):
        return jax.nn.relu(jnp.tanh(x @ x.T) * 0.5)

    assert signatures(block, X) == signatures(block, X)
    assert len({hash(s) for s in signatures(block, X)}) == len(signatures(block, X))


def test_repeats_between_other_ops():
    block = list("abcdefgh")
    found = find_repeats([*"xyz", *block * 5, *"uvw"])
    assert found == (Run(start=3, period=8, end=43),)
    assert found[0].count == 5


def test_the_last_repetition_may_be_cut_short():
    (run,) = find_repeats(list("abcdefgh" * 3 + "abc" + "zzzz"))
    assert (run.start, run.period, run.end, run.count) == (0, 8, 27, 3)


def test_two_kinds_of_blocks():
    found = find_repeats([*"abcdefgh" * 3, *"123456789" * 4])
    assert [(run.start, run.period, run.count) for run in found] == [(0, 8, 3), (24, 9, 4)]


def test_blocks_in_blocks_are_one_repetition_of_the_shortest_period():
    (run,) = find_repeats(list("abcdabcd" * 4), minimum_period=2)
    assert (run.period, run.count) == (4, 8)


@pytest.mark.parametrize("sequence", ["", "a", "abcdefghij", "a" * 50, "ab" * 25])
def test_nothing_repeats_that_could_be_a_layer(sequence):
    assert find_repeats(list(sequence)) == ()


def test_one_op_repeated_does_not_hide_a_block():
    (run,) = find_repeats([*"." * 40, *"abcdefgh" * 2])
    assert (run.start, run.period, run.count) == (40, 8, 2)


def repeats(sequence, start, period, count):
    return all(
        sequence[i] == sequence[i + period] for i in range(start, start + period * (count - 1))
    )


def longest_coverage(sequence, minimum_period):
    """The most positions that one run of whole repetitions can cover, by trying them all."""
    n = len(sequence)
    best = 0
    for start, period in itertools.product(range(n), range(minimum_period, n)):
        for count in range(2, (n - start) // period + 1):
            block = sequence[start : start + period]
            if len(set(block)) > 2 and repeats(sequence, start, period, count):
                best = max(best, count * period)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_the_longest_run_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    block = rng.integers(0, 4, rng.integers(3, 6)).tolist()
    noise = rng.integers(0, 4, rng.integers(0, 16)).tolist()
    sequence = [*noise[: len(noise) // 2], *block * rng.integers(1, 4), *noise[len(noise) // 2 :]]
    minimum_period = int(rng.integers(2, 5))
    found = find_repeats(sequence, minimum_period)
    covered = [run.count * run.period for run in found]
    assert max(covered, default=0) == longest_coverage(sequence, minimum_period)
    for run in found:
        assert run.period >= minimum_period
        assert repeats(sequence, run.start, run.period, run.count)
        assert all(
            sequence[i] == sequence[i + run.period] for i in range(run.start, run.end - run.period)
        )
    assert all(left.end <= right.start for left, right in itertools.pairwise(found))
