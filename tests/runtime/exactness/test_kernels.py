"""Under other kernels, too, a plan trains as one device does: cuDNN's attention, and the loss in chunks.

A CPU computes the formulas of cuDNN's calls, on the shards that a plan gives them; cuDNN itself is not run.
"""

import jax
import pytest
from jax.extend.core.primitives import dot_general_p

from launcher.autopar.sharding.spec import REPLICATED

STEPS = 5
PLANS = {
    "tensor, layer": {
        "microbatches": 2,
        "stages": [
            {"layers": 4, "hosts": [0], "devices": [0, 1, 2, 3], "data": 2, "recompute": "layer"},
        ],
    },
    "zb_h1": {
        "microbatches": 4,
        "schedule": "zb_h1",
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1]},
            {"layers": 2, "hosts": [1], "devices": [0, 1], "recompute": "full"},
        ],
    },
    "all three": {"microbatches": 2, "mode": "manual", "dp": 2, "tp": 2, "pp": 2},
}  # fmt: skip
KERNELS = {
    "attention": {"attention": "cudnn", "dropout": 0.0},
    "chunks": {"loss_chunks": 4},
    "both": {"attention": "cudnn", "dropout": 0.0, "loss_chunks": 2},
}

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize(
    ("family", "plan", "kernels"),
    [
        ("gpt", "tensor, layer", "both"),
        ("gpt", "zb_h1", "both"),
        ("gpt", "all three", "chunks"),
        *(
            pytest.param("moe", plan, kernels, marks=pytest.mark.slow)
            for plan in PLANS
            for kernels in KERNELS
        ),
    ],
)
def test_steps_in_double_precision(exact, family, plan, kernels):
    executor = exact.executor_for(exact.model_of(family, **KERNELS[kernels]), PLANS[plan])
    exact.first_gradients(executor, 1e-9)
    exact.train(executor, STEPS, 1e-9)


def test_chunks_are_layers(exact):
    """The embedding, three blocks, and a layer for each chunk; those between the ends are alike."""
    realized = exact.realized_for(exact.model_of("gpt", loss_chunks=4), PLANS["all three"])
    layers = realized.planner.model.layers
    assert [layer.cls.recomputes for layer in layers] == [False] * 4 + [True] * 4
    assert layers[-3].cls is layers[-2].cls


def test_the_vocabulary_of_a_chunk_may_be_split(exact):
    """With the rows of the table on different devices, each makes its columns of every chunk's logits."""
    model = exact.model_of("gpt", "fp32", loss_chunks=4, vocab_size=16384, dropout=0.0)
    stage = {"layers": 4, "hosts": [0], "devices": [0, 1, 2, 3]}
    stage["params"] = {"embedding/token": ["tensor", None]}
    with jax.enable_x64(False):
        realized = exact.realized_for(model, {"microbatches": 2, "stages": [stage]})
        picks = realized.stages[0].sharding.picks
        logits = [
            picks["op", layer.cls.name, index].result_spec(0)
            for layer in realized.planner.model.layers
            for index, op in enumerate(layer.cls.joint.ops)
            if op.primitive is dot_general_p and op.eqn.outvars[0].aval.shape[1:] == (2, 16384)
        ]
    assert len(logits) == 2 * 4  # forward, and again in the backward pass
    assert set(logits) == {(REPLICATED, 2)}
