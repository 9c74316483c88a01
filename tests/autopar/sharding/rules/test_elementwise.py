"""Element-wise ops: any dim is split, stretched ones stay whole; only linear ones take partial sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy import special

P, R = -2, -1
TRUTH = jax.ShapeDtypeStruct((4,), bool)


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def i64(*shape):
    return jax.ShapeDtypeStruct(shape, np.int64)


def c128(*shape):
    return jax.ShapeDtypeStruct(shape, np.complex128)


def many(*functions):
    return lambda *arguments: [function(*arguments) for function in functions]


def inside(x):
    """Into the interval from 0 to 1, where everything is defined."""
    return jax.nn.sigmoid(x)


CASES = {
    "two dims": (lambda x, y: jnp.tanh(x) * y + x / (1.0 + y * y) - x, f64(4, 8), f64(4, 8)),
    "unary": (
        many(
            jnp.abs, jnp.arcsinh, jnp.arctan, jnp.cbrt, jnp.ceil, jnp.cos, jnp.cosh, jnp.exp, jnp.exp2,
            jnp.expm1, jnp.floor, jnp.round, jnp.sign, jnp.sin, jnp.sinh, jnp.square, jnp.tan,
            jnp.isfinite, lax.erf, lax.erfc, lax.logistic, lambda x: x**3, lax.stop_gradient,
            lax.bessel_i0e, lax.bessel_i1e, lambda x: -x,
        ),
        f64(8),
    ),
    "unary, of positive numbers": (
        lambda x: many(
            jnp.arccos, jnp.arcsin, jnp.arctanh, jnp.log, jnp.log1p, jnp.sqrt, lax.rsqrt, lax.erf_inv,
            lax.lgamma, lax.digamma, lambda x: jnp.arccosh(1.0 + x), lambda x: lax.pow(x, x),
        )(inside(x)),
        f64(8),
    ),
    "binary": (
        many(jnp.arctan2, jnp.maximum, jnp.minimum, lax.nextafter, lax.rem, jnp.equal, jnp.less,
             jnp.greater_equal, jnp.not_equal, jnp.less_equal, jnp.greater),
        f64(8), f64(8),
    ),
    "integers": (
        many(lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.shift_left, lax.mul, lax.sub,
             lax.shift_right_arithmetic, lax.shift_right_logical, lax.div),
        i64(8), i64(8),
    ),
    "integers, unary": (
        many(lax.bitwise_not, lax.population_count, lax.clz, lambda x: x.astype(np.float64),
             lambda x: lax.bitcast_convert_type(x, np.float64)),
        i64(8),
    ),
    "complex": (
        many(jnp.real, jnp.imag, jnp.conj, jnp.abs, lambda x: x * x, lambda x: x / (2.0 + 1j)), c128(8),
    ),
    "complex of two": (lax.complex, f64(8), f64(8)),
    "linear in both": (many(jnp.add, jnp.subtract, jnp.multiply, jnp.divide), f64(4, 8), f64(4, 8)),
    "select": (lambda x, y: jnp.where(x > y, x, 2.0 * y), f64(4, 8), f64(4, 8)),
    "select by a scalar": (lambda p, x, y: lax.select(p[0] > 0, x, y), f64(1), f64(4, 8), f64(4, 8)),
    "clamp": (lambda x: lax.clamp(-0.5, x, 0.5), f64(4, 8)),
    "clamp between arrays": (lambda a, x, b: lax.clamp(a, x, b), f64(8), f64(8), f64(8)),
    "casts": (lambda x: x.astype(jnp.int32).astype(jnp.float64) + x, f64(4, 8)),
    "casts among floats": (lambda x: x.astype(np.complex128), f64(8)),
    "rounded": (lambda x: lax.reduce_precision(x, 11, 52), f64(4, 8)),
    "bits of another width": (lambda x: lax.bitcast_convert_type(x, np.uint8), f64(8, 4)),
    "bits put together": (
        lambda x: lax.bitcast_convert_type(x, np.int64),
        jax.ShapeDtypeStruct((8, 4, 8), np.uint8),
    ),
    "stretched": (lambda x, y: lax.mul_p.bind(x, y) + lax.add_p.bind(y, x), f64(4, 8), f64(4, 1)),
    "a scalar": (lambda x, s: x * s + (x + s), f64(8), f64()),
    "scalars": (lambda x, y: (x + y) * 2.0 + 1.0, f64(), f64()),
    "barrier": (lax.optimization_barrier, f64(4, 8)),
    "barrier over two": (lambda x, y: lax.optimization_barrier((x, y)), f64(8), f64(4)),
    "barrier over many": (
        lambda x, y, z, w: lax.optimization_barrier((x, y, z, w)), f64(4, 8), f64(8), f64(), f64(4, 4),
    ),
    "put on a device": (lambda x: jax.device_put(x) + x, f64(4, 8)),
}  # fmt: skip


def special_functions(x, y):
    """Their loops take long to compile."""
    return many(
        lax.igamma, lax.igammac, lax.random_gamma_grad, lambda x, y: special.betainc(x, y, x),
        lambda x, y: special.zeta(1.0 + x, y), lambda x, y: special.polygamma(1, x),
    )(inside(x), inside(y))  # fmt: skip


@pytest.mark.slow
def test_special_functions(check):
    check(special_functions, f64(4), f64(4))


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_computes_what_the_op_computes(name, check):
    function, *arguments = CASES[name]
    check(function, *arguments)


def partial_patterns(choices, op):
    return {pair for pair in choices(op) if P in (*pair[0], *pair[1])}


PARTIAL_FLOW = {
    "sum": (jnp.add, (f64(4), f64(4)), {((P, P), (P,))}),
    "sum with a number": (lambda x: x + 1.0, (f64(4),), set()),
    "sum with zero": (lambda x: lax.add_p.bind(x, 0.0), (f64(4),), {((P, P), (P,))}),
    "scalar sum with a number": (lambda x: x + 1.0, (f64(),), set()),
    "times a number": (lambda x: x * 2.0, (f64(4),), {((P, R), (P,))}),
    "by a number": (lambda x: x / 2.0, (f64(4),), {((P, R), (P,))}),
    "integers by a number": (lambda x: lax.div(x, np.int64(2)), (i64(4),), set()),
    "to lower precision": (lambda x: x.astype(jnp.bfloat16), (f64(4),), {((P,), (P,))}),
    "to 8 bits": (lambda x: x.astype(jnp.float8_e5m2), (f64(4),), set()),
    "to integers": (lambda x: x.astype(np.int64), (f64(4),), set()),
    "from integers": (lambda x: x.astype(np.float64), (i64(4),), set()),
    "from truth values": (lambda x: (x > 0).astype(np.float64), (f64(4),), set()),
    "to complex": (lambda x: x.astype(np.complex128), (f64(4),), {((P,), (P,))}),
    "rounded to 3 bits": (lambda x: lax.reduce_precision(x, 5, 3), (f64(4),), set()),
    "magnitude of complex": (jnp.abs, (c128(4),), set()),
    "real part": (jnp.real, (c128(4),), {((P,), (P,))}),
    "chosen by a scalar": (
        lambda p, x, y: lax.select_n(p, x, y),
        (jax.ShapeDtypeStruct((), bool), f64(4), f64(4)),
        {((R, P, P), (P,))},
    ),
    "chosen truth values": (lambda p, q: lax.select_n(p, p, q), (TRUTH, TRUTH), set()),
    "maximum": (jnp.maximum, (f64(4), f64(4)), set()),
    "barrier": (lax.optimization_barrier, (f64(4),), {((P,), (P,))}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL_FLOW)
def test_which_ops_take_partial_sums(name, last_op, choices):
    function, arguments, expected = PARTIAL_FLOW[name]
    assert partial_patterns(choices, last_op(function, *arguments)) == expected


def test_values_beside_one_another_keep_their_own_specs(last_op, choices):
    op = last_op(lambda x, y: lax.optimization_barrier((x, y)), f64(8), f64(4))
    assert choices(op) | {((R, R), (R, R))} == {
        ((a, b), (a, b)) for a in (R, P, 0) for b in (R, P, 0)
    }
    many = last_op(lambda x, y: lax.optimization_barrier((x, y, x, y)), f64(4, 8), f64(4))
    assert choices(many) == {(c, c) for c in [(0, 0, 0, 0), (1, R, 1, R), (P, P, P, P)]}
