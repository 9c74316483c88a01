"""The update of a stage: optax on one device is the oracle, also where a step is skipped everywhere."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.models.layers import PRECISIONS
from launcher.models.model import make_model
from launcher.models.optimizer import DYNAMIC, LossScaling, Optimizer
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.update import (
    LARGEST_SCALE,
    LossScale,
    UpdateInputs,
    apply_update,
    compile_loss_cotangent,
    first_loss_scale,
)
from launcher.runtime.steps.local_executor import LocalExecutor

WIDTH, BATCH, CLIP, SCALE = 16, 16, 0.5, 2.0**10
TRANSFORMS = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=8),
}
SCALINGS = {
    "unscaled": LossScaling(),
    "constant": LossScaling(scale=SCALE),
    "dynamic": LossScaling(scale=SCALE, dynamic=True, growth_steps=2),
}


class Gated(nnx.Module):
    """Layers with a statistic, and two weights whose gradients are the `gates` of the batch."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Param(rngs.normal((WIDTH,)))
        self.blocks = nnx.List([nnx.Param(rngs.normal((WIDTH, WIDTH)) / 4) for _ in range(4)])
        self.mean = nnx.BatchStat(jnp.zeros(WIDTH))
        self.last = nnx.Param(rngs.normal((WIDTH,)))

    def loss(self, batch):
        gate_first, gate_last = jnp.mean(batch["gates"], axis=0)
        carried = jnp.sum(self.first[...]) * gate_first
        x = batch["x"] + jnp.broadcast_to(self.first[...], batch["x"].shape)
        for block in self.blocks:
            x = jnp.tanh(x @ block[...])
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * jnp.mean(x, axis=0)
        x = x * jnp.broadcast_to(self.last[...], x.shape)
        return jnp.mean(x**2) + carried + jnp.sum(self.last[...]) * gate_last, {}

    def example_batch(self, batch_size):
        x = jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)
        return {"x": x, "gates": jax.ShapeDtypeStruct((batch_size, 2), jnp.float32)}


@functools.cache
def model_of(precision: str):
    return make_model(
        Gated, precision=PRECISIONS[precision], casts=True, name="gated", size="gated",
        dtype=precision, sample_unit="samples", units_per_sample=1, vocab_size=None,
        default_global_batch=BATCH, fingerprint="gated",
    )  # fmt: skip


def planned(model, transform, devices: int, **forced):
    machine = replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=devices)
    options = PlanOptions(
        mode="manual", global_batch=BATCH, num_microbatches=2, optimizer=transform, **forced
    )
    return find_plan(model, machine, options, lambda text: None).realized


def grid_of(devices: int) -> np.ndarray:
    return np.array(jax.devices()[:devices], dtype=object).reshape(1, -1)


def draw(shapes, seed: int):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape.shape) for path, shape in shapes.items()}


def on_one_device(transform, params, gradients):
    """Parameters and optimizer state after updates by all gradients, in turn."""
    transform = optax.chain(optax.clip_by_global_norm(CLIP), transform)
    state = transform.init(params)
    for gradient in gradients:
        updates, state = jax.jit(transform.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state[1:]


def assert_trees_equal(found, wanted, tolerance: float) -> None:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


class OneStage:
    """The compiled update of a plan of one stage, called as the executor does."""

    def __init__(self, transform, scaling, zero: int):
        model = model_of("fp64")
        optimizer = Optimizer(
            transform=transform, clip_norm=CLIP, schedule=lambda step: 0.1, loss_scaling=scaling
        )
        realized = planned(model, transform, 4, dp=2, tp=2, zero=zero)
        (self.programs,) = build_programs(realized, model, optimizer, grid_of(4)).values()
        programs, layout = self.programs, self.programs.layout
        self.first = draw(model.abstract_params, 0)
        self.params = self.placed(self.first, layout.params)
        self.optimizer_state = programs.init_optimizer(self.params)
        self.state = self.placed({p: np.zeros(WIDTH) for p in layout.new_state}, layout.state)
        self.loss_scale = jax.device_put(first_loss_scale(scaling), programs.whole)
        self.update = programs.compile_update()

    def placed(self, arrays, specs):
        return {
            path: jax.device_put(array, self.programs.sharding(specs[path], array.ndim))
            for path, array in arrays.items()
        }

    def step(self, gradients, scale: float, state_after: float) -> float:
        specs = {path: self.programs.gradient_spec(path) for path in gradients}
        scaled = self.placed({p: g * scale for p, g in gradients.items()}, specs)
        square = sum(jnp.sum(jnp.asarray(g) ** 2) for g in scaled.values())
        after = {path: jnp.full_like(a, state_after) for path, a in self.state.items()}
        made = self.update(
            self.params, self.optimizer_state, scaled,
            [jax.device_put(square, self.programs.whole)], self.loss_scale, self.state, after,
        )  # fmt: skip
        self.params, self.optimizer_state, self.state = made[:3]
        self.loss_scale = made.loss_scale
        return float(made.norm)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_updates_and_skips_as_optax_does_on_one_device(transform, scaling, zero):
    with jax.enable_x64(True):
        stage = OneStage(TRANSFORMS[transform], SCALINGS[scaling], zero)
        scale = SCALINGS[scaling].scale
        gradients = [draw(stage.first, seed) for seed in (1, 2, 3)]
        broken = {path: g.copy() for path, g in gradients[1].items()}
        broken["blocks/2"][3, 5] = np.inf
        norms = [stage.step(gradients[0], scale, 1.0), stage.step(broken, scale, 2.0)]
        is_dynamic = SCALINGS[scaling].dynamic
        norms.append(stage.step(gradients[2], scale / 2 if is_dynamic else scale, 3.0))
        wanted = on_one_device(TRANSFORMS[transform], stage.first, [gradients[0], gradients[2]])
        assert_trees_equal((stage.params, stage.optimizer_state), (wanted[0], wanted[1][0]), 1e-12)
        sizes = [float(optax.tree.norm(gradients[index])) for index in (0, 2)]
        np.testing.assert_allclose([norms[0], norms[2]], sizes, rtol=1e-12)
        assert not np.isfinite(norms[1])
        (statistic,) = stage.state.values()
        np.testing.assert_array_equal(statistic, np.full(WIDTH, 3.0))
        if is_dynamic:
            assert [float(leaf) for leaf in stage.loss_scale] == [SCALE / 2, 1]
        else:
            assert stage.loss_scale is None


def test_the_state_of_a_skipped_step_is_that_before_it():
    with jax.enable_x64(True):
        stage = OneStage(TRANSFORMS["adamw"], LossScaling(), 2)
        before = jax.tree.map(np.array, (stage.params, stage.optimizer_state, stage.state))
        gradients = draw(stage.first, 1)
        gradients["last"][0] = np.nan
        assert np.isnan(stage.step(gradients, 1.0, 7.0))
        assert_trees_equal((stage.params, stage.optimizer_state, stage.state), before, 0.0)


def test_the_update_holds_no_copies_of_the_state_that_it_replaces():
    with jax.enable_x64(True):
        stage = OneStage(TRANSFORMS["adamw"], LossScaling(), 0)
    shard = stage.params["blocks/0"].addressable_shards[0].data
    assert stage.update.memory_analysis().temp_size_in_bytes < shard.nbytes


@pytest.mark.parametrize("square", [1.0, np.inf])
def test_state_that_is_no_result_of_an_op_is_kept_too_where_a_step_is_skipped(square):
    """The new state is the gradient itself, and the same number twice."""

    def update(gradients, state, params):
        doubled = 2.0 * gradients["w"]
        return gradients, (gradients, doubled, doubled)

    transform = optax.GradientTransformation(lambda params: None, update)
    optimizer = Optimizer(transform=transform, clip_norm=None, schedule=lambda step: 0.1)
    params, gradients = {"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}
    before = ({"w": jnp.zeros(2)}, jnp.full(2, 4.0), jnp.full(2, 5.0))
    squares = [jnp.float32(square)]
    made = apply_update(optimizer, UpdateInputs(params, before, gradients, squares, None, {}, {}))
    wanted = (gradients, jnp.full(2, 6.0), jnp.full(2, 6.0)) if np.isfinite(square) else before
    assert_trees_equal(made.optimizer_state, wanted, 0.0)


def test_the_scale_halves_on_overflow_and_doubles_after_enough_good_steps():
    scaling = LossScaling(scale=8.0, dynamic=True, growth_steps=3)
    optimizer = Optimizer(
        transform=optax.sgd(0.1), clip_norm=None, schedule=lambda step: 0.1, loss_scaling=scaling
    )
    params = {"w": jnp.ones(2)}
    memory, loss_scale, seen = optax.sgd(0.1).init(params), first_loss_scale(scaling), []
    # Good, bad, then seven good: halved once, doubled after three and after three more.
    for square in (1.0, np.inf, *[1.0] * 7):
        squares = [jnp.float32(square)]
        made = apply_update(
            optimizer, UpdateInputs(params, memory, params, squares, loss_scale, {}, {})
        )
        loss_scale = made.loss_scale
        seen.append((float(loss_scale.scale), int(loss_scale.good_steps)))
    assert seen == [
        (8.0, 1), (4.0, 0), (4.0, 1), (4.0, 2), (8.0, 0), (8.0, 1), (8.0, 2), (16.0, 0), (16.0, 1),
    ]  # fmt: skip


def test_the_scale_stays_finite():
    scaling = replace(DYNAMIC, scale=LARGEST_SCALE, growth_steps=1)
    optimizer = Optimizer(
        transform=optax.sgd(0.1), clip_norm=None, schedule=lambda step: 0.1, loss_scaling=scaling
    )
    params = {"w": jnp.ones(2)}
    state = LossScale(jnp.float32(LARGEST_SCALE), jnp.int32(0))
    inputs = UpdateInputs(
        params, optax.sgd(0.1).init(params), params, [jnp.float32(1)], state, {}, {}
    )
    assert float(apply_update(optimizer, inputs).loss_scale.scale) == LARGEST_SCALE


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_the_backward_pass_begins_with_the_scaled_share_of_the_mean(scaling):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = compile_loss_cotangent(scaling, 4, jnp.float32, where)
    assert float(compiled(first_loss_scale(scaling))) == scaling.scale / 4


def batch_with(gate_first: float, gate_last: float):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    gates = np.zeros((BATCH, 2), np.float32)
    gates[0] = gate_first, gate_last
    return {"x": x, "gates": gates}


def step(executor, batch, number: int):
    return executor.step(executor.place(batch, number))


@pytest.mark.parametrize("scaling", [LossScaling(), LossScaling(scale=2.0**8, dynamic=True)])
@pytest.mark.parametrize("gates", [(np.inf, 0.0), (0.0, np.inf)], ids=["first", "last"])
def test_an_overflow_on_one_stage_skips_the_step_on_all(gates, scaling):
    transform = TRANSFORMS["adamw"]
    model = model_of("fp32")
    optimizer = Optimizer(
        transform=transform, clip_norm=CLIP, schedule=lambda step: 0.1, loss_scaling=scaling
    )
    realized = planned(model, transform, 2, dp=1, tp=1, pp=2)
    executor = LocalExecutor(realized, model, optimizer, grid_of(2), seed=0)
    owners = [realized.owner[path] for path in ("first", "last")]
    assert owners == [0, 1]

    def held():
        memories = [stage.optimizer_state for stage in executor.stages]
        return jax.tree.map(np.array, (executor.params(), executor.state(), memories))

    executor.step(executor.place(batch_with(0.0, 0.0), 0))
    before = held()
    result = executor.step(executor.place(batch_with(*gates), 1))
    assert not np.isfinite(float(result.grad_norm))
    assert_trees_equal(held(), before, 0.0)
    executor.step(executor.place(batch_with(0.0, 0.0), 2))
    moved = zip(jax.tree.leaves(held()[0]), jax.tree.leaves(before[0]), strict=True)
    assert all(np.any(now != then) for now, then in moved)
    if scaling.dynamic:
        assert float(result.loss_scale) == 2.0**7
        scales = [float(stage.loss_scale.scale) for stage in executor.stages]
        assert scales == [2.0**7, 2.0**7]


def test_scaling_by_powers_of_two_rounds_nothing():
    transform, model, found = TRANSFORMS["adamw"], model_of("fp32"), []
    realized = planned(model, transform, 2, dp=1, tp=1, pp=2)
    for scaling in (LossScaling(), LossScaling(scale=64.0), SCALINGS["dynamic"]):
        optimizer = Optimizer(
            transform=transform, clip_norm=CLIP, schedule=lambda step: 0.1, loss_scaling=scaling
        )
        executor = LocalExecutor(realized, model, optimizer, grid_of(2), seed=0)
        norms = [float(step(executor, batch_with(0.5, 2.0), k).grad_norm) for k in range(3)]
        found.append((norms, executor.params()))
    assert_trees_equal(found[1], found[0], 0.0)
    assert_trees_equal(found[2], found[0], 0.0)
