"""GPT against Hugging Face's GPT-2, and what its options change."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import models
from launcher.config import GptConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gpt2.npz"
KEY = np.array([0, 1], np.uint32)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def heads_first(fused: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the features of a fused projection from [3, heads, D], GPT-2's, to [heads, 3, D]."""
    head_dim = fused.shape[-1] // 3 // num_heads
    parts = fused.reshape(*fused.shape[:-1], 3, num_heads, head_dim)
    return np.swapaxes(parts, -3, -2).reshape(fused.shape)


def from_hugging_face(golden, num_layers: int, num_heads: int) -> dict[str, np.ndarray]:
    def weight(name):
        return golden[f"weights/transformer.{name}"]

    params = {"embedding/token": weight("wte.weight"), "embedding/position": weight("wpe.weight")}
    names = {
        "attention_norm": "ln_1",
        "attention/out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }
    for layer in range(num_layers):
        for ours, theirs in names.items():
            kernel = "scale" if ours.endswith("norm") else "kernel"
            params[f"blocks/{layer}/{ours}/{kernel}"] = weight(f"h.{layer}.{theirs}.weight")
            params[f"blocks/{layer}/{ours}/bias"] = weight(f"h.{layer}.{theirs}.bias")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
            fused = weight(f"h.{layer}.attn.c_attn.{theirs}")
            params[f"blocks/{layer}/attention/qkv/{ours}"] = heads_first(fused, num_heads)
    params["final_norm/scale"] = weight("ln_f.weight")
    params["final_norm/bias"] = weight("ln_f.bias")
    return params


@pytest.fixture(scope="module")
def pair(golden):
    """Our model of the golden file's sizes, and the golden weights under our names."""
    config = GptConfig(
        size="tiny", dtype="fp32", hidden=32, layers=2, heads=4, seq_len=24, vocab_size=61
    )
    model = models.build(config)
    params = from_hugging_face(golden, num_layers=2, num_heads=4)
    shapes = {name: array.shape for name, array in params.items()}
    assert shapes == {name: spec.shape for name, spec in model.abstract_params.items()}
    return model, params


def batch_of(golden):
    return {"tokens": golden["tokens"], "targets": golden["targets"]}


def test_logits_equal_hugging_faces(golden, pair):
    model, params = pair
    module = model.skeleton.assemble(params, {}, KEY)
    logits = jax.jit(lambda tokens: module.logits(tokens))(golden["tokens"])
    assert np.std(golden["logits"]) > 0.5  # not a comparison of zeros
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_loss_and_gradients_equal_hugging_faces(golden, pair):
    model, params = pair
    (loss, _), gradients = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(
        params, {}, batch_of(golden), KEY
    )
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)

    def check(name, gradient):
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-5)

    check("embedding/token", golden["gradients/transformer.wte.weight"])
    check("embedding/position", golden["gradients/transformer.wpe.weight"])
    fused = golden["gradients/transformer.h.0.attn.c_attn.weight"]
    check("blocks/0/attention/qkv/kernel", heads_first(fused, 4))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp16", 0.005)])
def test_loss_in_half_precision_is_near_and_summed_in_fp32(golden, pair, dtype, tolerance):
    _, params = pair
    config = GptConfig(
        size="tiny", dtype=dtype, hidden=32, layers=2, heads=4, seq_len=24, vocab_size=61
    )
    model = models.build(config)
    assert {spec.dtype for spec in model.abstract_params.values()} == {jnp.dtype(jnp.float32)}
    loss, _ = jax.jit(model.eval_loss)(params, {}, batch_of(golden))
    assert loss.dtype == jnp.float32
    assert loss != golden["loss"]
    np.testing.assert_allclose(loss, golden["loss"], rtol=tolerance)


def test_no_position_sees_a_later_token(golden, pair):
    model, params = pair
    module = model.skeleton.assemble(params, {}, KEY)
    tokens = golden["tokens"]
    changed = tokens.copy()
    changed[:, 12] = (changed[:, 12] + 1) % 61
    before, after = module.logits(tokens), module.logits(changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.all(np.any(np.asarray(before[:, 12:] != after[:, 12:]), axis=(0, 2)))


def test_untied_embeddings_add_a_head():
    tied = models.build(GptConfig(size="tiny", dtype="fp32", layers=1))
    untied = models.build(GptConfig(size="tiny", dtype="fp32", layers=1, tied_embeddings=False))
    added = set(untied.abstract_params) - set(tied.abstract_params)
    assert added == {"embedding/head"}
    assert untied.num_parameters - tied.num_parameters == 256 * 64

    params, _ = untied.init(0)
    batch = {"tokens": jnp.zeros((1, 64), jnp.int32), "targets": jnp.ones((1, 64), jnp.int32)}
    gradients, _ = jax.jit(jax.grad(untied.loss, has_aux=True))(params, {}, batch, KEY)
    # Only token 0 was read; the head scores every token.
    rows = np.flatnonzero(np.any(np.asarray(gradients["embedding/token"]) != 0, axis=1))
    assert rows.tolist() == [0]
    assert np.all(np.any(np.asarray(gradients["embedding/head"]) != 0, axis=1))


def test_initial_weights_are_gpt2s():
    model = models.build(GptConfig(size="tiny", dtype="fp32", hidden=128, layers=8))
    params, state = model.init(3)
    assert state == {}
    assert np.std(params["embedding/token"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["blocks/7/attention/qkv/kernel"]) == pytest.approx(0.02, rel=0.05)
    # What is added to the residual stream is scaled by 1 / sqrt(2 layers).
    for name in ("attention/out", "mlp/down"):
        assert np.std(params[f"blocks/7/{name}/kernel"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert np.all(params["blocks/0/mlp/up/bias"] == 0)
    assert np.all(params["final_norm/scale"] == 1)
    # An untrained model knows nothing: the loss is that of a uniform guess.
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(256, size=(4, 64)) for name in ("tokens", "targets")}
    loss, _ = jax.jit(model.eval_loss)(params, {}, batch)
    assert float(loss) == pytest.approx(np.log(256), rel=0.02)
