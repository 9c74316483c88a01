"""Every plan computes what one device computes: loss and gradients, for the tiny model of each family.

The reference is the plain model under `jax.value_and_grad` on one device, microbatch by microbatch. In
double precision only the order of sums differs: 1e-9 of the largest entry of a tensor. In single precision
a gradient that is zero in truth (a key's bias) is all rounding, so the scale is at least a thousandth of
the largest gradient of all. The summary of a run has the largest error of every case; the whole table is
`pytest tests/runtime/test_exactness.py -m "slow or not slow"`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.cluster import load_cluster
from launcher.autopar.make_plan import find_plan
from launcher.autopar.space import PlanOptions
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime.local_executor import LocalExecutor

BATCH, NUM_MICROBATCHES, SEED = 16, 2, 3
CONFIGS = {
    "gpt": lambda dtype: GptConfig(size="tiny", dtype=dtype, dropout=0.1, layers=3),
    "moe": lambda dtype: MoeConfig(size="tiny", dtype=dtype, second_expert="random"),
    "wrn": lambda dtype: WrnConfig(size="tiny", dtype=dtype),
}
PLANS = {
    "data": {"mode": "data"},
    "tensor": {"mode": "manual", "tp": 4, "dp": 1, "pp": 1, "hosts": 1},
    "tensor x pipeline": {"mode": "manual", "tp": 4, "dp": 1, "pp": 2},
    "pipeline": {"mode": "manual", "dp": 1, "tp": 1, "pp": 2, "hosts": 1, "devices": 2},
    "data x tensor": {"mode": "manual", "dp": 2, "tp": 4},
    "data x pipeline": {"mode": "manual", "dp": 4, "pp": 2, "schedule": "gpipe"},
    "all three": {"mode": "manual", "dp": 2, "tp": 2, "pp": 2, "recompute": "layer"},
    "zero-2": {"mode": "zero"},
    "zero-3 with full recomputation": {"mode": "manual", "dp": 4, "tp": 2, "zero": 3, "recompute": "full"},
    "auto": {"mode": "auto"},
}  # fmt: skip
# MoE and WRN take longer to compile; these four cover what GPT's plans do not show for them.
CASES = [("gpt", plan) for plan in PLANS] + [
    (family, plan)
    for family in ("moe", "wrn")
    for plan in ("data", "data x tensor", "all three", "auto")
]
SLOW = [
    (family, plan) for family in ("moe", "wrn") for plan in PLANS if (family, plan) not in CASES
]


@functools.cache
def cluster(hosts: int, devices: int):
    whole = load_cluster("cpu8")
    return whole if (hosts, devices) == (2, 4) else _cut(whole, hosts, devices)


def _cut(whole, hosts: int, devices: int):
    return dataclasses.replace(whole, num_hosts=hosts, devices_per_host=devices)


@functools.cache
def model_of(family: str, dtype: str):
    return models.build(CONFIGS[family](dtype))


def draw_batch(model):
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, model.vocab_size, leaf.shape).astype(leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer)
        else rng.normal(size=leaf.shape).astype(leaf.dtype)
        for name, leaf in model.example_batch(BATCH).items()
    }


@functools.cache
def reference(family: str, dtype: str, num_microbatches: int, step: int = 0):
    """Loss, gradients and new state on one device."""
    model = model_of(family, dtype)
    params, state = model.init(SEED)
    run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    total, sums = 0.0, None
    for k in range(num_microbatches):
        part = {
            name: np.split(leaf, num_microbatches)[k] for name, leaf in draw_batch(model).items()
        }
        key = np.array([SEED, step * num_microbatches + k], np.uint32)
        (loss, (new_state, _)), gradients = run(params, state, part, key)
        state = {**state, **new_state}
        total += loss / num_microbatches
        sums = gradients if sums is None else jax.tree.map(jnp.add, sums, gradients)
    mean = {path: np.asarray(g) / num_microbatches for path, g in sums.items()}
    return float(total), mean, {path: np.asarray(a) for path, a in state.items()}


def executor_for(family: str, dtype: str, plan: str, num_microbatches: int = NUM_MICROBATCHES):
    forced = dict(PLANS[plan])
    machine = cluster(forced.pop("hosts", 2), forced.pop("devices", 4))
    model = model_of(family, dtype)
    transform = optax.sgd(0.1, momentum=0.9)
    options = PlanOptions(
        global_batch=BATCH, num_microbatches=num_microbatches, optimizer=transform, **forced
    )
    planned = find_plan(model, machine, options, lambda text: None)
    optimizer = Optimizer(transform=transform, clip_norm=1.0, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[: machine.num_devices], dtype=object)
    grid = grid.reshape(machine.num_hosts, machine.devices_per_host)
    return LocalExecutor(planned.realized, model, optimizer, grid, seed=SEED)


def largest_errors(found, wanted, floor: float):
    """Per tensor: the largest error over its scale."""
    biggest = max(np.abs(gradient).max() for gradient in wanted.values())
    return {
        path: np.abs(np.asarray(found[path]) - gradient).max()
        / max(np.abs(gradient).max(), floor * biggest)
        for path, gradient in wanted.items()
    }


def check(family: str, plan: str, dtype: str, bound: float, floor: float, note) -> None:
    """Compare one plan's loss, gradients and state; notes the largest error for the table at the end."""
    executor = executor_for(family, dtype, plan)
    loss, gradients = executor.gradients(draw_batch(executor.model), 0)
    count = executor.plan.num_microbatches
    wanted_loss, wanted, wanted_state = reference(family, dtype, count)
    assert gradients.keys() == wanted.keys()
    assert float(loss) == pytest.approx(wanted_loss, rel=bound)
    errors = largest_errors(gradients, wanted, floor)
    worst = max(errors, key=errors.get)
    note("largest error", [family, plan, dtype, float(errors[worst])])
    assert errors[worst] <= bound, f"{worst}: {errors[worst]:.2e}"
    for path, array in executor.state().items():
        np.testing.assert_allclose(array, wanted_state[path], rtol=bound, atol=bound)


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_loss_and_gradients_in_double_precision(family, plan, record_property):
    with jax.enable_x64(True):
        check(family, plan, "fp64", bound=1e-9, floor=1e-30, note=record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "plan"), SLOW)
def test_loss_and_gradients_in_double_precision_of_the_other_plans(family, plan, record_property):
    with jax.enable_x64(True):
        check(family, plan, "fp64", bound=1e-9, floor=1e-30, note=record_property)


@pytest.mark.parametrize("plan", ["data x tensor", "all three"])
def test_loss_and_gradients_in_single_precision(plan, record_property):
    check("gpt", plan, "fp32", bound=1e-5, floor=1e-3, note=record_property)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("plan", PLANS)
def test_loss_and_gradients_in_single_precision_of_every_plan(family, plan, record_property):
    check(family, plan, "fp32", bound=1e-5, floor=1e-3, note=record_property)


def test_steps_update_as_one_device_does_with_clipping_and_a_tied_embedding():
    with jax.enable_x64(True):
        executor = executor_for("gpt", "fp64", "all three")
        model = executor.model
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        params, state = model.init(SEED)
        memory = transform.init(params)
        run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
        for step in range(3):
            result = executor.step(executor.place(draw_batch(model), step))
            sums, count = None, executor.plan.num_microbatches
            for k in range(count):
                part = {name: np.split(leaf, count)[k] for name, leaf in draw_batch(model).items()}
                key = np.array([SEED, step * count + k], np.uint32)
                _, gradients = run(params, state, part, key)
                sums = gradients if sums is None else jax.tree.map(jnp.add, sums, gradients)
            mean = {path: gradient / count for path, gradient in sums.items()}
            updates, memory = transform.update(mean, memory, params)
            params = optax.apply_updates(params, updates)
            assert float(result.grad_norm) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-9)
            for path, array in executor.params().items():
                np.testing.assert_allclose(array, params[path], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["gpt", "wrn"])
def test_evaluation_is_that_of_one_device(family):
    with jax.enable_x64(True):
        executor = executor_for(family, "fp64", "all three")
        model, batch = executor.model, draw_batch(executor.model)
        params, state = model.init(SEED)
        count = executor.plan.num_microbatches
        parts = [{n: np.split(leaf, count)[k] for n, leaf in batch.items()} for k in range(count)]
        wanted = np.mean([float(model.eval_loss(params, state, part)[0]) for part in parts])
        assert float(executor.evaluate(batch)) == pytest.approx(wanted, rel=1e-12)
