"""Optimizers against their formulas, on whole models and on parts of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launcher.config import AdafactorConfig, AdamwConfig, OptimizerConfig, SgdConfig
from launcher.errors import ConfigError
from launcher.models.optimizer import build_optimizer, decayed, make_schedule

COMMON = {
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "decay": "constant",
    "clip_norm": 1.0,
    "weight_decay": 0.0,
}
ADAMW = AdamwConfig(**COMMON, beta1=0.9, beta2=0.95, eps=1e-8)
SGD = SgdConfig(**COMMON, momentum=0.9)
ADAFACTOR = AdafactorConfig(**COMMON)
ALL = pytest.mark.parametrize("config", [ADAMW, SGD, ADAFACTOR], ids=lambda config: config.name)


def draw_params():
    draw = np.random.default_rng(0)
    shapes = {
        "embedding/token": (160, 130),  # large enough for Adafactor to factor
        "blocks/0/up/kernel": (8, 12),
        "blocks/0/up/bias": (12,),
        "blocks/1/experts/up": (2, 8, 6),
        "norm/scale": (8,),
    }
    return {
        name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def draw_gradients(step):
    draw = np.random.default_rng(100 + step)
    return {
        name: jnp.asarray(draw.normal(size=param.shape), jnp.float32)
        for name, param in draw_params().items()
    }


def train(config, params, names, num_steps=4):
    transform = build_optimizer(config, total_steps=10).transform
    params = {name: params[name] for name in names}
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(num_steps):
        gradients = {name: draw_gradients(step)[name] for name in names}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


@ALL
def test_parts_of_a_model_are_updated_as_the_whole(config):
    config = dataclasses.replace(config, weight_decay=0.1, warmup_steps=2, decay="cosine")
    params = draw_params()
    whole = train(config, params, list(params))
    for names in (["embedding/token", "norm/scale"], ["blocks/0/up/kernel"], ["blocks/0/up/bias"]):
        part = train(config, params, names)
        for name in names:
            np.testing.assert_allclose(part[name], whole[name], rtol=1e-6, atol=1e-7)
            assert np.any(np.asarray(part[name] != params[name]))


@ALL
def test_states_are_dicts_by_path(config):
    params = draw_params()
    state = jax.eval_shape(build_optimizer(config, total_steps=10).transform.init, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        assert leaf.shape == () if not keys else keys[0] in params


def test_adamw_is_its_formula():
    config = dataclasses.replace(ADAMW, weight_decay=0.01)
    params = draw_params()
    trained = train(config, params, list(params))
    for name, initial in params.items():
        weight = np.asarray(initial, np.float64)
        first, second = np.zeros_like(weight), np.zeros_like(weight)
        for step in range(4):
            gradient = np.asarray(draw_gradients(step)[name], np.float64)
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            direction = (first / (1 - 0.9 ** (step + 1))) / (
                np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8
            )
            decay = 0.01 * weight if weight.ndim > 1 else 0.0
            weight = weight - 0.1 * (direction + decay)
        np.testing.assert_allclose(trained[name], weight, rtol=1e-4, atol=1e-6)


def test_sgd_is_its_formula():
    config = dataclasses.replace(SGD, weight_decay=0.01)
    params = draw_params()
    trained = train(config, params, list(params))
    for name, initial in params.items():
        weight, velocity = np.asarray(initial, np.float64), 0.0
        for step in range(4):
            velocity = 0.9 * velocity + np.asarray(draw_gradients(step)[name], np.float64)
            weight = weight - 0.1 * (velocity + (0.01 * weight if weight.ndim > 1 else 0.0))
        np.testing.assert_allclose(trained[name], weight, rtol=1e-4, atol=1e-6)


def test_adafactor_is_optaxs_and_keeps_rows_and_columns():
    params = draw_params()
    trained = train(ADAFACTOR, params, list(params))
    transform = optax.adafactor(0.1)
    state, expected = transform.init(params), params
    update = jax.jit(transform.update)
    for step in range(4):
        updates, state = update(draw_gradients(step), state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in params:
        np.testing.assert_allclose(trained[name], expected[name], rtol=1e-5, atol=1e-6)

    state = build_optimizer(ADAFACTOR, total_steps=10).transform.init(params)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert kept < 0.05 * sum(param.size for param in params.values())


def test_only_matrices_are_decayed():
    names = {name for name, is_decayed in decayed(draw_params()).items() if is_decayed}
    assert names == {"embedding/token", "blocks/0/up/kernel", "blocks/1/experts/up"}
    assert decayed({"stacked/bias": np.zeros((4, 3))}) == {"stacked/bias": False}


@ALL
def test_clipping_is_left_to_the_runtime(config):
    assert build_optimizer(config, total_steps=10).clip_norm == 1.0
    off = dataclasses.replace(config, clip_norm=0.0)
    assert build_optimizer(off, total_steps=10).clip_norm is None
    params = {"kernel": jnp.zeros((2, 2))}
    transform = build_optimizer(SGD, total_steps=10).transform
    huge = {"kernel": jnp.full((2, 2), 1e6)}
    updates, _ = transform.update(huge, transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 1e6)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules_rise_then_decay(decay, rates):
    config = dataclasses.replace(ADAMW, learning_rate=1.0, warmup_steps=4, decay=decay)
    schedule = make_schedule(config, total_steps=8)
    np.testing.assert_allclose([schedule(step) for step in range(8)], rates, rtol=1e-5)
    assert float(schedule(8)) == pytest.approx(1.0 if decay == "constant" else 0.0, abs=1e-6)


def test_schedule_without_warmup_starts_at_the_top():
    schedule = make_schedule(dataclasses.replace(ADAMW, decay="linear"), total_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0.1, 0.075, 0.05, 0.025])


def test_a_run_may_end_within_the_warmup():
    schedule = make_schedule(dataclasses.replace(ADAMW, warmup_steps=10), total_steps=2)
    np.testing.assert_allclose([schedule(0), schedule(1)], [0.01, 0.02], rtol=1e-6)


def test_updates_follow_the_schedule():
    config = dataclasses.replace(SGD, momentum=0.0, warmup_steps=2, decay="linear")
    optimizer = build_optimizer(config, total_steps=6)
    params = {"kernel": jnp.ones((2, 2))}
    state = optimizer.transform.init(params)
    for step in range(6):
        updates, state = optimizer.transform.update({"kernel": jnp.ones((2, 2))}, state, params)
        np.testing.assert_allclose(updates["kernel"], -optimizer.schedule(step), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, r"learning rate of 0.0 .*\(optimizer.learning_rate=0.0\)"),
        ({"learning_rate": float("nan")}, r"optimizer.learning_rate=nan"),
        (
            {"warmup_steps": -1},
            r"warmup_steps cannot be negative, and is -1 \(optimizer.warmup_steps",
        ),
        ({"clip_norm": -1.0}, r"optimizer.clip_norm=-1.0"),
        ({"weight_decay": -0.1}, r"optimizer.weight_decay=-0.1"),
        ({"decay": "sine"}, r"'sine' \(optimizer.decay=sine\): choose constant, cosine or linear"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(dataclasses.replace(ADAMW, **fields), total_steps=10)


def test_an_optimizer_that_is_not_there_is_a_bug():
    with pytest.raises(AssertionError, match="no optimizer is built from OptimizerConfig"):
        build_optimizer(OptimizerConfig(name="lion", **COMMON), total_steps=10)
