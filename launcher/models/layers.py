"""What the models are made of: precision, weights, and the layers that several families share.

The layers are written in a few plain operators each, with every broadcast explicit, because the
planner chooses a sharding for each operator it sees: fewer and simpler ones make a smaller problem,
and repeated blocks come out equal. Reductions (softmax, normalisation, loss) run in at least fp32.

Letters of shapes: B batch, S sequence, H hidden, V vocabulary; I and O the features in and out.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike


def at_least_fp32(dtype: DTypeLike) -> jnp.dtype:
    """Return a floating-point type itself, or fp32 where it is narrower."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The floating-point types of a model."""

    compute: jnp.dtype  # of activations, and of weights where they are used
    master: jnp.dtype  # of the weights as they are kept, and of the running statistics

    @property
    def reduce(self) -> jnp.dtype:
        """The type of reductions: fp16 would overflow and bf16 stop counting."""
        return at_least_fp32(self.compute)


PRECISIONS = {
    "fp32": Precision(compute=jnp.dtype(jnp.float32), master=jnp.dtype(jnp.float32)),
    "bf16": Precision(compute=jnp.dtype(jnp.bfloat16), master=jnp.dtype(jnp.float32)),
    "fp16": Precision(compute=jnp.dtype(jnp.float16), master=jnp.dtype(jnp.float32)),
    "fp64": Precision(compute=jnp.dtype(jnp.float64), master=jnp.dtype(jnp.float64)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where the constructors of layers get their weights from."""

    keys: Iterator[Array]
    precision: Precision

    @classmethod
    def seeded(cls, rngs: nnx.Rngs, precision: Precision) -> "Weights":
        """Draw from random streams."""
        # Keys by number, not by calls of `rngs`: counting inside a trace takes Flax ten times as
        # long.
        root = rngs.params()
        keys = (jax.random.fold_in(root, index) for index in itertools.count())
        return cls(keys=keys, precision=precision)

    def normal(self, shape: tuple[int, ...], stddev: float) -> nnx.Param:
        """Make a weight drawn from a normal distribution around 0."""
        return nnx.Param(_normal(next(self.keys), stddev, shape, self.precision.master))

    def stream(self) -> nnx.RngKey:
        """Make the key of one random layer, which draws once in each call of the loss.

        A key and not a stream of Flax's, whose counter would add equations to every draw.
        """
        return nnx.RngKey(next(self.keys), tag="layer")

    def constant(self, shape: tuple[int, ...], value: float) -> nnx.Param:
        """Make a weight that starts with the same value everywhere."""
        return nnx.Param(jnp.full(shape, value, self.precision.master))


# A program that draws takes half a second to compile, whatever it draws: small weights take the
# first part of a draw of one of these sizes, so that a model with 22 shapes of kernels compiles 4
# of them.
_DRAW_SIZES = (2**12, 2**15, 2**18, 2**21)


# Compiled functions, also where a shape is drawn once: an abstract pass over 48 blocks traces each
# once.
@functools.partial(jax.jit, static_argnames="shape")
def _standard_normal(key: Array, shape: tuple[int, ...]) -> Array:
    # In fp32 for every precision, so that a model in fp64 starts from the same weights.
    return jax.random.normal(key, shape, jnp.float32)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _scaled(draw: Array, stddev: float, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    if draw.shape != shape:
        draw = draw[: math.prod(shape)].reshape(shape)
    return (draw * jnp.asarray(stddev, jnp.float32)).astype(dtype)


def _normal(key: Array, stddev: float, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    drawn = next(((size,) for size in _DRAW_SIZES if size >= math.prod(shape)), shape)
    return _scaled(_standard_normal(key, drawn), stddev, shape, dtype)


def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw from 0 to 1, the same in every precision."""
    bits = lax.shift_right_logical(jax.random.bits(key, shape, jnp.uint32), np.uint32(8))
    return bits.astype(dtype) * 2.0**-24


def along_last(vector: Array, shape: tuple[int, ...]) -> Array:
    """Repeat a vector along the last dim of a shape."""
    return lax.broadcast_in_dim(vector, shape, (len(shape) - 1,))


def spread_last(reduced: Array, shape: tuple[int, ...]) -> Array:
    """Repeat the result of a reduction over the last dim along that dim."""
    return lax.broadcast_in_dim(reduced, shape, tuple(range(len(shape) - 1)))


def one_hot(index: Array, size: int, dtype: DTypeLike) -> Array:
    """Turn indices into vectors with a 1 at the index; all 0 where the index is out of range."""
    shape = (*index.shape, size)
    positions = lax.broadcasted_iota(index.dtype, shape, len(shape) - 1)
    return (positions == spread_last(index, shape)).astype(dtype)


def softmax(scores: Array) -> Array:
    """Normalise over the last dim."""
    largest = lax.stop_gradient(jnp.max(scores, axis=-1))
    exponentials = jnp.exp(scores - spread_last(largest, scores.shape))
    total = jnp.sum(exponentials, axis=-1)
    return exponentials / spread_last(total, scores.shape)


def gelu(x: Array) -> Array:
    """Apply the Gaussian error linear unit in the tanh form of GPT-2."""
    # x * x first: x ** 3 leaves the range of fp16 already at 41.
    inner = math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * (x * x))
    return 0.5 * x * (1.0 + jnp.tanh(inner))


def relu(x: Array) -> Array:
    """Set what is negative to 0."""
    zeros = jnp.zeros_like(x)
    return lax.select(x > zeros, x, zeros)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Return the mean negative log-likelihood, in at least fp32.

    The target is picked by a product with its one-hot vector, not by an index, so that the last
    dim, a vocabulary of 51,200, can be split over devices: each of them sums its part.
    """
    scores = logits.astype(at_least_fp32(logits.dtype))
    largest = lax.stop_gradient(jnp.max(scores, axis=-1))
    shifted = scores - spread_last(largest, scores.shape)
    log_total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    picked = jnp.sum(one_hot(targets, scores.shape[-1], scores.dtype) * shifted, axis=-1)
    return jnp.mean(log_total - picked)


class Linear(nnx.Module):
    """An affine map of the last dim."""

    def __init__(self, features_in: int, features_out: int, *, stddev: float, weights: Weights):
        self.kernel = weights.normal((features_in, features_out), stddev)  # [I, O]
        self.bias = weights.constant((features_out,), 0.0)
        self.dtype = weights.precision.compute

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum("...I,IO->...O", x, self.kernel[...].astype(self.dtype))
        return y + along_last(self.bias[...].astype(self.dtype), y.shape)


class LayerNorm(nnx.Module):
    """Normalise the last dim, then scale and shift it."""

    epsilon = 1e-5

    def __init__(self, features: int, *, weights: Weights):
        self.scale = weights.constant((features,), 1.0)
        self.bias = weights.constant((features,), 0.0)
        self.dtype = weights.precision.compute
        self.reduce_dtype = weights.precision.reduce

    def __call__(self, x: Array) -> Array:
        wide = x.astype(self.reduce_dtype)
        centred = wide - spread_last(jnp.mean(wide, axis=-1), x.shape)
        variance = jnp.mean(centred * centred, axis=-1)
        unit = centred * spread_last(lax.rsqrt(variance + self.epsilon), x.shape)
        scale = along_last(self.scale[...].astype(self.reduce_dtype), x.shape)
        bias = along_last(self.bias[...].astype(self.reduce_dtype), x.shape)
        return (unit * scale + bias).astype(self.dtype)


class Dropout(nnx.Module):
    """Set entries to 0 at random in training, and scale up the others.

    Compares raw bits, so the same entries go in every precision; without a key where it never
    draws.
    """

    def __init__(self, rate: float, *, weights: Weights):
        self.key = weights.stream() if rate > 0 else None
        self.kept_fraction = 1.0 - rate
        # What nnx's train() and eval() set.
        self.deterministic = False

    def __call__(self, x: Array) -> Array:
        if self.key is None or self.deterministic:
            return x
        bits = jax.random.bits(self.key[...], x.shape, jnp.uint32)
        kept = bits < np.uint32(self.kept_fraction * 2**32)
        return lax.select(kept, x * (1.0 / self.kept_fraction), jnp.zeros_like(x))
