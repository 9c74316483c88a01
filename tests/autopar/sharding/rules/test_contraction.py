"""Matrix products and convolutions, in all their forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as prim

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import CALLS, from_jaxpr
from launcher.autopar.sharding.rules import axis_choices, run_local, shapes_of, strategies

P, R = -2, -1


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def gradients(function):
    """The gradients of a function's arguments, for one arbitrary gradient of its result."""

    def run(*arguments):
        result, pull = jax.vjp(function, *arguments)
        return pull(np.cos(np.arange(result.size)).reshape(result.shape))

    return run


def einsum(letters):
    return lambda x, y: jnp.einsum(letters, x, y)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, np.int8)


def int_product(x, y):
    return lax.dot_general(x, y, (([1], [0]), ([], [])), preferred_element_type=jnp.int32)


GROUP_SIZES = np.array([3, 1, 4], np.int32)


def ragged(x, w):
    return lax.ragged_dot(x, w, jnp.asarray(GROUP_SIZES))


PRODUCTS = {
    "matmul": (jnp.matmul, f64(4, 8), f64(8, 12)),
    "attention": (einsum("bsnd,btnd->bnst"), f64(4, 6, 2, 8), f64(4, 6, 2, 8)),
    "experts": (einsum("egch,ehm->egcm"), f64(4, 2, 4, 6), f64(4, 6, 8)),
    "two contracted dims": (einsum("abc,abd->cd"), f64(4, 2, 6), f64(4, 2, 8)),
    "several of each": (einsum("abkcl,bdlak->abcd"), f64(4, 2, 4, 2, 4), f64(2, 4, 4, 4, 4)),
    "outer": (einsum("i,j->ij"), f64(4), f64(8)),
    "inner": (einsum("i,i->"), f64(4), f64(4)),
    "complex": (jnp.matmul, *[jax.ShapeDtypeStruct((4, 4), np.complex128)] * 2),
    "integers, accumulated wider": (int_product, ints(4, 8), ints(8, 4)),
    "ragged": (ragged, f64(8, 4), f64(3, 4, 12)),
    "ragged, both gradients": (gradients(ragged), f64(8, 4), f64(3, 4, 12)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, check):
    function, *arguments = PRODUCTS[name]
    check(function, *arguments)


def test_matmul_has_the_strategies_one_expects(last_op, choices):
    op = last_op(jnp.matmul, f64(4, 8), f64(8, 12))
    assert choices(op) == {
        ((0, R), (0,)),  # rows
        ((R, 1), (1,)),  # columns
        ((1, 0), (P,)),  # contracted: a partial sum
        ((P, R), (P,)),  # linear in either operand
        ((R, P), (P,)),
    }


def test_a_ragged_product_keeps_its_groups_whole(last_op, choices):
    op = last_op(ragged, f64(8, 4), f64(3, 4, 12))
    assert choices(op) == {
        ((R, 2, R), (1,)),
        ((1, 1, R), (P,)),
        ((P, R, R), (P,)),
        ((R, P, R), (P,)),
    }


def test_sums_of_8_bit_floats_are_not_left_partial(last_op, choices):
    def product(x, y):
        return lax.dot_general(
            x, y, (([1], [0]), ([], [])), preferred_element_type=jnp.float8_e4m3fn
        )

    op = last_op(product, *[jax.ShapeDtypeStruct((4, 4), jnp.float8_e4m3fn)] * 2)
    assert choices(op) == {((0, R), (0,)), ((R, 1), (1,))}


def convolution(x, w, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def with_options(**options):
    return lambda x, w: convolution(x, w, **options)


def both_gradients(**options):
    return gradients(with_options(**options))


def transposed(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def one_dim(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW"))


STRIDE = {"window_strides": (2, 2)}
CONVOLUTIONS = {
    "plain": (convolution, f64(4, 4, 4, 4), f64(3, 3, 4, 4)),
    "plain, gradients": (both_gradients(), f64(4, 4, 4, 4), f64(3, 3, 4, 4)),
    "strided, gradients": (both_gradients(**STRIDE), f64(4, 4, 4, 4), f64(3, 3, 4, 4)),
    "transposed": (transposed, f64(4, 2, 2, 4), f64(3, 3, 4, 4)),
    "transposed, gradients": (gradients(transposed), f64(4, 2, 2, 4), f64(3, 3, 4, 4)),
    "two groups": (with_options(feature_group_count=2), f64(4, 4, 4, 8), f64(3, 3, 4, 8)),
    "four groups, gradients": (
        both_gradients(feature_group_count=4), f64(4, 4, 4, 8), f64(3, 3, 2, 8),
    ),
    "depthwise, gradients": (
        both_gradients(feature_group_count=4), f64(4, 4, 4, 4), f64(3, 3, 1, 8),
    ),
    "groups of the batch": (with_options(batch_group_count=4), f64(8, 4, 4, 4), f64(3, 3, 4, 8)),
    "pointwise": (with_options(padding="VALID"), f64(4, 4, 8, 4), f64(1, 1, 4, 4)),
    "pointwise, gradients": (both_gradients(padding="VALID"), f64(4, 4, 8, 4), f64(1, 1, 4, 4)),
    "pointwise, strided": (
        with_options(padding="VALID", **STRIDE), f64(4, 4, 8, 4), f64(1, 1, 4, 4),
    ),
    "one window": (with_options(padding="VALID"), f64(4, 4, 8, 4), f64(4, 3, 4, 4)),
    "dilated": (with_options(rhs_dilation=(2, 2)), f64(4, 4, 4, 4), f64(3, 3, 4, 4)),
    "channels first": (one_dim, f64(4, 4, 8), f64(4, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, check):
    function, *arguments = CONVOLUTIONS[name]
    check(function, *arguments)


@pytest.mark.parametrize(
    "name", ["strided, gradients", "transposed, gradients", "plain, gradients"]
)
def test_on_cpus_convolutions_have_channels_last(name):
    """The one order that XLA's CPU backend has fast code for, wherever the convolution stands."""
    function, *arguments = CONVOLUTIONS[name]
    mesh = LogicalMesh(shape=(1,), alpha=(0.0,), beta=(0.0,))
    graph = from_jaxpr(jax.make_jaxpr(function)(*arguments), inline=CALLS)
    convolutions = [op for op in graph.ops if op.primitive is prim.conv_general_dilated_p]
    assert len(convolutions) >= 2
    for op in convolutions:
        strategy = strategies(op, shapes_of(op), mesh.shape, [axis_choices(op)[:1]])[0]
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in op.eqn.invars]
        run = jax.jit(lambda *held, op=op, strategy=strategy: run_local(op, strategy, mesh, held))
        text = run.trace(*avals).lower(lowering_platforms=("cpu",)).as_text()
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in text
        elsewhere = run.trace(*avals).lower(lowering_platforms=("cuda",)).as_text()
        assert "transpose" not in elsewhere  # cuDNN finds gradients by how they were written


def conv_choices(choices, last_op, options, *arguments):
    pairs = choices(last_op(with_options(**options), *arguments, name="conv_general_dilated"))
    return pairs - {((P, R), (P,)), ((R, P), (P,))}


def test_a_window_keeps_its_dim_whole(choices, last_op):
    found = conv_choices(choices, last_op, {}, f64(4, 4, 4, 4), f64(3, 3, 4, 4))
    assert found == {((0, R), (0,)), ((R, 3), (3,)), ((3, 2), (P,))}


def test_a_dim_without_a_window_is_split(choices, last_op):
    shapes = f64(4, 4, 8, 4), f64(1, 3, 4, 4)
    found = conv_choices(choices, last_op, {"padding": "VALID"}, *shapes)
    assert ((1, R), (1,)) in found
    assert ((2, R), (2,)) not in found
    strided = conv_choices(choices, last_op, {"padding": "VALID", **STRIDE}, *shapes)
    assert ((1, R), (1,)) in strided


def test_a_stride_that_ends_within_a_shard_keeps_the_dim_whole(choices, last_op):
    shapes = f64(4, 6, 8, 4), f64(1, 3, 4, 4)
    options = {"padding": "VALID", "window_strides": (4, 1)}
    assert ((1, R), (1,)) not in conv_choices(choices, last_op, options, *shapes)


@pytest.mark.parametrize(("groups", "mesh_shape", "offered"), [
    (4, (2, 2), {(R, R), (3, R), (R, 3), (3, 3)}),
    (2, (2, 2), {(R, R), (3, R), (R, 3)}),  # not four shards of two groups
    (2, (4, 1), {(R, R), (R, 3)}),
    (3, (2, 2), {(R, R)}),
])  # fmt: skip
def test_a_shard_holds_whole_groups(groups, mesh_shape, offered, last_op):
    shapes = f64(3, 5, 5, 12), f64(3, 3, 12 // groups, 12)
    op = last_op(with_options(feature_group_count=groups), *shapes)
    by_group = [c for c in axis_choices(op) if c.pieces or c.results == (R,)]
    found = strategies(op, shapes_of(op), mesh_shape, [by_group] * 2)
    assert {strategy.result_spec(0) for strategy in found} == offered
