"""What real models are made of has rules: layers, activations, losses, optimizers, traced with gradients.

Everything is traced on small shapes and differentiated where that makes sense; then every primitive that
is left, in loops and branches too, must have a rule.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from launcher.autopar.graphs.graph import CALLS, CUSTOM_CALLS, Op, from_jaxpr
from launcher.autopar.sharding.rules import axis_choices


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


X, IMAGES = f32(4, 8), f32(2, 8, 8, 4)
SEQUENCE = f32(2, 6, 8)


def layer(make, *inputs, **options):
    """A layer with the gradient of its parameters and its first input, if that has one."""

    def traced():
        graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, rest, *inputs):
            out = nnx.merge(graph, params, rest, copy=True)(*inputs, **options)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

        has_gradient = jnp.issubdtype(inputs[0].dtype, jnp.floating)
        wanted = (0, 2) if has_gradient else 0
        return jax.make_jaxpr(jax.grad(loss, wanted))(params, rest, *inputs)

    return traced


def cell(make, *inputs):
    def run(rngs):
        return nnx.RNN(make(rngs))

    return layer(run, *inputs)


LAYERS = {
    "Linear": layer(lambda r: nnx.Linear(8, 4, rngs=r), X),
    "Linear in bf16": layer(lambda r: nnx.Linear(8, 4, dtype=jnp.bfloat16, rngs=r), X),
    "LinearGeneral": layer(
        lambda r: nnx.LinearGeneral((6, 8), (2, 4), axis=(-2, -1), rngs=r), SEQUENCE
    ),
    "Einsum": layer(lambda r: nnx.Einsum("bsd,dnh->bsnh", (8, 2, 4), rngs=r), SEQUENCE),
    "Conv": layer(lambda r: nnx.Conv(4, 8, (3, 3), strides=2, rngs=r), IMAGES),
    "Conv, dilated": layer(lambda r: nnx.Conv(4, 8, (3, 3), kernel_dilation=2, rngs=r), IMAGES),
    "Conv, circular": layer(lambda r: nnx.Conv(4, 8, (3, 3), padding="CIRCULAR", rngs=r), IMAGES),
    "Conv, causal": layer(lambda r: nnx.Conv(8, 8, 3, padding="CAUSAL", rngs=r), SEQUENCE),
    "Conv, depthwise": layer(
        lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=r), IMAGES
    ),
    "ConvTranspose": layer(lambda r: nnx.ConvTranspose(4, 8, (3, 3), strides=(2, 2), rngs=r), IMAGES),
    "BatchNorm": layer(lambda r: nnx.BatchNorm(4, use_running_average=False, rngs=r), IMAGES),
    "BatchNorm, evaluated": layer(
        lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r), IMAGES
    ),
    "LayerNorm": layer(lambda r: nnx.LayerNorm(8, rngs=r), X),
    "GroupNorm": layer(lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r), IMAGES),
    "RMSNorm": layer(lambda r: nnx.RMSNorm(8, rngs=r), X),
    "SpectralNorm": layer(
        lambda r: nnx.SpectralNorm(nnx.Linear(8, 4, rngs=r), rngs=r), X, update_stats=False
    ),
    "WeightNorm": layer(lambda r: nnx.WeightNorm(nnx.Linear(8, 4, rngs=r), rngs=r), X),
    "Embed": layer(lambda r: nnx.Embed(16, 8, rngs=r), i32(2, 6)),
    "Embed and attend": layer(lambda r: Tied(r), i32(2, 6)),
    "Attention": layer(
        lambda r: nnx.MultiHeadAttention(2, 8, rngs=r, decode=False), SEQUENCE
    ),
    "Attention with a mask and dropout": layer(
        lambda r: nnx.MultiHeadAttention(
            2, 8, rngs=r, decode=False, dropout_rate=0.1, deterministic=False, normalize_qk=True
        ),
        SEQUENCE,
        mask=np.tril(np.ones((2, 2, 6, 6), bool)),
    ),
    "Dropout": layer(lambda r: nnx.Dropout(0.5, deterministic=False, rngs=r), X),
    "LSTM": cell(lambda r: nnx.OptimizedLSTMCell(8, 4, rngs=r), SEQUENCE),
    "GRU": cell(lambda r: nnx.GRUCell(8, 4, rngs=r), SEQUENCE),
    "LoRA": layer(lambda r: nnx.LoRA(8, 2, 4, rngs=r), X),
    "PReLU": layer(lambda r: nnx.PReLU(), X),
}  # fmt: skip


class Tied(nnx.Module):
    """An embedding that is also the output projection."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


def function(run, *arguments, differentiate=True):
    def traced():
        def loss(*arguments):
            leaves = jax.tree.leaves(run(*arguments))
            return sum(jnp.sum(leaf).real.astype(jnp.float32) for leaf in leaves)

        return jax.make_jaxpr(jax.grad(loss) if differentiate else run)(*arguments)

    return traced


def shapes(run, *arguments):
    return function(run, *arguments, differentiate=False)


ACTIVATIONS = {
    name: function(run, X)
    for name, run in {
        "relu": jax.nn.relu, "relu6": jax.nn.relu6, "gelu": jax.nn.gelu, "silu": jax.nn.silu,
        "exact gelu": lambda x: jax.nn.gelu(x, approximate=False), "elu": jax.nn.elu,
        "selu": jax.nn.selu, "celu": jax.nn.celu, "softplus": jax.nn.softplus, "mish": jax.nn.mish,
        "hard swish": jax.nn.hard_swish, "leaky": jax.nn.leaky_relu, "glu": jax.nn.glu,
        "log sigmoid": jax.nn.log_sigmoid, "softmax": jax.nn.softmax,
        "sparse plus": jax.nn.sparse_plus, "log-softmax": jax.nn.log_softmax,
        "logsumexp": jax.nn.logsumexp, "standardize": jax.nn.standardize, "squareplus": jax.nn.squareplus,
    }.items()
}  # fmt: skip


def mixture(x, w, routing):
    """Top-2 routing with one-hot dispatch, as GShard has it."""
    gates, experts = jax.lax.top_k(jax.nn.softmax(x @ routing), 2)
    places = jnp.cumsum(jax.nn.one_hot(experts, 4, dtype=jnp.int32), axis=0)
    dispatch = jax.nn.one_hot(jnp.max(places, axis=-1), 4) * gates[..., None]
    return jnp.einsum("tkc,td,cdf->tf", dispatch, x, w)


def sorted_mixture(x, w, routing):
    """Tokens sorted by expert, and one ragged product."""
    experts = jnp.argmax(x @ routing, axis=-1)
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=4)
    products = jax.lax.ragged_dot(x[order], w, sizes.astype(jnp.int32))
    return products[jnp.argsort(order)]


KEY = jax.eval_shape(jax.random.key, 0)
HEADS = f32(2, 6, 2, 4)
ARRAYS = {
    "one_hot": shapes(lambda i: jax.nn.one_hot(i, 8), i32(4)),
    "attention": function(lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=True), HEADS),
    "grouped attention": function(
        lambda q, k: jax.nn.dot_product_attention(q, k, k), HEADS, f32(2, 6, 1, 4)
    ),
    "einsums": function(
        lambda x: jnp.einsum("ij,kj->ik", x, x) + jnp.einsum("ij,ij->i", x, x).sum(), X
    ),
    "where": function(lambda x: jnp.where(x > 0, x, -jnp.inf), X),
    "take": function(lambda x: jnp.take(x, jnp.array([1, 2]), axis=1), X),
    "take_along_axis": function(lambda x, i: jnp.take_along_axis(x, i, axis=1), X, i32(4, 2)),
    "indexed updates": function(lambda x: x.at[1].set(0.0).at[:, 2].max(1.0).at[0].mul(2.0), X),
    "sorting": function(lambda x: jnp.sort(x) + jnp.argsort(x) + jnp.median(x), X),
    "quantile": function(lambda x: jnp.quantile(x, 0.3, axis=0), X),
    "cumulative": function(lambda x: jnp.cumsum(x) + jnp.cumprod(x).sum() + jax.lax.cummax(x).sum(), X),
    "roll and flip": function(lambda x: jnp.roll(x, 1, axis=1) + jnp.flip(x), X),
    "tile and repeat": function(lambda x: jnp.tile(x, 2) + jnp.repeat(x, 2, axis=1), X),
    "pads": function(
        lambda x: sum(
            jnp.pad(x, 2, mode=m).sum() for m in ("constant", "edge", "reflect", "symmetric", "wrap")
        ), X,
    ),
    "stacking": function(lambda x: [jnp.stack([x, x]), jnp.concatenate([x, x]), jnp.split(x, 2)], X),
    "triangles": function(lambda x: jnp.tril(x) + jnp.triu(x) + jnp.eye(4, 8), X),
    "diagonal": function(lambda x: jnp.diagonal(x) + jnp.trace(x), X),
    "meshgrid": shapes(lambda x: jnp.meshgrid(jnp.arange(4), jnp.linspace(0.0, 1.0, 3)), X),
    "statistics": function(lambda x: jnp.var(x) + jnp.std(x, axis=0).sum() + jnp.percentile(x, 50), X),
    "norms": function(lambda x: jnp.linalg.norm(x) + jnp.linalg.norm(x, 1, axis=1).sum(), X),
    "linear algebra": function(
        lambda a: jnp.linalg.inv(a) + jnp.linalg.cholesky(a @ a.T) + jnp.linalg.slogdet(a)[1], f32(4, 4)
    ),
    "solve": function(lambda a: jnp.linalg.solve(a, a) + jnp.linalg.qr(a)[0], f32(4, 4)),
    "spectra": function(
        lambda a: jnp.linalg.svd(a, compute_uv=False) + jnp.linalg.eigvalsh(a), f32(4, 4)
    ),
    "matrix power": function(
        lambda a: jnp.linalg.matrix_power(a, 3) + jax.scipy.linalg.expm(a), f32(4, 4)
    ),
    "fourier": function(lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 2.0), X),
    "convolve": function(lambda x: jax.vmap(lambda r: jnp.convolve(r, r[:3]))(x), X),
    "pooling": function(lambda x: [nnx.avg_pool(x, (2, 2)), nnx.max_pool(x, (3, 3), (2, 2))], IMAGES),
    "smallest pooling": function(lambda x: nnx.min_pool(x, (2, 2), (2, 2)), IMAGES),
    "resize": function(lambda x: jax.image.resize(x, (2, 4, 4, 4), "bilinear"), IMAGES),
    "rotary": function(lambda x: x * jnp.cos(jnp.arange(8.0))[None] + jnp.roll(x, 4, -1), X),
    "random": shapes(
        lambda k: [jax.random.normal(k, (4,)), jax.random.categorical(k, jnp.zeros((4, 3))),
                   jax.random.permutation(k, 8), jax.random.truncated_normal(k, -1, 1, (4,)),
                   jax.random.gumbel(k, (4,)), jax.random.randint(k, (4,), 0, 7),
                   jax.random.split(k, 3)[1], jax.random.gamma(k, 2.0, (4,)),
                   jax.random.dirichlet(k, jnp.ones(3)), jax.random.bits(k, (3,))], KEY,
    ),
    "raw keys": shapes(lambda: jax.random.uniform(jax.random.PRNGKey(0), (4,))),
    "old keys split": shapes(lambda k: jax.random.split(k), jax.ShapeDtypeStruct((2,), np.uint32)),
    "mixture of experts": function(mixture, X, f32(4, 8, 8), f32(8, 4)),
    "mixture of experts, sorted": function(sorted_mixture, X, f32(4, 8, 8), f32(8, 4)),
    "rematerialized": function(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x) @ x.T)), X),
    "scanned layers": function(
        lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.ones((3, 8, 8), x.dtype))[0], X
    ),
    "associative scan": function(lambda x: jax.lax.associative_scan(jnp.multiply, x), X),
    "map": function(lambda x: jax.lax.map(jnp.tanh, x), X),
    "branches": function(lambda x: jax.lax.switch(0, [jnp.tanh, jnp.sin], x), X),
    "special": function(
        lambda x: jax.scipy.special.gammaln(x) + jax.scipy.special.erf(x) + jax.scipy.special.expit(x), X
    ),
    "quantized": shapes(
        lambda x: (x.astype(jnp.int8) @ x.astype(jnp.int8).T).astype(jnp.float8_e4m3fn), X
    ),
}  # fmt: skip


LOGITS, LABELS = f32(4, 8), i32(4)
LOSSES = {
    name: function(run, *arguments)
    for name, (run, *arguments) in {
        "cross-entropy": (optax.softmax_cross_entropy_with_integer_labels, LOGITS, LABELS),
        "soft cross-entropy": (optax.softmax_cross_entropy, LOGITS, LOGITS),
        "binary": (optax.sigmoid_binary_cross_entropy, LOGITS, LOGITS),
        "squared": (optax.squared_error, LOGITS, LOGITS),
        "huber": (optax.huber_loss, LOGITS, LOGITS),
        "cosine": (optax.cosine_distance, LOGITS, LOGITS),
        "divergence": (optax.kl_divergence, LOGITS, LOGITS),
        "hinge": (optax.hinge_loss, LOGITS, LOGITS),
        "focal": (optax.sigmoid_focal_loss, LOGITS, LOGITS),
        "ctc": (optax.ctc_loss, f32(2, 6, 5), f32(2, 6), i32(2, 3), f32(2, 3)),
    }.items()
}


def update(optimizer):
    """One step of an optimizer, on a matrix large enough to be factored and a vector."""
    params = {"kernel": f32(256, 128), "bias": f32(128)}

    def step(state, gradients, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return lambda: jax.make_jaxpr(step)(state, params, params)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
OPTIMIZERS = {
    name: update(optimizer)
    for name, optimizer in {
        "adamw": optax.adamw(SCHEDULE), "adam in bf16": optax.adam(1e-3, mu_dtype=jnp.bfloat16),
        "adafactor": optax.adafactor(1e-3), "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
        "lion": optax.lion(1e-4), "lamb": optax.lamb(1e-3), "rmsprop": optax.rmsprop(1e-3),
        "adagrad": optax.adagrad(1e-2), "novograd": optax.novograd(1e-3),
        "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        "adaptively clipped": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1e-2)),
        "accumulated": optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
        "finite": optax.apply_if_finite(optax.adam(1e-3), 3), "muon": optax.contrib.muon(1e-3),
        "noisy": optax.noisy_sgd(1e-3, key=jax.random.key(0)), "radam": optax.radam(1e-3),
        "amsgrad": optax.amsgrad(1e-3),
        "schedule-free": optax.contrib.schedule_free_adamw(1e-3), "yogi": optax.yogi(1e-3),
    }.items()
}  # fmt: skip

CENSUS = {
    f"{group}: {name}": traced
    for group, members in {
        "layer": LAYERS, "activation": ACTIVATIONS, "array": ARRAYS, "loss": LOSSES,
        "optimizer": OPTIMIZERS,
    }.items()
    for name, traced in members.items()
}  # fmt: skip

# Primitives that these models use and that have no rule, each with the reason: none.
WITHOUT_RULE: dict[str, str] = {}


def all_ops(closed) -> Iterator[Op]:
    """The ops of a jaxpr and of the loops and branches in it."""
    for op in from_jaxpr(closed, inline=CALLS | CUSTOM_CALLS).ops:
        yield op
        for inner in jaxprs_in_params(op.eqn.params):
            yield from all_ops(jax.extend.core.ClosedJaxpr(inner, [None] * len(inner.constvars)))


@pytest.mark.parametrize("name", CENSUS)
def test_every_primitive_has_a_rule(name):
    for op in all_ops(CENSUS[name]()):
        if str(op.primitive) not in WITHOUT_RULE:
            assert axis_choices(op)


def test_the_census_is_large():
    assert len(CENSUS) >= 100
