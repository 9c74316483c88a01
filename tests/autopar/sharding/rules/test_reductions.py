"""Reductions, scans, sorting, pooling, linear algebra, random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

P, R = -2, -1


def f64(*shape):
    return jax.ShapeDtypeStruct(shape, np.float64)


def i64(*shape):
    return jax.ShapeDtypeStruct(shape, np.int64)


TRUTH = jax.ShapeDtypeStruct((4, 8), bool)


def gradient(function):
    """The gradient of a function of one array, for one arbitrary gradient of its result."""

    def run(x):
        result, pull = jax.vjp(function, x)
        return pull(np.cos(np.arange(result.size)).reshape(result.shape))

    return run


def routed(logits):
    values, indices = lax.top_k(logits, 2)
    return values * indices + jnp.cumsum(values, axis=0)


def two_at_once(x, y):
    return lax.reduce((x, y), (0.0, 1.0), lambda a, b: (a[0] + b[0], a[1] * b[1]), (1,))


REDUCTIONS = {
    "sum": (lambda x: x.sum(axis=(0, 2)), f64(4, 6, 8)),
    "extrema": (lambda x: x.max(axis=1) - x.min(axis=(0, 1)), f64(4, 8)),
    "of integers": (lambda x: x.max(axis=1) + x.sum(axis=1), i64(4, 8)),
    "product": (lambda x: x.prod(axis=1), f64(4, 8)),
    "truth values": (lambda x: [x.any(axis=1), x.all(axis=1), x.any(), x.all()], TRUTH),
    "bits": (
        lambda x: [reduce(x, axes=(1,)) for reduce in (lax.reduce_and, lax.reduce_or, lax.reduce_xor)],
        i64(4, 8),
    ),
    "places": (lambda x: [jnp.argmax(x, axis=1), jnp.argmin(x, axis=0)], f64(4, 8)),
    "generic": (two_at_once, f64(4, 8), f64(4, 8)),
    "log-softmax": (jax.nn.log_softmax, f64(4, 8)),
    "scans": (
        lambda x: [
            scan(x, axis=1)
            for scan in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp)
        ],
        f64(4, 8),
    ),
    "scan from the end": (lambda x: lax.cumsum(x, axis=0, reverse=True), f64(4, 8)),
    "sort": (lambda x: jnp.sort(x, axis=1), f64(4, 8)),
    "sort along": (lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), f64(4, 8), f64(4, 8)),
    "routing": (routed, f64(4, 8)),
    "approximate": (lambda x: lax.approx_max_k(x, 2, reduction_dimension=0), f64(8, 4)),
}  # fmt: skip


def pool(window, stride, padding, kind=lax.add, start=0.0):
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lambda x: lax.reduce_window(x, start, kind, sizes, strides, padding)


def max_pool(window, stride, padding):
    return pool(window, stride, padding, lax.max, -jnp.inf)


def products(x):
    return lax.reduce_window(x, 1.0, lambda a, b: a * b * 1.0, (1, 2), (1, 2), "VALID")


def scatter_largest(x, y):
    """The generic form of the gradient of a maximum."""
    return lax.select_and_scatter_p.bind(
        x, y, np.float64(0),
        select_jaxpr=jax.make_jaxpr(lax.ge)(0.0, 0.0).jaxpr, select_consts=(),
        scatter_jaxpr=jax.make_jaxpr(lax.add)(0.0, 0.0).jaxpr, scatter_consts=(),
        window_dimensions=(1, 2), window_strides=(1, 2), padding=((0, 0), (0, 0)),
    )  # fmt: skip


def tangent(function):
    return lambda x, t: jax.jvp(function, (x,), (t,))[1]


POOLING = {
    "mean": (pool(2, 2, "VALID"), f64(4, 8, 4, 2)),
    "mean's gradient": (gradient(pool(2, 2, "VALID")), f64(2, 4, 2, 2)),
    "overlapping": (max_pool(3, 2, "SAME"), f64(4, 4, 4, 4)),
    "overlapping, gradient": (gradient(max_pool(3, 2, "SAME")), f64(2, 4, 4, 2)),
    "side by side": (max_pool(2, 2, "VALID"), f64(4, 8, 4, 2)),
    "side by side, gradient": (gradient(max_pool(2, 2, "VALID")), f64(2, 8, 4, 2)),
    "smallest": (pool(2, 2, "VALID", lax.min, jnp.inf), f64(4, 4, 4, 4)),
    "tangent of the largest": (tangent(max_pool(2, 2, "VALID")), f64(2, 4, 4, 2), f64(2, 4, 4, 2)),
    "generic pooling": (products, f64(4, 8)),
}


def definite(x):
    """A symmetric positive definite matrix for every matrix."""
    return x @ jnp.swapaxes(x, -1, -2) + 4.0 * np.eye(x.shape[-1])[None]


def solved(x, b):
    return lax.linalg.triangular_solve(definite(x), b, left_side=True, lower=True)


def solved_from_the_right(x, b):
    return lax.linalg.triangular_solve(definite(x), b, left_side=False, lower=True)


def tridiagonal(d, b):
    return lax.linalg.tridiagonal_solve(d, d + 4.0, d, b)


BATCH = f64(4, 2, 2)
LINEAR_ALGEBRA = {
    "cholesky": (lambda x: jnp.linalg.cholesky(definite(x)), BATCH),
    "triangular": (solved, BATCH, f64(4, 2, 4)),
    "triangular, from the right": (solved_from_the_right, BATCH, f64(4, 4, 2)),
    "tridiagonal": (tridiagonal, f64(4, 3), f64(4, 3, 4)),
    "qr": (jnp.linalg.qr, BATCH),
    "eigenvalues": (lambda x: jnp.linalg.eigh(definite(x)), BATCH),
    "singular values": (lambda x: jnp.linalg.svd(x), BATCH),
    "lu": (lambda x: lax.linalg.lu(definite(x)), BATCH),
    "householder": (lambda x, t: lax.linalg.householder_product(x, t), BATCH, f64(4, 2)),
    "solve": (lambda x, b: jnp.linalg.solve(definite(x), b), BATCH, f64(4, 2, 4)),
    "fourier": (jnp.fft.fft, jax.ShapeDtypeStruct((4, 8), np.complex128)),
    "fourier, real, and back": (lambda x: jnp.fft.irfft2(jnp.fft.rfft2(x)), f64(4, 4, 4)),
}


def randomness(x):
    key = jax.random.key(0)
    keys = jax.random.split(key, 4)
    noise = jax.random.uniform(jax.random.fold_in(keys[0], 3), x.shape)
    kept = jax.random.bernoulli(keys[1], 0.5, x.shape)
    return jnp.where(kept, x * noise, x)


OTHERS = {
    "random": (randomness, f64(4, 8)),
    "loop": (lambda x: lax.scan(lambda c, r: (c + r, c * r), jnp.zeros(8), x)[1], f64(4, 8)),
    "branch": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), f64(4, 8)),
}
CASES = REDUCTIONS | POOLING | LINEAR_ALGEBRA | OTHERS


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_computes_what_the_op_computes(name, check):
    function, *arguments = CASES[name]
    check(function, *arguments)


CHOICES = {
    "sum": (lambda x: x.sum(axis=1), (f64(4, 8),), {((0,), (0,)), ((1,), (P,)), ((P,), (P,))}),
    "largest": (lambda x: x.max(axis=1), (f64(4, 8),), {((0,), (0,)), ((1,), (R,))}),
    "any": (lambda x: x.any(axis=1), (TRUTH,), {((0,), (0,)), ((1,), (R,))}),
    "bits": (lambda x: lax.reduce_or(x, axes=(1,)), (i64(4, 8),), {((0,), (0,))}),
    "product": (lambda x: x.prod(axis=1), (f64(4, 8),), {((0,), (0,))}),
    "scan": (lambda x: lax.cumsum(x, axis=1), (f64(4, 8),), {((0,), (0,)), ((P,), (P,))}),
    "scanned product": (lambda x: lax.cumprod(x, axis=1), (f64(4, 8),), {((0,), (0,))}),
    "top": (lambda x: lax.top_k(x, 2), (f64(4, 8),), {((0,), (0, 0))}),
    "overlapping windows": (max_pool(3, 2, "SAME"), (f64(4, 4, 4, 4),), {((0,), (0,)), ((3,), (3,))}),
    "windows side by side": (
        max_pool(2, 2, "VALID"), (f64(4, 4, 4, 4),), {((d,), (d,)) for d in range(4)},
    ),
    "windows that leave a rest": (
        max_pool(2, 2, "VALID"), (f64(4, 5, 4, 4),), {((d,), (d,)) for d in (0, 2, 3)},
    ),
    "one matrix": (jnp.linalg.cholesky, (f64(4, 4),), set()),
    "generic windows": (
        scatter_largest, (f64(4, 8), f64(4, 4)), {((0, 0, R), (0,)), ((1, 1, R), (1,))},
    ),
    "random bits": (lambda k: jax.random.bits(k, (4, 8)), (jax.eval_shape(jax.random.key, 0),), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choices_by_hand(name, last_op, choices):
    function, arguments, expected = CHOICES[name]
    primitive = {"any": "reduce_or", "one matrix": "cholesky"}.get(name)
    assert choices(last_op(function, *arguments, name=primitive)) == expected
