"""Every strategy of every rule computes what the op computes, on shards, on a mesh of 2 x 2 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from launcher.autopar.graph import CALLS, CUSTOM_CALLS, evaluate_op, from_jaxpr
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.rules import axis_choices, run_local, shapes_of, strategies
from launcher.autopar.shards import reshard_local
from launcher.autopar.spec import replicated
from launcher.errors import UnsupportedPrimitiveError

MESH = LogicalMesh(shape=(2, 2), alpha=(1.0, 1.0), beta=(1.0, 1.0))


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def gradient(function, argument):
    return lambda *args: jax.grad(lambda *a: function(*a).sum(), argument)(*args)


def convolution(x, w, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def strided(x, w):
    return convolution(x, w, window_strides=(2, 2))


def grouped(x, w):
    return convolution(x, w, feature_group_count=2)


def mean_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def update_columns(x, y, i):
    return lax.dynamic_update_slice_in_dim(x, y, i, axis=1)


IMAGES, KERNEL = jax.ShapeDtypeStruct((4, 6, 6, 4), np.float64), (3, 3, 4, 8)


def embed(table, ids):
    return table[ids]


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def routed(logits):
    values, indices = lax.top_k(logits, 2)
    return values * indices + jnp.cumsum(values, axis=0)


CASES = {
    "elementwise": (lambda x, y: jnp.tanh(x) * y + x / (1.0 + y * y) - x, f64(4, 8), f64(4, 8)),
    "select": (lambda x, y: jnp.where(x > y, x, 2.0 * y), f64(4, 8), f64(4, 8)),
    "clamp": (lambda x: jnp.clip(x, -0.5, 0.5), f64(4, 8)),
    "casts": (lambda x: x.astype(jnp.int32).astype(jnp.float64) + x, f64(4, 8)),
    "matmul": (jnp.matmul, f64(4, 8), f64(8, 12)),
    "attention": (
        lambda q, k: jnp.einsum("bsnd,btnd->bnst", q, k),
        f64(4, 6, 2, 8),
        f64(4, 6, 2, 8),
    ),
    "experts": (lambda x, w: jnp.einsum("egch,ehm->egcm", x, w), f64(4, 2, 4, 6), f64(4, 6, 8)),
    "two contracted dims": (
        lambda x, y: jnp.einsum("abc,abd->cd", x, y),
        f64(4, 2, 6),
        f64(4, 2, 8),
    ),
    "convolution": (convolution, IMAGES, f64(*KERNEL)),
    "strided convolution": (
        lambda x, w: convolution(x, w, window_strides=(2, 2)),
        f64(4, 6, 6, 4),
        f64(3, 3, 4, 8),
    ),
    "convolution's input gradient": (
        gradient(lambda x, w: convolution(x, w, window_strides=(2, 2)) ** 2, 0),
        f64(4, 6, 6, 4),
        f64(3, 3, 4, 8),
    ),
    "convolution's kernel gradient": (
        gradient(lambda x, w: convolution(x, w) ** 2, 1),
        f64(4, 6, 6, 4),
        f64(3, 3, 4, 8),
    ),
    "grouped convolution": (
        lambda x, w: convolution(x, w, feature_group_count=2),
        f64(4, 6, 6, 4),
        f64(3, 3, 2, 8),
    ),
    "sum": (lambda x: x.sum(axis=(0, 2)), f64(4, 6, 8)),
    "maximum": (lambda x: x.max(axis=1) - x.min(axis=1), f64(4, 8)),
    "argmax": (lambda x: jnp.argmax(x, axis=1), f64(4, 8)),
    "log-softmax": (jax.nn.log_softmax, f64(4, 8)),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=1), f64(4, 8)),
    "sort": (lambda x: jnp.sort(x, axis=1), f64(4, 8)),
    "routing": (routed, f64(4, 8)),
    "max pooling": (max_pool, f64(4, 8, 8, 4)),
    "max pooling's gradient": (gradient(max_pool, 0), f64(4, 8, 8, 4)),
    "mean pooling": (
        mean_pool,
        f64(4, 8, 8, 4),
    ),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None, :], (4, 6, 8)), f64(4, 8)),
    "split dim": (lambda x: x.reshape(4, 2, 4), f64(4, 8)),
    "merged dims": (lambda x: x.reshape(8, 8), f64(4, 2, 8)),
    "heads": (lambda x: x.reshape(4, 6, 2, 2, 4), f64(4, 6, 16)),
    "transpose": (lambda x: x.transpose(2, 0, 1), f64(4, 6, 8)),
    "squeeze": (lambda x: x.squeeze(1), f64(4, 1, 8)),
    "reverse": (lambda x: x[:, ::-1], f64(4, 8)),
    "slice": (lambda x: x[:, 2:6], f64(4, 8)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), f64(4, 8)),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], axis=1), f64(4, 8), f64(4, 4)),
    "split op": (lambda x: jnp.split(x, 2, axis=1), f64(4, 8)),
    "iota": (lambda x: x + lax.broadcasted_iota(jnp.float64, (4, 8), 1), f64(4, 8)),
    "embedding": (embed, f64(8, 4), i32(4, 6)),
    "embedding's gradient": (gradient(lambda t, i: embed(t, i) ** 2, 0), f64(8, 4), i32(4, 6)),
    "take along": (lambda x, i: jnp.take_along_axis(x, i, axis=1), f64(4, 8), i32(4, 2)),
    "dynamic slice": (lambda x, i: lax.dynamic_slice_in_dim(x, i, 2, axis=1), f64(4, 8), i32()),
    "dynamic update": (
        update_columns,
        f64(4, 8),
        f64(4, 2),
        i32(),
    ),
    "random bits": (lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, (4, 8)), f64(4, 8)),
    "scan": (lambda x: lax.scan(lambda c, row: (c + row, c * row), jnp.zeros(8), x)[1], f64(4, 8)),
    "cond": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), f64(4, 8)),
}


def draw(aval, rng):
    if jnp.issubdtype(aval.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
    if aval.dtype == jnp.bool_:
        return jnp.asarray(rng.integers(0, 2, aval.shape), bool)
    return jnp.asarray(rng.normal(size=aval.shape), aval.dtype)


def graph_of(function, *shapes):
    return from_jaxpr(jax.make_jaxpr(function)(*shapes), inline=CALLS | CUSTOM_CALLS)


def all_strategies(op):
    free = axis_choices(op)
    return strategies(op, shapes_of(op), MESH.shape, [free, free])


def computed_on_shards(op, values, found):
    """The whole results of an op, computed by each strategy on shards."""
    whole = replicated(MESH.num_axes)

    def on_device(*arguments):
        outcomes = []
        for strategy in found:
            shards = [
                reshard_local(value, var.aval, whole, strategy.operand_spec(i), MESH)
                for i, (value, var) in enumerate(zip(arguments, op.eqn.invars, strict=True))
            ]
            results = run_local(op, strategy, MESH, shards)
            outcomes.append([
                reshard_local(result, var.aval, strategy.result_spec(i), whole, MESH)
                for i, (result, var) in enumerate(zip(results, op.eqn.outvars, strict=True))
            ])  # fmt: skip
        return outcomes

    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), MESH.axis_names)
    spec = PartitionSpec()
    mapped = jax.shard_map(on_device, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped)(*values)


@pytest.fixture(autouse=True)
def double_precision():
    """Sharded sums add up in another order; in double precision that cannot hide a wrong rule."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_computes_what_the_op_computes(name):
    function, *shapes = CASES[name]
    graph = graph_of(function, *shapes)
    rng = np.random.default_rng(0)
    env = {value: draw(graph.avals[value], rng) for value in graph.inputs}
    env |= dict(graph.constants)
    for op in graph.ops:
        values = [env[o] if isinstance(o, int) else jnp.asarray(o.val) for o in op.operands]
        expected = evaluate_op(op, values)
        env |= dict(zip(op.results, expected, strict=True))
        if jax.dtypes.issubdtype(expected[0].dtype, jax.dtypes.prng_key) or "random" in str(
            op.primitive
        ):
            continue  # keys and bits have the replicated strategy only
        found = all_strategies(op)
        for strategy, results in zip(found, computed_on_shards(op, values, found), strict=True):
            for result, wanted in zip(results, expected, strict=True):
                np.testing.assert_allclose(
                    result, wanted, rtol=1e-11, atol=1e-11, err_msg=f"{op.primitive} {strategy}"
                )


def test_matmul_has_the_strategies_one_expects():
    (op,) = graph_of(jnp.matmul, f64(4, 8), f64(8, 12)).ops
    splits = {(c.operands, c.results) for c in axis_choices(op)}
    assert splits == {
        ((-1, -1), (-1,)),  # whole
        ((0, -1), (0,)),  # rows
        ((-1, 1), (1,)),  # columns
        ((1, 0), (-2,)),  # contracted: a partial sum
        ((-2, -1), (-2,)),  # linear in either operand
        ((-1, -2), (-2,)),
    }


def test_uneven_splits_are_left_out():
    (op,) = graph_of(jnp.tanh, f64(3, 8)).ops
    whole_rows = {(-1, -1), (1, -1), (-1, 1), (1, 1)}
    assert {strategy.operand_spec(0) for strategy in all_strategies(op)} == whole_rows


def test_an_unknown_primitive_is_named_with_its_place_and_the_cure():
    (op,) = graph_of(lax.linalg.tridiagonal_solve, f64(4), f64(4), f64(4), f64(4, 2)).ops  # fmt: skip
    with pytest.raises(
        UnsupportedPrimitiveError, match=r"tridiagonal_solve.*no sharding rule.*registry"
    ):
        axis_choices(op)
