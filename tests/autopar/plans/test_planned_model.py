"""A run's model in words, in its plan, and as a plan that is given has it."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from launcher import models
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.plans.planned_model import as_planned, describe_model, model_ref
from launcher.autopar.predictions.predict import model_flops_per_step
from launcher.autopar.realized.realize import layered_model
from launcher.config import GptConfig, MoeConfig, WrnConfig

TINY = GptConfig(size="tiny", dtype="bf16", seq_len=128)


def by(**kernels):
    return models.build(replace(TINY, **kernels))


def test_a_line_says_what_is_not_plain():
    assert describe_model(by()) == "gpt tiny, 225 thousand parameters, computing in bf16"
    assert describe_model(by(attention="cudnn", loss_chunks=4)).endswith(
        "computing in bf16, attention by cuDNN, the loss in 4 chunks"
    )


@pytest.fixture
def planned(plan):
    return replace(plan, model=model_ref(by(attention="plain", loss_chunks=4)))


def test_what_is_left_open_is_as_planned(planned):
    config = as_planned(GptConfig(), planned)
    assert (config.size, config.attention, config.loss_chunks) == ("tiny", "plain", 4)
    given = GptConfig(size="125m", attention="cudnn", loss_chunks=2)
    assert as_planned(given, planned) == given
    assert as_planned(GptConfig(), None) == GptConfig()
    assert as_planned(MoeConfig(), planned) == MoeConfig()  # it will be refused


def test_cudnn_is_left_to_those_that_have_it(planned):
    fused = replace(planned, model=replace(planned.model, attention="cudnn"))
    assert as_planned(GptConfig(), fused).attention == "auto"


def test_a_model_without_kernels_gets_its_size(planned):
    wrn = replace(planned, model=replace(planned.model, name="wrn"))
    assert as_planned(WrnConfig(), wrn) == WrnConfig(size="tiny")


def test_fused_attention_keeps_no_scores_and_counts_the_same_operations():
    kept, flops = {}, {}
    for attention in ("plain", "cudnn"):
        layered = layered_model(by(attention=attention), 1, None, key="num_layers")
        block = layered.layers[1].cls
        assert layered.layers[2].cls is block  # blocks are alike
        kept[attention] = [block.joint.avals[value] for value in block.residuals]
        flops[attention] = model_flops_per_step(layered.traced, 3)
    scores = {"plain": 2, "cudnn": 0}  # the exponentials, and the probabilities in bf16
    assert scores == {
        name: sum(aval.shape[-2:] == (128, 128) for aval in avals) for name, avals in kept.items()
    }
    assert any(a.shape == (1, 4, 128) and a.dtype == jnp.float32 for a in kept["cudnn"])
    # Of 4 + 2 bytes for each score less than one for each query's sum of exponentials and its output.
    saved = sum(map(aval_bytes, kept["plain"])) - sum(map(aval_bytes, kept["cudnn"]))
    assert saved > 5 * (4 * 128 * 128)
    assert flops["plain"] == flops["cudnn"] > 0


def test_logits_of_chunks_are_made_again_behind_barriers():
    """Or a program of both passes would keep them."""
    layered = layered_model(by(loss_chunks=4), 2, None, key="num_layers")
    chunk = layered.layers[-2].cls
    names = [str(op.primitive) for op in chunk.backward_ops]
    assert chunk.recomputes
    assert names.count("optimization_barrier") == 4  # activations, targets, the table, a gradient
    assert names.count("dot_general") == 3  # logits again, and the gradients of both operands
    assert not any(chunk.joint.avals[value].shape[-1:] == (256,) for value in chunk.residuals)
