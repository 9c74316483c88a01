"""cuDNN's attention: traced as JAX's own function traces it, lowered to its calls, rehearsed on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import draw_batch
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launcher import models
from launcher.config import GptConfig, MoeConfig
from launcher.errors import UnsupportedPrimitiveError
from launcher.models.cudnn_attention import causal_attention

SHAPE = 2, 16, 4, 8  # batch, sequence, heads, features of a head
KEY = np.array([0, 1], np.uint32)


def public(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", is_causal=True)


def with_gradients(attention):
    def both(q, k, v, dy):
        y, pull_back = jax.vjp(attention, q, k, v)
        return y, *pull_back(dy)

    return both


def like(dtype, sharding=None):
    return [jax.ShapeDtypeStruct(SHAPE, dtype, sharding=sharding)] * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_it_traces_as_jax_does_where_there_is_cudnn(dtype, monkeypatch):
    """All but the seed of a dropout that is 0."""
    ours = str(jax.make_jaxpr(with_gradients(causal_attention))(*like(dtype)))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    theirs = str(jax.make_jaxpr(with_gradients(public))(*like(dtype)))
    assert "dot_product_attention_bwd_wrapper" in ours
    assert ours == theirs.replace("seed=42", "seed=0")


def test_where_there_is_cudnn_its_version_is_asked_for(monkeypatch):
    monkeypatch.setattr(cudnn, "cuda_versions", object())
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jax.make_jaxpr(causal_attention)(*like(jnp.bfloat16)[:3])


@pytest.mark.parametrize("is_sharded", [False, True])
def test_for_a_gpu_it_is_two_calls_of_cudnn(is_sharded):
    """What a GPU's compiler gets; no GPU is needed for that."""
    function, sharding = with_gradients(causal_attention), None
    if is_sharded:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
        spec = P("data", None, "tensor", None)
        sharding = NamedSharding(mesh, spec)
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4, check_vma=False
        )
    traced = jax.jit(function).trace(*like(jnp.bfloat16, sharding))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$" in line]
    assert [line.split("@")[1].split("(")[0] for line in calls] == [
        "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    ]  # fmt: skip
    assert all("CAUSAL" in line for line in calls)
    shape = "tensor<1x16x2x8xbf16>" if is_sharded else "tensor<2x16x4x8xbf16>"
    assert all(shape in line for line in calls)


def draw(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, SHAPE, jnp.float32).astype(dtype) for key in keys]


@pytest.mark.parametrize("run", [jax.jit, lambda function: function], ids=["jit", "one by one"])
def test_on_a_cpu_it_computes_attention(run):
    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", is_causal=True)

    wanted = with_gradients(plain)(*draw(jnp.float32))
    found = run(with_gradients(causal_attention))(*draw(jnp.float32))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    assert np.std(found[1]) > 0.1


def test_without_gradients_it_is_the_same():
    q, k, v, dy = draw(jnp.float32)
    y, *_ = with_gradients(causal_attention)(q, k, v, dy)
    np.testing.assert_array_equal(causal_attention(q, k, v), y)


def test_other_calls_cannot_be_rehearsed(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    q = jnp.zeros(SHAPE, jnp.bfloat16)
    bias = jnp.zeros((1, 1, 16, 16), jnp.bfloat16)
    message = r"with NO_MASK mask, dropout 0.0 and 1 operands beside .*only CAUSAL, 0.0 and 0 can"
    with pytest.raises(UnsupportedPrimitiveError, match=message):
        jax.nn.dot_product_attention(q, q, q, bias, implementation="cudnn")


@pytest.mark.parametrize("config", [GptConfig, MoeConfig])
def test_a_model_learns_the_same_by_it(config):
    """The tolerance is that of bf16, to which probabilities are rounded in the plain kernel alone."""

    def gradients(attention):
        model = models.build(config(size="tiny", dtype="bf16", layers=2, attention=attention))
        params, state = model.init(0)
        batch = draw_batch(model, 2)
        run = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
        (loss, _), found = run(params, state, batch, KEY)
        return float(loss), found

    (plain_loss, plain), (loss, fused) = gradients("plain"), gradients("cudnn")
    assert loss == pytest.approx(plain_loss, rel=1e-3)
    for path, array in plain.items():
        if not path.endswith("qkv/bias"):  # the gradient of a key's bias is 0, and rounding
            np.testing.assert_allclose(fused[path], array, rtol=0, atol=0.05 * np.abs(array).max())
