"""Functions to shard, meshes to shard them on, and the check that what was priced is what runs."""

import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher import autopar

FLAT = autopar.LogicalMesh(shape=(4,), alpha=(1.0,), beta=(1.0,))
SQUARE = autopar.LogicalMesh(shape=(2, 2), alpha=(1.0, 1.0), beta=(1.0, 0.1))
EIGHT = autopar.LogicalMesh(shape=(2, 4), alpha=(1.0, 1.0), beta=(1.0, 0.1))


@pytest.fixture(autouse=True)
def promotion():
    """A user's function may promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def training_step(loss, optimizer=None):
    """`loss(params, batch)` as a step of gradient descent, or of an optax optimizer."""

    def descend(params, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    def update(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return descend if optimizer is None else update


def mlp_loss(params, batch):
    x, y = batch
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x - y) ** 2)


def mlp(layers, samples, width, dtype=jnp.float32):
    layer = {"w": shape(width, width, dtype=dtype), "b": shape(width, dtype=dtype)}
    return [layer] * layers, (shape(samples, width, dtype=dtype),) * 2


def transformer_block(p, x, heads):
    """A pre-LN block with a fused QKV projection, heads outermost."""
    samples, length, hidden = x.shape

    def norm(h):
        h = h - h.mean(-1, keepdims=True)
        return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-5)

    qkv = (norm(x) @ p["qkv"]).reshape(samples, length, heads, 3, hidden // heads)
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    scores = jnp.einsum("bshd,bthd->bhst", q, k)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
    mixed = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(x.shape)
    x = x + mixed @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def transformer(layers, samples, *, length=16, hidden=256, heads=8, remat=False):
    block = jax.checkpoint(transformer_block, static_argnums=2) if remat else transformer_block

    def loss(params, batch):
        x, y = batch
        for p in params:
            x = block(p, x, heads)
        return jnp.mean((x - y) ** 2)

    layer = {
        "qkv": shape(hidden, 3 * hidden),
        "out": shape(hidden, hidden),
        "up": shape(hidden, 4 * hidden),
        "down": shape(4 * hidden, hidden),
    }
    return training_step(loss), [layer] * layers, (shape(samples, length, hidden),) * 2


def moe_layer(p, x):
    """Top-1 routing in groups, with the expert dim in front of the weights."""
    groups, tokens, hidden = x.shape
    experts = p["up"].shape[0]
    capacity = 2 * tokens // experts
    gates = jax.nn.softmax(x @ p["router"])
    mask = jax.nn.one_hot(jnp.argmax(gates, -1), experts)
    position = jnp.cumsum(mask, 1) * mask - mask
    slots = jax.nn.one_hot(position.sum(-1).astype(jnp.int32), capacity)
    kept = mask * (position < capacity)
    combine = (gates * kept)[..., None] * slots[:, :, None]
    dispatch = (combine > 0).astype(x.dtype)
    inside = jnp.einsum("gtec,gth->egch", dispatch, x)
    inside = jax.nn.relu(jnp.einsum("egch,ehf->egcf", inside, p["up"]))
    outside = jnp.einsum("egcf,efh->egch", inside, p["down"])
    return x + jnp.einsum("gtec,egch->gth", combine, outside)


def moe(layers, *, groups=8, tokens=32, hidden=64, wide=1024, experts=8):
    def loss(params, batch):
        x, y = batch
        x = x @ params["in"]
        for p in params["layers"]:
            x = moe_layer(p, x)
        return jnp.mean((x - y) ** 2)

    layer = {
        "router": shape(hidden, experts),
        "up": shape(experts, hidden, wide),
        "down": shape(experts, wide, hidden),
    }
    params = {"in": shape(hidden, hidden), "layers": [layer] * layers}
    return training_step(loss), params, (shape(groups, tokens, hidden),) * 2


def random_arrays(tree):
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        return rng.integers(0, 4, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, tree)


def check_runs_as_priced(step, args, sharded, tolerance=2e-4, arrays=None):
    """The compiled function has the priced collectives, and computes what the function computes."""
    compiled = sharded.compile(jax.devices()[: sharded.mesh.num_devices])
    audit = sharded.audit(compiled)
    assert audit.agrees, f"\n{audit}"
    arrays = random_arrays(args) if arrays is None else arrays
    expected = jax.jit(step)(*arrays)
    for got, want in zip(
        jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max() if np.size(want) else 1.0
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def kinds(sharded, at_least=0):
    """How many collectives of each kind, of so many bytes at least."""
    return Counter(c.kind for c in sharded.collectives if c.num_bytes >= at_least)


def axes_of(spec):
    """All mesh axes of a PartitionSpec."""
    entries = [(e,) if isinstance(e, str) else e for e in spec if e is not None]
    return [axis for entry in entries for axis in entry]


def convolutions(params, batch):
    x, y = batch
    numbers = ("NHWC", "HWIO", "NHWC")
    for w in params:
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        )
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean((x.mean((1, 2)) - y) ** 2)


def scanned(params, batch):
    x, y = batch
    x, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["up"]) @ p["down"] + h, None), x, params)
    return jnp.mean((x - y) ** 2)


def looped(params, x):
    def body(carry):
        count, h = carry
        return count + 1, jnp.tanh(h @ params)

    _, h = jax.lax.while_loop(lambda c: (c[0] < 5) & (c[1].sum() < 1e9), body, (0, x))
    h = jax.lax.cond(h.sum() > 0, lambda h: h @ params, lambda h: 2.0 * h, h)
    return h.sum(0)


def _cases():
    params, batch = mlp(2, 512, 16)
    yield "mlp-data", training_step(mlp_loss), (params, batch)
    params, batch = mlp(2, 8, 256)
    yield "mlp-tensor", training_step(mlp_loss), (params, batch)
    step, params, batch = transformer(2, 8)
    yield "transformer", step, (params, batch)
    step, params, batch = transformer(2, 8, remat=True)
    yield "transformer-remat", step, (params, batch)
    step, params, batch = moe(1)
    yield "moe", step, (params, batch)
    yield "convolutions", training_step(convolutions), (
        [shape(3, 3, 16, 16)] * 2, (shape(16, 8, 8, 16), shape(16, 16)),
    )  # fmt: skip
    stack = {"up": shape(4, 64, 256), "down": shape(4, 256, 64)}
    yield "scan", training_step(scanned), (stack, (shape(8, 64),) * 2)
    yield "while", looped, (shape(64, 64), shape(256, 64))


CASES = {name: (step, args) for name, step, args in _cases()}


@pytest.fixture(scope="session")
def zoo() -> types.SimpleNamespace:
    """Everything above, by name."""
    return types.SimpleNamespace(
        FLAT=FLAT, SQUARE=SQUARE, EIGHT=EIGHT, CASES=CASES, shape=shape, training_step=training_step,
        mlp_loss=mlp_loss, mlp=mlp, transformer=transformer, moe=moe, random_arrays=random_arrays,
        check_runs_as_priced=check_runs_as_priced, kinds=kinds, axes_of=axes_of,
    )  # fmt: skip
