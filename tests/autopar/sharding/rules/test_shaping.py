"""Ops that move elements: which dims stay together, and in which order two axes split one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from launcher.autopar.sharding.rules import axis_choices, shapes_of, strategies
from launcher.autopar.sharding.rules.shaping import aligned_dims

P, R = -2, -1


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def reshaped(*shape):
    return lambda x: lax.reshape(x, shape)


CASES = {
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None, :], (4, 6, 8)), f64(4, 8)),
    "broadcast a stretched dim": (lambda x: jnp.broadcast_to(x, (4, 8)), f64(4, 1)),
    "broadcast a number": (lambda x: x + jnp.zeros((4, 8)) + jnp.ones((4, 8)), f64(4, 8)),
    "split dim": (reshaped(4, 2, 4), f64(4, 8)),
    "merged dims": (reshaped(8, 8), f64(4, 2, 8)),
    "merged three dims": (reshaped(32, 3), f64(4, 2, 4, 3)),
    "heads": (reshaped(4, 6, 2, 2, 4), f64(4, 6, 16)),
    "leading dims of size 1": (reshaped(8, 1, 4), f64(1, 8, 1, 4)),
    "both at once": (reshaped(8, 4), f64(4, 8)),
    "permuted first": (lambda x: lax.reshape(x, (8, 12), (2, 0, 1)), f64(4, 3, 8)),
    "flat": (reshaped(32), f64(4, 8)),
    "from flat": (reshaped(8, 2, 2), f64(32)),
    "transpose": (lambda x: x.transpose(2, 0, 1), f64(4, 6, 8)),
    "squeeze": (lambda x: x.squeeze(1), f64(4, 1, 8)),
    "expand": (lambda x: x[:, None], f64(4, 8)),
    "reverse": (lambda x: x[:, ::-1], f64(4, 8)),
    "slice": (lambda x: x[:, 2:6], f64(4, 8)),
    "strided slice": (lambda x: x[:, ::2], f64(4, 8)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), f64(4, 8)),
    "pad with a number": (lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=3.0), f64(4, 8)),
    "pad with a value": (lambda x, v: lax.pad(x, v, ((0, 0, 0), (1, 2, 1))), f64(4, 8), f64()),
    "cropped": (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, -1, 0))), f64(4, 8)),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], axis=1), f64(4, 8), f64(4, 4)),
    "split": (lambda x: jnp.split(x, 2, axis=1), f64(4, 8)),
    "stack": (lambda x, y: lax.stack([x, y], axis=1), f64(4, 8), f64(4, 8)),
    "unstack": (lambda x: lax.unstack(x, axis=1), f64(4, 2, 8)),
    "tile": (lambda x: lax.tile(x, (1, 4)), f64(4, 8)),
    "tile all": (lambda x: lax.tile(x, (2, 3)), f64(4, 8)),
    "iota": (lambda x: x + lax.broadcasted_iota(jnp.float64, (4, 8), 1), f64(4, 8)),
    "uninitialised": (lambda x: 0.0 * lax.empty((4, 8), x.dtype) + x, f64(4, 8)),
    "copy": (lambda x: jnp.array(x, copy=True), f64(4, 8)),
    "named": (lambda x: checkpoint_name(x, "x"), f64(4, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_computes_what_the_op_computes(name, check):
    function, *arguments = CASES[name]
    check(function, *arguments)


@pytest.mark.parametrize(("source", "target", "pairs"), [
    ((6, 4), (6, 2, 2), {(0, 0), (1, 1)}),
    ((2, 3, 4), (6, 4), {(0, 0), (2, 1)}),
    ((4, 6), (6, 4), {(0, 0)}),
    ((1, 8), (8,), {(1, 0)}),
    ((8,), (1, 8), {(0, 1)}),
    ((1, 4, 2, 1), (8,), {(1, 0)}),
    ((1, 1), (1,), set()),
    ((), (1,), set()),
    ((4,), (4, 1), {(0, 0)}),
    ((2, 3, 5, 7), (6, 35), {(0, 0), (2, 1)}),
])  # fmt: skip
def test_aligned_dims_by_hand(source, target, pairs):
    assert set(aligned_dims(source, target)) == pairs


def shards(array, dim, count):
    return [part.tobytes() for part in np.split(array, count, axis=dim)]


@pytest.mark.parametrize("seed", range(50))
def test_aligned_dims_are_exactly_those_with_equal_shards(seed):
    """Against all pairs of dims, on random shapes: a shard of one holds what a shard of the other does."""
    rng = np.random.default_rng(seed)
    factors = rng.choice([1, 2, 2, 4], size=rng.integers(1, 5))
    source = tuple(int(size) for size in factors)
    target = tuple(int(size) for size in regrouped(factors, rng))
    before = np.arange(np.prod(source)).reshape(source)
    after = before.reshape(target)
    pairs = {
        (i, j)
        for i, size in enumerate(source)
        for j, other in enumerate(target)
        if size % 2 == 0 == other % 2 and shards(before, i, 2) == shards(after, j, 2)
    }
    found = set(aligned_dims(source, target))
    assert {(i, j) for i, j in found if source[i] % 2 == 0 == target[j] % 2} == pairs


def regrouped(factors, rng):
    """The same elements in other dims: prime factors in order, cut at other places."""
    twos = int(np.log2(np.prod(factors)))
    cuts = np.sort(rng.integers(0, twos + 1, size=rng.integers(0, 4)))
    return 2 ** np.diff([0, *cuts, twos])


def test_two_axes_split_one_dim_in_their_order(check):
    """The first axis is the major one on both sides, or the shards would be mixed up: 2 x 2 over 4 and 8."""
    graph = check(reshaped(8, 3), f64(4, 2, 3))
    assert graph.ops


def test_a_shard_holds_whole_repeats(last_op):
    op = last_op(lambda x: lax.tile(x, (1, 3)), f64(4, 8))
    choices = axis_choices(op)
    assert ((R,), (1,), 3) in {(c.operands, c.results, c.pieces) for c in choices}
    for mesh_shape, fits in [((3,), True), ((2,), False), ((4,), False)]:
        found = strategies(op, shapes_of(op), mesh_shape, [choices])
        assert ((1,) in {s.result_spec(0) for s in found}) == fits


PARTIAL_FLOW = {
    "a broadcast number": (lambda: jnp.ones((4,)), (), set()),
    "broadcast zeros": (lambda: jnp.zeros((4,)), (), {((P,), (P,))}),
    "padded with zero": (lambda x: jnp.pad(x, 1), (f64(4),), {((P, P), (P,))}),
    "padded with a number": (lambda x: lax.pad(x, 1.0, ((1, 1, 0),)), (f64(4),), set()),
    "padded with a value": (
        lambda x, v: lax.pad(x, v, ((1, 1, 0),)), (f64(4), f64()), {((P, P), (P,))},
    ),
    "concatenated": (lambda x, y: jnp.concatenate([x, y]), (f64(4), f64(4)), {((P, P), (P,))}),
    "transposed truth values": (
        lambda x: x.T, (jax.ShapeDtypeStruct((4, 4), bool),), set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL_FLOW)
def test_which_ops_take_partial_sums(name, last_op, choices):
    function, arguments, expected = PARTIAL_FLOW[name]
    found = choices(last_op(function, *arguments))
    assert {pair for pair in found if P in (*pair[0], *pair[1])} == expected
