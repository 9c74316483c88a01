"""Which kernels a decoder computes by: who decides, what cannot be, and that the loss is the same."""

import jax
import numpy as np
import pytest
from batches import draw_batch

from launcher import models
from launcher.config import GptConfig, MoeConfig
from launcher.errors import ConfigError
from launcher.models.kernels import Kernels

KEY = np.array([0, 1], np.uint32)


def attention_of(config, *, dtype="bf16", without_cudnn=None, prefer_plain=False):
    return models.resolve(
        config, memory_bytes=1e12, has_accelerator=True, dtype=dtype, without_cudnn=without_cudnn,
        prefer_plain=prefer_plain,
    ).attention  # fmt: skip


@pytest.mark.parametrize("config", [GptConfig, MoeConfig])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_auto_is_cudnn_wherever_it_can_be(config, dtype):
    assert attention_of(config(size="1.3b"), dtype=dtype) == "cudnn"
    assert attention_of(config(size="1.3b", attention="plain"), dtype=dtype) == "plain"
    assert attention_of(config(size="1.3b"), dtype=dtype, prefer_plain=True) == "plain"
    chosen = config(size="1.3b", attention="cudnn")
    assert attention_of(chosen, dtype=dtype, prefer_plain=True) == "cudnn"


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        (
            {}, {"without_cudnn": "V100-SXM2-16GB"},
            r"needs NVIDIA GPUs of compute capability 8.0 or later, and the cluster has V100-SXM2-16GB "
            r"\(cluster.device.kind\): take another cluster, or model.attention=plain",
        ),
        (
            {}, {"dtype": "fp32"},
            r"computes in bf16 or fp16, and the model in fp32 \(model.dtype=fp32\): set "
            r"model.dtype=bf16, or model.attention=plain",
        ),
        (
            {"dropout": 0.1}, {},
            r"drops no probabilities, and the model drops 0.1 of them \(model.dropout=0.1\): set "
            r"model.dropout=0, or",
        ),
        (
            {"heads": 8}, {},
            r"takes heads of up to 128 features in multiples of 8, and the model's have 256 "
            r"\(model.hidden=2048 / model.heads=8\): set other model.heads, or",
        ),
        ({"hidden": 384}, {}, r".* the model's have 12 \(model.hidden=384 / model.heads=32\)"),
    ],
)  # fmt: skip
def test_what_cudnn_cannot(fields, given, message):
    with pytest.raises(ConfigError, match=f"model.attention=cudnn {message}"):
        attention_of(GptConfig(size="1.3b", attention="cudnn", **fields), **given)
    assert attention_of(GptConfig(size="1.3b", **fields), **given) == "plain"


def test_chunks_are_equal():
    with pytest.raises(ConfigError, match=r"of 64 tokens .* \(model.loss_chunks=3\): choose a div"):
        models.build(GptConfig(size="tiny", dtype="fp32", loss_chunks=3))


def test_kernels_are_no_part_of_what_a_model_is():
    plain = models.build(GptConfig(size="tiny", dtype="bf16"))
    other = models.build(GptConfig(size="tiny", dtype="bf16", attention="cudnn", loss_chunks=4))
    assert (plain.kernels, plain.fingerprint, plain.overrides) == (
        Kernels(attention="plain", loss_chunks=1), other.fingerprint, {},
    )  # fmt: skip
    assert other.kernels == Kernels(attention="cudnn", loss_chunks=4)
    assert other.overrides == {}
    assert plain.abstract_params == other.abstract_params


@pytest.mark.parametrize(
    ("config", "tied"), [(GptConfig, True), (GptConfig, False), (MoeConfig, True)]
)
def test_in_chunks_loss_and_gradients_are_the_same(config, tied):
    def evaluated(chunks):
        model = models.build(
            config(
                size="tiny", dtype="fp64", layers=2, seq_len=16, loss_chunks=chunks, dropout=0.1,
                tied_embeddings=tied,
            )
        )  # fmt: skip
        params, state = model.init(0)
        batch = draw_batch(model, 2)
        run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
        (loss, _), gradients = run(params, state, batch, KEY)
        return float(loss), gradients, float(jax.jit(model.eval_loss)(params, state, batch)[0])

    with jax.enable_x64(True):
        loss, gradients, eval_loss = evaluated(1)
        for chunks in (2, 8):
            chunk_loss, chunk_gradients, chunk_eval_loss = evaluated(chunks)
            assert chunk_loss == pytest.approx(loss, rel=1e-14)
            assert chunk_eval_loss == pytest.approx(eval_loss, rel=1e-14)
            for path, array in gradients.items():
                largest = np.abs(array).max()
                np.testing.assert_allclose(
                    chunk_gradients[path], array, rtol=0, atol=1e-12 * largest
                )
