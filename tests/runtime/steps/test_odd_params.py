"""Shared, frozen and forgotten parameters: every plan trains them as one device does."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import draw_batch
from flax import nnx

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.intra_op.memory import class_memories, stage_memory, unread_memory
from launcher.autopar.make_plan import find_plan
from launcher.errors import ConfigError
from launcher.models.layers import PRECISIONS
from launcher.models.model import make_model
from launcher.models.optimizer import Optimizer
from launcher.runtime.steps.local_executor import LocalExecutor

WIDTH, BATCH, MICROBATCHES, SEED, STEPS, CLIP = 16, 16, 2, 5, 3, 0.5
OPTIMIZERS = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=8, weight_decay_rate=0.1),
}
PLANS = {
    "single": {"mode": "single"},
    "pipeline": {"mode": "manual", "pp": 2, "devices": 2},
    "three stages": {"mode": "manual", "pp": 3, "devices": 3},
    "all three": {"mode": "manual", "dp": 2, "tp": 2, "pp": 2, "devices": 8},
    "zero-2": {"mode": "manual", "dp": 2, "pp": 2, "zero": 2, "devices": 4, "recompute": "layer"},
    "zero-3": {"mode": "manual", "dp": 2, "pp": 2, "zero": 3, "devices": 4, "recompute": "full"},
}


class OddModel(nnx.Module):
    """Every way to use a parameter that is not to read it once and to train it.

    `table` is behind a stop_gradient before it is trained, `block` is one block applied over and over,
    `frozen` is read everywhere and trained nowhere, and `spare` is not read.
    """

    def __init__(self, rngs: nnx.Rngs, blocks: int = 4):
        self.table = nnx.Param(rngs.normal((WIDTH, WIDTH)))
        self.block = nnx.Param(rngs.normal((WIDTH, WIDTH)))
        self.frozen = nnx.Param(1.0 + rngs.uniform((WIDTH, WIDTH)))
        self.spare = nnx.Param(rngs.normal((3, 5)))
        self.temperature = nnx.Param(rngs.normal(()))
        self.blocks = blocks

    def loss(self, batch):
        x = batch["x"] @ jax.lax.stop_gradient(self.table[...])
        for _ in range(self.blocks):
            x = jnp.tanh(x @ self.block[...]) @ jax.lax.stop_gradient(self.frozen[...])
        x = x @ self.table[...].T
        loss = jnp.mean((x * self.temperature[...] - batch["y"]) ** 2)
        metrics = {
            "literal": 2.5,
            "constant": jnp.asarray(3, jnp.int32),
            "free": jnp.sqrt(jnp.arange(4.0))[3],
            "parameter": self.temperature[...],
            "half": loss / 2,
        }
        return loss, metrics

    def example_batch(self, batch_size):
        shape = jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)
        return {"x": shape, "y": shape}


def model_of(make_module, precision: str):
    return make_model(
        make_module, precision=PRECISIONS[precision], casts=True, name="odd", size="odd",
        dtype=precision, sample_unit="samples", units_per_sample=1, vocab_size=None,
        default_global_batch=BATCH, fingerprint="odd",
    )  # fmt: skip


def odd_model(precision: str = "fp64"):
    return model_of(OddModel, precision)


def planned(model, plan: str, transform):
    forced = dict(PLANS[plan])
    devices = forced.pop("devices", 1)
    machine = replace(load_cluster("cpu8"), num_hosts=1, devices_per_host=devices)
    options = PlanOptions(
        global_batch=BATCH, num_microbatches=MICROBATCHES, optimizer=transform, **forced
    )
    return find_plan(model, machine, options, lambda text: None)


def executor_for(model, plan: str, transform):
    found = planned(model, plan, transform)
    optimizer = Optimizer(transform=transform, clip_norm=CLIP, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[: found.plan.num_devices], dtype=object).reshape(1, -1)
    return LocalExecutor(found.realized, model, optimizer, grid, seed=SEED)


def on_one_device(model, transform):
    """(metrics, norm, parameters) after each step."""
    params, state = model.init(SEED)
    transform = optax.chain(optax.clip_by_global_norm(CLIP), transform)
    memory = transform.init(params)
    run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    for step in range(STEPS):
        found = []
        for k in range(MICROBATCHES):
            part = {n: np.split(a, MICROBATCHES)[k] for n, a in draw_batch(model, BATCH).items()}
            key = np.array([SEED, step * MICROBATCHES + k], np.uint32)
            (_, (_, metrics)), gradients = run(params, state, part, key)
            found.append((metrics, gradients))
        metrics, mean = jax.tree.map(lambda *leaves: sum(leaves) / MICROBATCHES, *found)
        updates, memory = transform.update(mean, memory, params)
        params = optax.apply_updates(params, updates)
        yield metrics, optax.tree.norm(mean), params


@functools.cache
def wanted(name: str):
    return list(on_one_device(odd_model(), OPTIMIZERS[name]))


CASES = [("adamw", plan) for plan in PLANS] + [("sgd", "zero-2"), ("adafactor", "pipeline")]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_steps_are_those_of_one_device(name, plan):
    with jax.enable_x64(True):
        model = odd_model()
        executor = executor_for(model, plan, OPTIMIZERS[name])
        for step, (metrics, norm, params) in enumerate(wanted(name)):
            result = executor.step(executor.place(draw_batch(model, BATCH), step))
            assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-9)
            assert result.metrics.keys() == metrics.keys()
            for key, value in metrics.items():
                assert float(result.metrics[key]) == pytest.approx(float(value), rel=1e-9), key
            found = executor.params()
            assert found.keys() == params.keys()
            for path, array in params.items():
                np.testing.assert_allclose(found[path], array, rtol=1e-9, atol=1e-11, err_msg=path)


def test_a_stop_gradient_in_the_first_stage_leaves_the_parameter_to_the_second():
    realized = planned(odd_model("fp32"), "pipeline", OPTIMIZERS["adamw"]).realized
    assert realized.owner["table"] == 1
    assert realized.users["table"] == (0,)
    assert realized.contributors["table"] == ()


def test_gradients_of_all_parameters_are_there_and_zero_where_no_gradient_comes():
    with jax.enable_x64(True):
        model = odd_model()
        executor = executor_for(model, "pipeline", OPTIMIZERS["adamw"])
        _, gradients = executor.gradients(draw_batch(model, BATCH), 0)
        assert gradients.keys() == model.abstract_params.keys()
        for path in ("frozen", "spare"):
            assert not np.any(np.asarray(gradients[path]))
        assert np.any(np.asarray(gradients["table"]))


def bytes_held(stage):
    """What a stage really holds on one device before a step, but for the step counts."""
    leaves = [*stage.params.values(), *jax.tree.leaves(stage.optimizer_state)]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves if leaf.ndim)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("plan", ["pipeline", "all three", "zero-3"])
def test_the_state_that_is_held_is_the_state_that_was_counted(name, plan):
    model = odd_model("fp32")
    executor = executor_for(model, plan, OPTIMIZERS[name])
    planner = executor.realized.planner
    for stage, realized in zip(executor.stages, executor.realized.stages, strict=True):
        wiring = planner.wiring(*realized.stage.layers)
        memories = class_memories(planner, realized.sharding, wiring)
        unread = unread_memory(planner, realized.settings) if wiring.unread else ()
        counted = stage_memory(memories, wiring, "none", unread).state_bytes
        sums = sum(a.addressable_shards[0].data.nbytes for a in stage.compiled.zeros().values())
        scalars = sum(3 * 4 for path in stage.programs.owned if path == "temperature")
        assert abs(counted - bytes_held(stage) - sums) <= scalars + 4
    assert jnp.isfinite(counted)


def test_evaluation_reads_them_as_one_device_does():
    with jax.enable_x64(True):
        model = odd_model()
        executor = executor_for(model, "three stages", OPTIMIZERS["adamw"])
        batch = draw_batch(model, BATCH)
        wanted_loss, _ = model.eval_loss(*model.init(SEED), batch)
        assert float(executor.evaluate(batch)) == pytest.approx(float(wanted_loss), rel=1e-12)


class Remembering(nnx.Module):
    """Writes its loss into its state; may read it at the other end of the next microbatch."""

    def __init__(self, rngs: nnx.Rngs, reads: bool):
        self.weights = nnx.data([nnx.Param(rngs.normal((WIDTH, WIDTH))) for _ in range(4)])
        self.last = nnx.Variable(jnp.zeros(()))
        self.reads = reads

    def loss(self, batch):
        x = batch["x"] + self.last[...] if self.reads else batch["x"]
        for weight in self.weights:
            x = jnp.tanh(x @ weight[...])
        loss = jnp.mean(x**2)
        self.last[...] = jax.lax.stop_gradient(loss)
        return loss, {}

    def example_batch(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)}


def test_state_that_is_written_and_never_read_is_kept():
    model = model_of(functools.partial(Remembering, reads=False), "fp32")
    executor = executor_for(model, "pipeline", OPTIMIZERS["sgd"])
    batch = draw_batch(model, BATCH)
    executor.step(executor.place(batch, 0))
    params, state = model.init(SEED)
    last = {name: leaf[BATCH // MICROBATCHES :] for name, leaf in batch.items()}
    loss, _ = model.loss(params, state, last, np.zeros(2, np.uint32))
    assert executor.state() == {"last": pytest.approx(float(loss), rel=1e-5)}


def test_state_that_one_stage_writes_and_another_reads_is_refused():
    model = model_of(functools.partial(Remembering, reads=True), "fp32")
    with pytest.raises(
        ConfigError, match=r"'last' is written by stage 1 and read by stage 0 .*pp=2"
    ):
        planned(model, "pipeline", OPTIMIZERS["sgd"])
