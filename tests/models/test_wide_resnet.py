"""Wide-ResNet blocks and BatchNorm's statistics against a reference in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launcher import models
from launcher.config import WrnConfig
from launcher.models.layers import PRECISIONS, Weights
from launcher.models.wide_resnet import BatchNorm, Bottleneck

KEY = np.zeros(2, np.uint32)
EPSILON, MOMENTUM = 1e-5, 0.9


def weights() -> Weights:
    return Weights.seeded(nnx.Rngs(0), PRECISIONS["fp32"])


def reference_convolution(x, kernel, stride):
    side = kernel.shape[0]
    margin = side // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    rows = range(0, padded.shape[1] - side + 1, stride)
    columns = range(0, padded.shape[2] - side + 1, stride)
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[3]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, row : row + side, column : column + side, :]
            y[:, i, j] = np.tensordot(window, kernel, axes=3)
    return y


def reference_norm(norm, x, *, training):
    """Return what BatchNorm makes of x, and the statistics it should hold afterwards."""
    mean, variance = np.asarray(norm.mean[...]), np.asarray(norm.variance[...])
    if training:
        kept = MOMENTUM * mean, MOMENTUM * variance
        flat = x.reshape(-1, x.shape[-1])
        mean = flat.sum(axis=0) / len(flat)
        variance = ((flat - mean) ** 2).sum(axis=0) / len(flat)
        running = kept[0] + (1 - MOMENTUM) * mean, kept[1] + (1 - MOMENTUM) * variance
    else:
        running = mean, variance
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    return (x - mean) / np.sqrt(variance + EPSILON) * scale + bias, running


def reference_block(block, x, *, training):
    statistics = {}

    def convolve(name, x):
        layer = getattr(block, name)
        y = reference_convolution(x, np.asarray(layer.kernel[...]), layer.stride)
        y, statistics[name] = reference_norm(layer.norm, y, training=training)
        return y

    y = np.maximum(convolve("reduce", x), 0)
    y = np.maximum(convolve("widen", y), 0)
    y = convolve("expand", y)
    residual = x if block.shortcut is None else convolve("shortcut", x)
    return np.maximum(residual + y, 0), statistics


def make_block(channels_in, channels, width_factor, stride) -> Bottleneck:
    block = Bottleneck(channels_in, channels, width_factor, stride, weights=weights())
    draw = np.random.default_rng(0)
    for _, node in nnx.iter_graph(block):
        if isinstance(node, BatchNorm):  # nothing left at 0 or 1
            for variable in (node.scale, node.bias, node.mean):
                variable[...] = jnp.asarray(draw.normal(size=variable.shape), jnp.float32)
            node.variance[...] = jnp.asarray(draw.uniform(0.5, 2, node.variance.shape), jnp.float32)
    return block


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels_in", "channels", "stride"), [(12, 3, 1), (8, 3, 1), (8, 4, 2)])
def test_block_equals_the_reference(channels_in, channels, stride, training):
    block = make_block(channels_in, channels, width_factor=2, stride=stride)
    assert (block.shortcut is None) == (channels_in == 12)
    x = np.random.default_rng(1).normal(size=(3, 6, 6, channels_in)).astype(np.float32)
    expected, statistics = reference_block(block, x, training=training)
    if training:
        block.train()
    else:
        block.eval()
    y = nnx.jit(lambda module, images: module(images))(block, jnp.asarray(x))
    assert y.shape == (3, 6 // stride, 6 // stride, 4 * channels)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for name, (mean, variance) in statistics.items():
        norm = getattr(block, name).norm
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.variance[...], variance, rtol=1e-4, atol=1e-5)


def draw_images(model, batch_size=8, seed=0):
    draw = np.random.default_rng(seed)
    shape = model.example_batch(batch_size)["images"].shape
    return {
        "images": draw.normal(size=shape).astype(np.float32),
        "labels": draw.integers(10, size=batch_size),
    }


@pytest.fixture(scope="module")
def tiny():
    model = models.build(WrnConfig(size="tiny", dtype="fp32", depth=11))
    return model, *model.init(0)


def test_statistics_are_state_that_training_changes_and_evaluation_uses(tiny):
    model, params, state = tiny
    batch = draw_images(model)
    assert set(state) == set(model.abstract_state)
    assert all(name.endswith(("norm/mean", "norm/variance")) for name in state)
    train, evaluate = jax.jit(model.loss), jax.jit(model.eval_loss)

    loss, (new_state, metrics) = train(params, state, batch, KEY)
    assert set(metrics) == {"accuracy"}
    assert all(np.any(np.asarray(new_state[name] != state[name])) for name in state)
    # Training normalises with the batch, whatever is remembered; evaluation with what is
    # remembered.
    assert train(params, new_state, batch, KEY)[0] == loss
    assert evaluate(params, new_state, batch)[0] != evaluate(params, state, batch)[0]

    for _ in range(120):
        _, (state, _) = train(params, state, batch, KEY)
    # Once the running statistics have become those of this batch, both normalise alike.
    np.testing.assert_allclose(evaluate(params, state, batch)[0], loss, rtol=1e-3)


def test_evaluation_does_not_mix_samples(tiny):
    model, params, state = tiny
    evaluate = jax.jit(model.eval_loss)
    batch = draw_images(model)
    halves = [{name: array[i : i + 4] for name, array in batch.items()} for i in (0, 4)]
    apart = np.mean([evaluate(params, state, half)[0] for half in halves])
    np.testing.assert_allclose(evaluate(params, state, batch)[0], apart, rtol=1e-5)


def test_accuracy_counts_images_that_score_highest(tiny):
    model, params, state = tiny
    module = model.skeleton.assemble(params, state, KEY)
    module.eval()
    batch = draw_images(model)
    best = np.argmax(jax.jit(lambda images: module.logits(images))(batch["images"]), axis=-1)
    batch["labels"] = np.where(np.arange(8) < 2, (best + 1) % 10, best)
    _, metrics = jax.jit(lambda batch: module.loss(batch))(batch)
    assert float(metrics["accuracy"]) == 6 / 8


def test_large_images_go_through_the_large_stem():
    model = models.build(WrnConfig(size="250m", dtype="fp32", depth=14, base_channels=8))
    assert model.abstract_params["stem/kernel"].shape == (7, 7, 3, 8)
    module = model.skeleton.hollow()
    shapes = []

    def classify(images):
        assembled = model.skeleton.assemble(*model.init(0), KEY)
        logits = assembled.logits(images)
        shapes.append(logits.shape)
        return logits

    jax.eval_shape(classify, module.example_batch(2)["images"])
    assert shapes == [(2, 1024)]
    assert models.build(WrnConfig(size="tiny", dtype="fp32")).abstract_params[
        "stem/kernel"
    ].shape == (3, 3, 3, 16)


def test_kernels_start_at_hes_scale(tiny):
    _, params, _ = tiny
    kernel = np.asarray(params["blocks/2/widen/kernel"])
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * kernel.shape[2])), rel=0.05)


def test_it_learns(tiny):
    model, params, state = tiny
    batch = draw_images(model)
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    losses = []
    for _ in range(8):
        (loss, (state, _)), gradients = step(params, state, batch, KEY)
        params = {name: array - 0.05 * gradients[name] for name, array in params.items()}
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
