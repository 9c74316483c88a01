"""The custom calls of cuDNN's fused attention: traced as on a GPU, split as the formulas of attention allow.

cuDNN itself does not run here. Its calls are traced with the checks for its presence taken out, and the
rules are run on shards with attention written out in place of the kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from launcher.autopar.graphs.graph import CALLS, CUSTOM_CALLS, from_jaxpr
from launcher.autopar.sharding.rules import registry

P, R = -2, -1
FORWARD, BACKWARD = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
BATCH, LENGTH, HEADS, WIDTH = 2, 8, 4, 8


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def calls(*, key_heads=HEADS, bias=None, **options):
    """The forward and the backward call in the gradient of an attention."""

    def loss(q, k, v, *bias):
        out = jax.nn.dot_product_attention(q, k, v, *bias, implementation="cudnn", **options)
        return out.astype(jnp.float32).sum()

    keys = half(BATCH, LENGTH, key_heads, WIDTH)
    arguments = [
        half(BATCH, LENGTH, HEADS, WIDTH),
        keys,
        keys,
        *([] if bias is None else [half(*bias)]),
    ]
    wanted = tuple(range(len(arguments)))
    closed = jax.make_jaxpr(jax.grad(loss, wanted))(*arguments)
    ops = {str(op.primitive): op for op in from_jaxpr(closed, inline=CALLS | CUSTOM_CALLS).ops}
    return ops[FORWARD], ops[BACKWARD]


NONE = (R,) * 7  # no bias, no lengths, no tables
TABLES = (R,) * 4


def test_batch_and_heads_are_split(choices):
    forward, backward = calls(is_causal=True)
    assert choices(forward) == {((0, 0, 0, *NONE), (0, 0)), ((2, 2, 2, *NONE), (2, 1))}
    assert choices(backward) == {
        ((0, 0, 0, *NONE, 0, 0, 0), (0, 0, 0)),
        ((2, 2, 2, *NONE, 1, 2, 2), (2, 2, 2)),
        ((R, R, R, *NONE, R, R, P), (P, P, P)),
    }


def test_queries_that_share_one_key_head_leave_sums(choices):
    forward, backward = calls(key_heads=1)
    assert ((2, R, R, *NONE), (2, 1)) in choices(forward)
    assert ((2, R, R, *NONE, 1, 2, 2), (2, P, P)) in choices(backward)


@pytest.mark.parametrize(("bias", "by_batch", "by_head"), [
    ((BATCH, HEADS, LENGTH, LENGTH), (0, 0), (1, 1)),
    ((1, HEADS, LENGTH, LENGTH), (R, P), (1, 1)),
    ((BATCH, 1, LENGTH, LENGTH), (0, 0), (R, P)),
    ((1, 1, LENGTH, LENGTH), (R, P), (R, P)),
])  # fmt: skip
def test_a_shared_bias_has_a_partial_gradient(bias, by_batch, by_head, choices):
    _, backward = calls(bias=bias)
    assert {(pair[0][3], pair[1][3]) for pair in choices(backward) if pair[0][0] >= 0} == {
        by_batch,
        by_head,
    }


def test_lengths_are_split_with_the_batch(choices):
    lengths = jnp.full((BATCH,), LENGTH, jnp.int32)
    forward, _ = calls(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    assert choices(forward) == {
        ((0, 0, 0, R, 0, 0, *TABLES), (0, 0)),
        ((2, 2, 2, *NONE), (2, 1)),
    }


def test_what_depends_on_the_place_in_the_kernel_is_whole(choices):
    q = half(BATCH, LENGTH, HEADS, WIDTH)

    def dropped(q):
        return cudnn.dot_product_attention(q, q, q, dropout_rate=0.1)

    closed = jax.make_jaxpr(dropped)(q)
    op = from_jaxpr(closed, inline=CALLS | CUSTOM_CALLS).ops[-1]
    assert str(op.primitive) == FORWARD
    assert choices(op) == set()


def logits(q, k, bias, scale, causal):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = scores + bias if bias.ndim == 4 else scores
    return (
        jnp.where(np.tril(np.ones((1, 1, LENGTH, LENGTH), bool)), scores, -1e9)
        if causal
        else scores
    )


def params(op):
    return op.eqn.params["scale"], "CAUSAL" in str(op.eqn.params["mask_type"])


def attend(op, strategy, mesh, values):
    """The forward call, written out."""
    q, k, v, bias, *_ = values
    scores = logits(q, k, bias, *params(op))
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    return out, jax.nn.logsumexp(scores, axis=-1)


def attend_backward(op, strategy, mesh, values):
    """The backward call, written out from the statistics and the output that the forward call left."""
    q, k, v, bias, *_, statistics, out, gradient = values
    group = q.shape[2] // k.shape[2]
    weights = jnp.exp(logits(q, k, bias, *params(op)) - statistics[..., None])
    by_weight = jnp.einsum("btnh,bsnh->bnts", gradient, jnp.repeat(v, group, axis=2))
    inner = jnp.einsum("btnh,btnh->bnt", gradient, out)[..., None]
    by_score = weights * (by_weight - inner)
    scale, _ = params(op)
    by_query = jnp.einsum("bnts,bsnh->btnh", by_score, jnp.repeat(k, group, axis=2)) * scale
    by_key = summed(jnp.einsum("bnts,btnh->bsnh", by_score, q) * scale, group)
    by_value = summed(jnp.einsum("bnts,btnh->bsnh", weights, gradient), group)
    shared = [dim for dim, size in enumerate(bias.shape) if bias.ndim == 4 and size == 1]
    by_bias = [by_score.sum(axis=shared, keepdims=True)] if bias.ndim == 4 else []
    return by_query, by_key, by_value, *by_bias


def summed(array, group):
    """Over the query heads that share a key head."""
    batch, length, heads, width = array.shape
    return array.reshape(batch, length, heads // group, group, width).sum(axis=3)


@pytest.mark.parametrize("options", [
    {},
    {"is_causal": True, "key_heads": 2},
    {"key_heads": 1},
    {"bias": (1, HEADS, LENGTH, LENGTH)},
    {"bias": (BATCH, 1, LENGTH, LENGTH), "key_heads": 2},
])  # fmt: skip
def test_every_strategy_computes_attention(options, monkeypatch, check_one):
    for name, reference in [(FORWARD, attend), (BACKWARD, attend_backward)]:
        monkeypatch.setitem(registry._LOCAL, name, reference)
    rng = np.random.default_rng(0)
    forward, backward = calls(**options)
    values = [jnp.asarray(rng.normal(size=atom.aval.shape)) for atom in forward.eqn.invars]
    out, statistics = attend(forward, None, None, values)
    check_one(forward, values, (out, statistics))
    values += [statistics, out, jnp.asarray(rng.normal(size=out.shape))]
    expected = attend_backward(backward, None, None, values)
    _, pull = jax.vjp(lambda *a: attend(forward, None, None, [*a, *values[4:10]])[0], *values[:4])
    for found, wanted in zip(expected, pull(values[-1]), strict=False):
        np.testing.assert_allclose(found, wanted, atol=1e-9)  # the reference is a gradient indeed
    check_one(backward, values, expected)
