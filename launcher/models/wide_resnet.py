"""Wide-ResNet: bottleneck blocks whose 3 x 3 convolution is W times as wide.

Small images (of CIFAR's size) go through a 3 x 3 stem, others through ImageNet's 7 x 7 with stride
2 and a max pooling. BatchNorm normalises with the statistics of the batch in training, and keeps a
running mean of them, with which it normalises in evaluation.

Letters of shapes: B batch, Y and X the image's sides, C channels.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from launcher.models.layers import (
    Linear,
    Precision,
    Weights,
    along_last,
    at_least_fp32,
    cross_entropy,
    one_hot,
    relu,
)
from launcher.models.sizes import WRN_BLOCKS, WRN_LARGE_IMAGE, WrnSize


class BatchNorm(nnx.Module):
    """Normalise each channel over the batch, then scale and shift it."""

    epsilon = 1e-5
    momentum = 0.9  # what the running statistics keep at each step

    def __init__(self, channels: int, *, weights: Weights):
        self.scale = weights.constant((channels,), 1.0)
        self.bias = weights.constant((channels,), 0.0)
        self.mean = nnx.BatchStat(jnp.zeros((channels,), weights.precision.master))
        self.variance = nnx.BatchStat(jnp.ones((channels,), weights.precision.master))
        self.dtype = weights.precision.compute
        self.reduce_dtype = weights.precision.reduce
        # What nnx's train() and eval() set.
        self.use_running_average = False

    def __call__(self, x_BYXC: Array) -> Array:
        shape = x_BYXC.shape
        wide = x_BYXC.astype(self.reduce_dtype)
        if self.use_running_average:
            mean, variance = self.mean[...], self.variance[...]
            centred = wide - along_last(mean, shape)
        else:
            mean = jnp.mean(wide, axis=(0, 1, 2))
            centred = wide - along_last(mean, shape)
            variance = jnp.mean(centred * centred, axis=(0, 1, 2))
            self._remember(mean, variance)
        # One factor for each channel, before it meets the large tensor.
        factor = lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(self.reduce_dtype)
        bias = self.bias[...].astype(self.reduce_dtype)
        return (centred * along_last(factor, shape) + along_last(bias, shape)).astype(self.dtype)

    def _remember(self, mean: Array, variance: Array) -> None:
        for running, batch in ((self.mean, mean), (self.variance, variance)):
            kept = self.momentum * running[...]
            # Not `running[...] =`, which asks traced values for their sharding, at some cost.
            running.set_value(kept + (1.0 - self.momentum) * lax.stop_gradient(batch))


class Convolution(nnx.Module):
    """A convolution of k x k without a bias, then BatchNorm."""

    def __init__(
        self, channels_in: int, channels_out: int, *, side: int, stride: int = 1, weights: Weights
    ):
        stddev = math.sqrt(2.0 / (side * side * channels_in))  # He's, for the ReLU that follows
        self.kernel = weights.normal((side, side, channels_in, channels_out), stddev)
        self.norm = BatchNorm(channels_out, weights=weights)
        self.stride = stride
        self.dtype = weights.precision.compute

    def __call__(self, x_BYXC: Array) -> Array:
        margin = self.kernel.shape[0] // 2
        y_BYXC = lax.conv_general_dilated(
            x_BYXC,
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((margin, margin), (margin, margin)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return self.norm(y_BYXC)


class Bottleneck(nnx.Module):
    """1 x 1 to p channels, 3 x 3 to p W, 1 x 1 to 4 p, added to what came in."""

    def __init__(
        self, channels_in: int, channels: int, width_factor: int, stride: int, *, weights: Weights
    ):
        wide, out = channels * width_factor, 4 * channels
        self.reduce = Convolution(channels_in, channels, side=1, weights=weights)
        self.widen = Convolution(channels, wide, side=3, stride=stride, weights=weights)
        self.expand = Convolution(wide, out, side=1, weights=weights)
        self.shortcut = (
            None
            if stride == 1 and channels_in == out
            else Convolution(channels_in, out, side=1, stride=stride, weights=weights)
        )

    def __call__(self, x_BYXC: Array) -> Array:
        y_BYXC = relu(self.reduce(x_BYXC))
        y_BYXC = self.expand(relu(self.widen(y_BYXC)))
        residual = x_BYXC if self.shortcut is None else self.shortcut(x_BYXC)
        return relu(residual + y_BYXC)


class WideResNet(nnx.Module):
    """A Wide-ResNet with its classification loss."""

    def __init__(self, size: WrnSize, precision: Precision, rngs: nnx.Rngs):
        weights = Weights.seeded(rngs, precision)
        self.size = size
        self.dtype = precision.compute
        self.large_image = size.image_size >= WRN_LARGE_IMAGE
        side, stride = (7, 2) if self.large_image else (3, 1)
        self.stem = Convolution(3, size.base_channels, side=side, stride=stride, weights=weights)
        self.blocks = nnx.List(_make_blocks(size, weights))
        features = 4 * size.base_channels * 2 ** (len(WRN_BLOCKS[size.depth]) - 1)
        self.classifier = Linear(
            features, size.num_classes, stddev=math.sqrt(1.0 / features), weights=weights
        )

    def logits(self, images_BYXC: Array) -> Array:
        """Score every class."""
        x_BYXC = relu(self.stem(images_BYXC.astype(self.dtype)))
        if self.large_image:
            x_BYXC = nnx.max_pool(x_BYXC, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x_BYXC = block(x_BYXC)
        return self.classifier(jnp.mean(x_BYXC, axis=(1, 2)))

    def loss(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy of the class."""
        logits = self.logits(batch["images"])
        return cross_entropy(logits, batch["labels"]), {
            "accuracy": _accuracy(logits, batch["labels"])
        }

    def example_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe a batch."""
        shape = (batch_size, self.size.image_size, self.size.image_size, 3)
        return {
            "images": jax.ShapeDtypeStruct(shape, jnp.float32),
            "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }


def _make_blocks(size: WrnSize, weights: Weights) -> list[Bottleneck]:
    blocks = []
    channels_in = size.base_channels
    for stage, num_blocks in enumerate(WRN_BLOCKS[size.depth]):
        channels = size.base_channels * 2**stage
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            block = Bottleneck(channels_in, channels, size.width_factor, stride, weights=weights)
            blocks.append(block)
            channels_in = 4 * channels
    return blocks


def _accuracy(logits: Array, labels: Array) -> Array:
    """Return the share of images whose class scores highest; classes may be split over devices."""
    scores = lax.stop_gradient(logits.astype(at_least_fp32(logits.dtype)))
    picked = jnp.sum(one_hot(labels, scores.shape[-1], scores.dtype) * scores, axis=-1)
    return jnp.mean((picked >= jnp.max(scores, axis=-1)).astype(scores.dtype))
