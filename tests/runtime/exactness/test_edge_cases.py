"""What models have beside layers, one thing at a time: under any plan it is as on one device.

`Noisy` shows what it draws and what it remembers; the ladder has the rest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from launcher.models.layers import PRECISIONS
from launcher.models.model import make_model
from launcher.models.optimizer import LossScaling

WIDTH, NUM_BLOCKS, COUNT = 8, 5, 4
PLANS = {
    "2x2": {
        "microbatches": COUNT,
        "stages": [
            {
                "layers": 4, "hosts": [0], "devices": [0, 1, 2, 3], "data": 2, "zero": 3,
                "recompute": "full",
            },
        ],
    },
    "gpipe": {
        "microbatches": COUNT,
        "schedule": "gpipe",
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0, 1], "recompute": "layer"},
            {"layers": 3, "hosts": [1], "devices": [0, 1], "data": 2},
        ],
    },
    "interleaved": {
        "microbatches": COUNT,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0]},
            {"layers": 1, "hosts": [0], "devices": [1, 2], "data": 2, "recompute": "full"},
            {"layers": 1, "hosts": [0], "devices": [0]},
            {"layers": 1, "hosts": [0], "devices": [1, 2]},
        ],
    },
    "interleaved on one submesh": {
        "microbatches": COUNT,
        "schedule": "interleaved",
        "virtual_stages": 3,
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0, 1]},
            {"layers": 1, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 2},
            {"layers": 2, "hosts": [0], "devices": [0, 1]},
        ],
    },
    "zb_h1": {
        "microbatches": COUNT,
        "schedule": "zb_h1",
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1], "data": 2, "recompute": "full"},
            {"layers": 2, "hosts": [0], "devices": [2, 3]},
            {"layers": 2, "hosts": [1], "devices": [0]},
        ],
    },
}  # fmt: skip
PLANS |= {
    f"{name}, overlapping": PLANS[name]
    | {"stages": [stage | {"overlap": True} for stage in PLANS[name]["stages"]]}
    for name in ("2x2", "interleaved on one submesh", "zb_h1")
}
SKIPPING = LossScaling(scale=2.0**8, dynamic=True)
LEARNING_RATE = 1.0

pytestmark = pytest.mark.usefixtures("double")


class Noisy(nnx.Module):
    """Layers that each drop inputs, report what was dropped, and remember the mean of their input."""

    def __init__(self, rngs: nnx.Rngs):
        self.weights = nnx.List(
            [nnx.Param(rngs.normal((WIDTH, WIDTH)) / 2) for _ in range(NUM_BLOCKS)]
        )
        self.means = nnx.List([nnx.BatchStat(jnp.zeros(WIDTH)) for _ in range(NUM_BLOCKS)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def loss(self, batch):
        x, drawn = batch["x"], {}
        for index, (weight, mean) in enumerate(zip(self.weights, self.means, strict=True)):
            kept = self.dropout(jnp.ones_like(x))
            # Another number for other bits: each has a weight of its own.
            number = jax.lax.broadcasted_iota(x.dtype, x.shape, 0) * WIDTH
            number += jax.lax.broadcasted_iota(x.dtype, x.shape, 1)
            drawn[f"bits{index}"] = jnp.mean(kept * jnp.sin(number))
            mean[...] = 0.9 * mean[...] + 0.1 * jax.lax.stop_gradient(jnp.mean(x, axis=0))
            x = jnp.tanh((x * kept) @ weight[...])
        return jnp.mean(x**2), drawn

    def example_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)}


@functools.cache
def noisy():
    return make_model(
        Noisy, precision=PRECISIONS["fp64"], casts=True, name="noisy", size="noisy", dtype="fp64",
        sample_unit="samples", units_per_sample=1, vocab_size=None, default_global_batch=16,
        fingerprint="noisy",
    )  # fmt: skip


@pytest.fixture(scope="module")
def executor_of(exact):
    """By plan; tests compare what a step changes, so they may share it."""

    @functools.cache
    def build(plan: str):
        return exact.executor_for(noisy(), PLANS[plan], loss_scaling=SKIPPING)

    return build


def held(executor):
    """All that a step may change, on the host."""
    memories = [stage.optimizer_state for stage in executor.stages]
    return jax.tree.map(np.array, (executor.params(), executor.state(), memories))


@pytest.mark.parametrize("plan", PLANS)
def test_dropout_draws_the_same_bits_under_every_plan(exact, executor_of, plan):
    executor, model = executor_of(plan), noisy()
    batch = exact.draw_batch(model, 0)
    found = executor.step(executor.place(batch, 7)).metrics
    wanted = []
    for k in range(COUNT):
        part = {"x": np.split(batch["x"], COUNT)[k]}
        key = np.array([exact.SEED, 7 * COUNT + k], np.uint32)
        # Any weights will do, what is drawn does not depend on them.
        wanted.append(model.loss(*model.init(0), part, key)[1][1])
    for name in wanted[0]:
        mean = np.mean([float(metrics[name]) for metrics in wanted])
        assert float(found[name]) == pytest.approx(mean, rel=1e-12)
    assert len({float(value) for value in found.values()}) == NUM_BLOCKS  # each draws by itself


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_pass_from_microbatch_to_microbatch(exact, executor_of, plan):
    executor = executor_of(plan)
    before = executor.state()["means/0"]
    batch = exact.draw_batch(executor.model, 1)
    executor.step(executor.place(batch, 1))
    parts = np.split(batch["x"].astype(np.float64), COUNT)
    shares = [0.1 * 0.9 ** (COUNT - 1 - k) * part.mean(axis=0) for k, part in enumerate(parts)]
    wanted = 0.9**COUNT * before + sum(shares)
    np.testing.assert_allclose(executor.state()["means/0"], wanted, rtol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_an_overflow_is_skipped_on_every_stage(exact, executor_of, plan):
    executor = executor_of(plan)
    before = held(executor)
    scale = float(executor.stages[0].loss_scale.scale)
    batch = exact.draw_batch(executor.model, 2)
    batch["x"][3, 5] = np.inf
    result = executor.step(executor.place(batch, 2))
    assert not np.isfinite(float(result.grad_norm))
    assert {float(stage.loss_scale.scale) for stage in executor.stages} == {scale / 2}
    jax.tree.map(np.testing.assert_array_equal, held(executor), before)


@pytest.fixture(scope="module")
def ladder_of(exact):
    @functools.cache
    def build(plan: str):
        transform = optax.sgd(LEARNING_RATE)
        return exact.executor_for(exact.model_of("custom"), PLANS[plan], transform=transform)

    return build


LADDERS = [
    "interleaved on one submesh", "zb_h1", "interleaved on one submesh, overlapping",
    "zb_h1, overlapping",
]  # fmt: skip


def test_the_ladder_crosses_stages_in_every_way(exact):
    realized = exact.realized_for(exact.model_of("custom"), PLANS["zb_h1"])
    avals = realized.planner.model.traced.graph.avals
    over_a_stage = {avals[value].dtype for value in realized.sent[0, 2]}
    assert {np.dtype(bool), np.dtype(np.int64), np.dtype(np.float64)} == over_a_stage
    assert {avals[value].dtype for value in realized.returned[0, 2]} == {np.dtype(np.float64)}
    assert realized.users["words"]
    assert "words" in realized.stages[0].layout.batch  # a leaf of the batch, and a parameter


@pytest.mark.parametrize("plan", LADDERS)
def test_a_tied_parameter_has_one_gradient_and_counts_once_in_the_norm(exact, ladder_of, plan):
    executor = ladder_of(plan)
    model, batch = executor.model, exact.draw_batch(executor.model, 0)
    gradients = {path: np.asarray(g) for path, g in executor.gradients(batch, 0)[1].items()}
    assert gradients.keys() == model.abstract_params.keys()
    params = executor.params()
    squares = {path: float(np.sum(gradient**2)) for path, gradient in gradients.items()}
    result = executor.step(executor.place(batch, 0))
    assert float(result.grad_norm) == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-12)
    # Every copy is what the owner made of the one gradient.
    share = exact.CLIP_NORM / float(result.grad_norm)
    wanted = params["words"] - LEARNING_RATE * share * gradients["words"]
    copies = [stage.params["words"] for stage in executor.stages if "words" in stage.params]
    assert len(copies) > 1
    for copy in copies:
        np.testing.assert_allclose(np.asarray(copy), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", LADDERS)
def test_a_clipped_update_is_as_long_as_the_limit(exact, ladder_of, plan):
    executor = ladder_of(plan)
    before = executor.params()
    result = executor.step(executor.place(exact.draw_batch(executor.model, 5), 5))
    assert float(result.grad_norm) > exact.CLIP_NORM
    after = executor.params()
    length = sum(float(np.sum((after[path] - before[path]) ** 2)) for path in before) ** 0.5
    assert length == pytest.approx(LEARNING_RATE * exact.CLIP_NORM, rel=1e-9)
    for path in ("frozen", "spare"):  # no gradient reaches them
        np.testing.assert_array_equal(after[path], before[path])


@pytest.mark.slow
def test_the_auxiliary_losses_of_experts_on_several_stages(exact):
    plan = {
        "microbatches": COUNT,
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1], "data": 2},
            {"layers": 2, "hosts": [0], "devices": [2, 3]},
            {"layers": 2, "hosts": [1], "devices": [0]},
        ],
    }
    model = exact.model_of("moe", layers=6, aux_loss_weight=10.0, dropout=0.0)
    executor = exact.executor_for(model, plan)
    routers = [path for path in model.abstract_params if path.endswith("router/kernel")]
    assert len({executor.realized.owner[path] for path in routers}) > 1
    exact.first_gradients(executor, 1e-9)
    exact.train(executor, 3, 1e-9)
    # They are most of the loss, so a lost one would show.
    (moment,) = exact.reference(model, COUNT).after(1)
    assert moment.loss > 10.0


def test_half_precision_trains_a_pipeline_to_the_loss_of_single_precision(exact):
    plan = {
        "microbatches": 2,
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1], "data": 2},
            {"layers": 1, "hosts": [1], "devices": [0, 1]},
        ],
    }
    fields = {"layers": 2, "dropout": 0.0}
    moments = exact.reference(exact.model_of("gpt", "fp32", **fields), 2).after(20)
    scaling = LossScaling(scale=2.0**24, dynamic=True, growth_steps=1000)
    model = exact.model_of("gpt", "fp16", **fields)
    executor = exact.executor_for(model, plan, loss_scaling=scaling)
    step, losses, skipped = 0, [], 0
    while step < 20:
        result = executor.step(executor.place(exact.draw_batch(model, step), step))
        if np.isfinite(float(result.grad_norm)):
            losses.append(float(result.loss))
            step += 1
        else:
            skipped += 1
        assert skipped < 24
    assert skipped >= 1  # the first scale is too large
    assert float(result.loss_scale) == 2.0 ** (24 - skipped)
    np.testing.assert_allclose(losses, [moment.loss for moment in moments], rtol=2e-3)
