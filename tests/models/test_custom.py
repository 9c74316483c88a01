"""A user's own model: trained like ours, and every way in which it can be wrong."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import models
from launcher.config import CustomConfig
from launcher.errors import ConfigError

KEY = np.array([1, 2], np.uint32)
OTHER_KEY = np.array([1, 3], np.uint32)


@pytest.fixture(autouse=True)
def _users_folder_on_the_path(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))
    with jax.numpy_rank_promotion("allow"):  # the strictness of our tests does not bind users
        yield
    for name in ("foreign_models", "broken_model"):
        sys.modules.pop(name, None)


def build(target="foreign_models:build", dtype="fp32", **args):
    config = CustomConfig(target=target, args=args, dtype=dtype)
    config = models.resolve(config, memory_bytes=1e9, has_accelerator=False, dtype=dtype)
    return models.build(config)


def draw_batch(batch_size=16):
    draw = np.random.default_rng(0)
    words = draw.integers(11, size=(batch_size, 5)).astype(np.int32)
    return {"words": words, "label": (words[:, 0] % 3).astype(np.int32)}


def test_a_foreign_model_is_described():
    model = build(hidden=8)
    assert (model.name, model.size, model.vocab_size) == ("custom", "custom", 11)
    assert (model.sample_unit, model.units_per_sample) == ("samples", 1)
    assert model.abstract_params["inner/kernel"].shape == (8, 8)
    assert set(model.abstract_state) == {"norm/mean", "norm/var", "offsets", "calls"}
    assert model.example_batch(3)["words"].shape == (3, 5)
    assert model.fingerprint != build(hidden=16).fingerprint
    assert (
        models.num_parameters(CustomConfig(target="foreign_models:build")) == build().num_parameters
    )


def test_the_example_of_the_docs_is_a_model(monkeypatch, tmp_path):
    docs = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
    _, _, after = docs.read_text().partition("```python\n")
    example, _, _ = after.partition("```")
    (tmp_path / "example_of_the_docs.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build("example_of_the_docs:build", hidden=16)
    assert model.abstract_params["head/kernel"].shape == (16, 1000)
    assert model.vocab_size == 1000


def test_a_foreign_model_trains():
    model, batch = build(), draw_batch()
    params, state = model.init(0)
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    losses = []
    for index in range(60):
        key_data = np.array([0, index], np.uint32)
        (loss, (state, metrics)), gradients = step(params, state, batch, key_data)
        params = {name: array - 0.2 * gradients[name] for name, array in params.items()}
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert set(metrics) == {"right"}
    assert int(state["calls"]) == 60
    assert np.any(np.asarray(state["norm/mean"]) != 0)
    evaluated, _ = jax.jit(model.eval_loss)(params, state, batch)
    assert evaluated < losses[0]


def test_dropout_of_a_foreign_model_follows_the_key():
    model, batch = build(), draw_batch()
    params, state = model.init(0)
    loss = jax.jit(model.loss)
    assert loss(params, state, batch, KEY)[0] == loss(params, state, batch, KEY)[0]
    assert loss(params, state, batch, KEY)[0] != loss(params, state, batch, OTHER_KEY)[0]
    evaluate = jax.jit(model.eval_loss)
    assert evaluate(params, state, batch)[0] == evaluate(params, state, batch)[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_foreign_model_computes_in_half_precision_from_fp32_weights(dtype):
    model, batch = build(dtype=dtype), draw_batch()
    assert model.abstract_params["inner/kernel"].dtype == jnp.float32
    assert model.abstract_state["norm/mean"].dtype == jnp.float32
    params, state = model.init(0)
    loss, (new_state, _) = jax.jit(model.loss)(params, state, batch, KEY)
    full, _ = jax.jit(build().loss)(params, state, batch, KEY)
    assert loss.dtype == jnp.float32
    assert new_state["norm/mean"].dtype == jnp.float32
    assert loss != full
    np.testing.assert_allclose(loss, full, rtol=0.05)


def test_batches_are_cast_as_well():
    model = build("foreign_models:line", dtype="bf16")
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
    trace = jax.make_jaxpr(model.loss)(model.abstract_params, {}, model.example_batch(4), key_data)
    products = [e.outvars[0].aval.dtype for e in trace.eqns if e.primitive.name == "mul"]
    assert products == [jnp.bfloat16]


def test_a_foreign_model_computes_in_fp64():
    params, state = build().init(0)
    with jax.enable_x64(True):
        model = build(dtype="fp64")
        params64, state64 = model.init(0)
        assert {array.dtype for array in params64.values()} == {jnp.dtype(jnp.float64)}
        loss, _ = jax.jit(model.eval_loss)(params64, state64, draw_batch())
        assert loss.dtype == jnp.float64
    expected, _ = jax.jit(build().eval_loss)(params, state, draw_batch())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_vocab_size_may_be_missing():
    assert build("foreign_models:line").vocab_size is None


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("foreign_models", {}, r"'foreign_models' does not name a function .*my_module:build"),
        (":build", {}, r"':build' does not name a function"),
        (
            "no_such_package.models:build",
            {},
            r"no_such_package.models cannot be imported: ModuleNotF",
        ),
        ("broken_model:build", {}, r"cannot be imported: RuntimeError: broken on import"),
        (
            "foreign_models:buidl",
            {},
            r"foreign_models has no buidl \(model.target=foreign_models:bu",
        ),
        ("foreign_models:NOT_A_FUNCTION", {}, r"NOT_A_FUNCTION is a int, not a function"),
        (
            "foreign_models:build",
            {"width": 3},
            r"failed: TypeError: .*'width'.*model.args=.*'width': 3",
        ),
        ("foreign_models:raising", {}, r"building the module failed: KeyError: 'no such layer'"),
        ("foreign_models:no_module", {}, r"returned is a dict, not an nnx.Module"),
        ("foreign_models:without_loss", {}, r"WithoutLoss, has no method loss\(batch\)"),
        ("foreign_models:without_example", {}, r"WithoutExample, has no method example_batch\("),
        ("foreign_models:plain_array", {}, r"attribute inner/mask is an array .*nnx.data"),
        ("foreign_models:line", {"batch": "tuple"}, r"example_batch returned a tuple, not a dict"),
        (
            "foreign_models:line",
            {"batch": "empty"},
            r"example_batch returned a dict, not a dict with",
        ),
        (
            "foreign_models:line",
            {"batch": "arrays"},
            r"example_batch has 'x': ArrayImpl, not a name",
        ),
        (
            "foreign_models:line",
            {"batch": "transposed"},
            r"gives 'x' the shape \(4, 7\), without the 7",
        ),
        ("foreign_models:line", {"batch": "scalar"}, r"gives 'x' the shape \(\), without the 7"),
        (
            "foreign_models:line",
            {"batch": "unheard"},
            r"example_batch\(7\) failed: KeyError: 'unheard'",
        ),
        (
            "foreign_models:line",
            {"result": "vector"},
            r"loss returned float32\[7\], not a floating-po",
        ),
        (
            "foreign_models:line",
            {"result": "integer"},
            r"loss returned int32\[\], not a floating-poin",
        ),
        (
            "foreign_models:line",
            {"result": "scalar"},
            r"loss returned float32\[\], not a scalar and a",
        ),
        (
            "foreign_models:line",
            {"result": "list"},
            r"loss returned a list, not a scalar and a dict",
        ),
        (
            "foreign_models:line",
            {"result": "metric"},
            r"metric 'errors', which is float32\[7\], not a",
        ),
        ("foreign_models:line", {"result": "grows"}, r"loss changes the variable 'extra'"),
        (
            "foreign_models:line",
            {"result": "raises"},
            r"loss\(batch\) failed: RuntimeError: the first l",
        ),
        (
            "foreign_models:evaluation_fails",
            {},
            r"in evaluation, .* failed: ValueError: no evaluation",
        ),
        (
            "foreign_models:line_with_vocabulary",
            {"vocab_size": 0},
            r"vocab_size is 0, not a positive",
        ),
        (
            "foreign_models:line_with_vocabulary",
            {"vocab_size": "5"},
            r"vocab_size is '5', not a pos",
        ),
    ],
)
def test_wrong_models_are_refused_in_one_line(target, args, message):
    with pytest.raises(ConfigError, match=message) as raised:
        build(target, **args)
    assert "\n" not in str(raised.value)
    assert f"model.target={target}" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("loop", "ValueError: Reverse-mode differentiation does not work for lax.while_loop"),
        ("callback", "ValueError: Pure callbacks do not support JVP"),
        ("svd", "NotImplementedError: .*"),
        ("rule", "IndexError: list index out of range"),
    ],
)
def test_a_loss_without_a_gradient_is_refused_in_one_line(kind, says):
    message = (
        rf"JAX cannot differentiate loss\(batch\): {says}.* "
        rf"\(model.target=foreign_models:underivable .*jax.custom_vjp, or put jax.lax.stop_gradient"
    )
    with pytest.raises(ConfigError, match=message) as raised:
        build("foreign_models:underivable", kind=kind)
    assert "\n" not in str(raised.value)


def test_a_loss_may_read_what_has_no_gradient():
    assert build("foreign_models:underivable", kind="stopped").num_parameters == 1
