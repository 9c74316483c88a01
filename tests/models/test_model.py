"""`Model`: a pure loss over flat dicts, for every family."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import draw_batch

from launcher import models
from launcher.config import GptConfig, MoeConfig, WrnConfig

KEY = np.array([1, 2], np.uint32)
OTHER_KEY = np.array([1, 3], np.uint32)
CONFIGS = {"gpt": GptConfig, "moe": MoeConfig, "wrn": WrnConfig}
SMALL = {"gpt": {"layers": 2}, "moe": {"layers": 2}, "wrn": {"depth": 11}}
FAMILIES = pytest.mark.parametrize("family", list(CONFIGS))


@functools.cache
def build(family, dtype="fp32", **fields):
    return models.build(CONFIGS[family](size="tiny", dtype=dtype, **(SMALL[family] | fields)))


def trace(model, batch_size=2):
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return jax.make_jaxpr(model.loss)(
        model.abstract_params, model.abstract_state, model.example_batch(batch_size), key_data
    )


def primitives(jaxpr):
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts += primitives(inner)
    return counts


@FAMILIES
def test_init_fits_the_abstract_shapes_and_is_the_same_for_a_seed(family):
    model = build(family)
    params, state = model.init(7)
    for arrays, specs in ((params, model.abstract_params), (state, model.abstract_state)):
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in specs.items()
        }
    again, _ = model.init(7)
    other, _ = model.init(8)
    assert all(np.array_equal(params[name], again[name]) for name in params)
    drawn = {name for name in params if np.std(params[name]) > 0}
    assert all(not np.array_equal(params[name], other[name]) for name in drawn)
    # No two weights are the same draw.
    assert len({float(params[name].ravel()[0]) for name in drawn}) == len(drawn)


def test_init_can_be_compiled_for_a_part_of_the_weights():
    model = build("gpt")
    name = "blocks/1/mlp/up/kernel"
    part = jax.jit(lambda: {name: model.init(7)[0][name]})()
    np.testing.assert_allclose(part[name], model.init(7)[0][name], rtol=1e-6)


def test_paths_are_what_plans_and_checkpoints_rely_on():
    assert {
        "embedding/token",
        "embedding/position",
        "blocks/0/attention_norm/scale",
        "blocks/0/attention/qkv/kernel",
        "blocks/0/attention/out/bias",
        "blocks/1/mlp/down/kernel",
        "final_norm/bias",
    } <= set(build("gpt").abstract_params)
    assert "blocks/1/experts/router/kernel" in build("moe").abstract_params
    assert "blocks/0/shortcut/norm/scale" in build("wrn").abstract_params
    assert "blocks/0/reduce/norm/variance" in build("wrn").abstract_state


@FAMILIES
def test_loss_is_pure(family):
    model = build(family)
    params, state = model.init(0)
    kept = {name: np.array(array) for name, array in (params | state).items()}
    batch = draw_batch(model, 4)
    loss = jax.jit(model.loss)
    first, (new_state, metrics) = loss(params, state, batch, KEY)
    second, _ = loss(params, state, batch, OTHER_KEY)
    assert first == second
    assert first.shape == ()
    assert {name: spec.shape for name, spec in model.abstract_state.items()} == {
        name: array.shape for name, array in new_state.items()
    }
    assert all(metric.shape == () for metric in metrics.values())
    assert all(np.array_equal(kept[name], array) for name, array in (params | state).items())


@FAMILIES
def test_trace_is_plain(family):
    counts = primitives(trace(build(family)).jaxpr)
    for unwanted in ("scan", "while", "cond", "jit", "custom_jvp_call", "custom_vjp_call"):
        assert unwanted not in counts
    assert not [name for name in counts if name.startswith("random") or "threefry" in name]


@pytest.mark.parametrize("family", ["gpt", "moe"])
def test_blocks_repeat_equation_by_equation(family):
    sizes = {layers: len(trace(build(family, layers=layers)).eqns) for layers in (2, 4, 6)}
    assert sizes[6] - sizes[4] == sizes[4] - sizes[2]

    def text(equation):
        return equation.primitive.name, str(equation.params), [str(v.aval) for v in equation.invars]

    equations = [text(equation) for equation in trace(build(family, layers=6)).eqns]
    period = (sizes[6] - sizes[4]) if family == "moe" else (sizes[6] - sizes[4]) // 2
    start = 20  # inside the first block
    block = equations[start : start + period]
    assert equations[start + period : start + 2 * period] == block


def test_vocabulary_is_reduced_and_never_indexed():
    model = build("gpt")
    for equation in trace(model).eqns:
        if equation.primitive.name == "gather":
            assert equation.invars[0].aval.shape == (256, 64)  # the embedding, not the logits


@pytest.mark.parametrize("family", ["gpt", "moe"])
def test_dropout_follows_the_key_and_is_off_in_evaluation(family):
    model = build(family, dropout=0.2)
    params, state = model.init(0)
    # Larger weights than initial ones, so that what is dropped matters.
    params = {name: array * (5 if array.ndim > 1 else 1) for name, array in params.items()}
    batch = draw_batch(model, 4)
    loss, evaluate = jax.jit(model.loss), jax.jit(model.eval_loss)
    with_key = loss(params, state, batch, KEY)[0]
    assert with_key == loss(params, state, batch, KEY)[0]
    assert with_key != loss(params, state, batch, OTHER_KEY)[0]
    plain = build(family)
    assert set(plain.abstract_params) == set(model.abstract_params)
    expected = jax.jit(plain.eval_loss)(params, state, batch)[0]
    np.testing.assert_allclose(evaluate(params, state, batch)[0], expected, rtol=1e-6)
    traced = jax.make_jaxpr(model.eval_loss)(params, state, batch)
    assert not [name for name in primitives(traced.jaxpr) if name.startswith("random")]


def test_every_dropout_draws_for_itself():
    model = build("gpt", dropout=0.2)
    draws = primitives(trace(model).jaxpr)
    # One after the embedding; scores, attention output and feed-forward output in each block.
    assert draws["random_bits"] == 1 + 3 * 2
    constants = [
        str(equation.invars[1])
        for equation in trace(model).eqns
        if equation.primitive.name == "random_fold_in"
    ]
    assert len(set(constants)) == len(constants) == 1 + 3 * 2


@FAMILIES
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_fp32_master_weights(family, dtype):
    model = build(family, dtype=dtype)
    kept = {**model.abstract_params, **model.abstract_state}
    assert {spec.dtype for spec in kept.values()} == {jnp.dtype(jnp.float32)}
    heavy = [
        equation.outvars[0].aval.dtype
        for equation in trace(model).eqns
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    compute = jnp.dtype(jnp.bfloat16 if dtype == "bf16" else jnp.float16)
    num_routers = 1 if family == "moe" else 0
    assert heavy.count(compute) == len(heavy) - num_routers


@FAMILIES
def test_fp64_computes_in_fp64_from_the_same_weights(family):
    single = build(family)
    params, state = single.init(0)
    batch = draw_batch(single, 4)
    loss, _ = jax.jit(single.loss)(params, state, batch, KEY)
    with jax.enable_x64(True):
        double = models.build(CONFIGS[family](size="tiny", dtype="fp64", **SMALL[family]))
        params64, state64 = double.init(0)
        assert {array.dtype for array in params64.values()} == {jnp.dtype(jnp.float64)}
        assert all(np.array_equal(params64[name], params[name]) for name in params)
        loss64, _ = jax.jit(double.loss)(params64, state64, batch, KEY)
        assert loss64.dtype == jnp.float64
        narrow = {
            equation.outvars[0].aval.dtype
            for equation in trace(double).eqns
            if equation.primitive.name in ("dot_general", "conv_general_dilated", "reduce_sum")
        }
    assert narrow == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(loss, loss64, rtol=1e-5)


def test_a_39b_model_is_described_and_traced_without_arrays():
    model = models.build(GptConfig(size="39b", dtype="fp16"))
    assert len(trace(model, batch_size=1).eqns) < 5000
