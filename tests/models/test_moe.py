"""The mixture of experts against a reference in NumPy that routes one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launcher import models
from launcher.config import MoeConfig
from launcher.errors import ConfigError
from launcher.models.layers import PRECISIONS, Weights
from launcher.models.moe import Experts, ExpertsBlock
from launcher.models.sizes import moe_size

KEY = np.array([5, 7], np.uint32)
HIDDEN, EXPERTS, GROUP = 16, 4, 12


def make_experts(**fields) -> Experts:
    config = MoeConfig(size="tiny", hidden=HIDDEN, experts=EXPERTS, expert_group_size=GROUP)
    size = moe_size(MoeConfig(**(vars(config) | {"mlp_factor": 2} | fields)))
    experts = Experts(size, weights=Weights.seeded(nnx.Rngs(0), PRECISIONS["fp32"]))
    draw = np.random.default_rng(1)
    # Larger weights than at the start of training, so that experts and gates differ.
    for weight in (experts.router.kernel, experts.up, experts.down):
        weight[...] = jnp.asarray(draw.normal(size=weight.shape, scale=0.5), jnp.float32)
    return experts


def run(experts: Experts, x: np.ndarray):
    return jax.jit(lambda tokens: experts(tokens))(x)


def draw_tokens(batch=2, length=GROUP) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(batch, length, HIDDEN)).astype(np.float32)


def reference_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_gates(token, kernel):
    scores = np.exp(token @ kernel - np.max(token @ kernel))
    return scores / np.sum(scores)


def reference_group(tokens, gates, up, down, slots, *, takes_second):
    """Route one group as GShard's algorithm 1 does: all first choices, then all second ones."""
    num_experts = gates.shape[1]
    free = [slots] * num_experts
    output = np.zeros_like(tokens)
    ranked = np.argsort(-gates, axis=1, kind="stable")
    dropped = 0
    for choice in (0, 1):
        for index, token in enumerate(tokens):
            expert = ranked[index, choice]
            if choice == 1 and not takes_second[index]:
                continue
            if free[expert] == 0:
                dropped += 1
                continue
            free[expert] -= 1
            both = gates[index, ranked[index, 0]] + gates[index, ranked[index, 1]]
            value = reference_gelu(token @ up[expert]) @ down[expert]
            output[index] += gates[index, expert] / both * value
    return output, dropped


def reference(experts, x, slots, takes_second=None):
    """Return the layer's output, the balancing loss, and how many choices found no slot."""
    kernel, up, down = (
        np.asarray(weight[...], np.float64)
        for weight in (experts.router.kernel, experts.up, experts.down)
    )
    groups = x.astype(np.float64).reshape(-1, GROUP, HIDDEN)
    outputs, losses, dropped = [], [], 0
    for index, tokens in enumerate(groups):
        gates = np.array([reference_gates(token, kernel) for token in tokens])
        second = [True] * GROUP if takes_second is None else takes_second[index]
        output, lost = reference_group(tokens, gates, up, down, slots, takes_second=second)
        outputs.append(output)
        dropped += lost
        best = np.argmax(gates, axis=1)
        losses.append(
            EXPERTS
            * sum(np.mean(best == expert) * np.mean(gates[:, expert]) for expert in range(EXPERTS))
        )
    return np.stack(outputs).reshape(x.shape), np.mean(losses), dropped


def test_layer_equals_the_reference():
    experts, x = make_experts(), draw_tokens()
    y, aux_loss = run(experts, x)
    expected, expected_loss, dropped = reference(experts, x, slots=2 * GROUP // EXPERTS)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux_loss, expected_loss, rtol=1e-5)
    assert dropped > 0  # capacity 2 S / E is not enough for everybody here either


def test_full_experts_drop_tokens():
    experts, x = make_experts(capacity_factor=0.7), draw_tokens()
    y, _ = run(experts, x)
    expected, _, dropped = reference(experts, x, slots=2)
    assert dropped > 20
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.any(np.all(expected == 0, axis=-1))  # a token that both its experts dropped
    assert np.array_equal(np.all(np.asarray(y) == 0, axis=-1), np.all(expected == 0, axis=-1))


def test_first_tokens_of_a_group_go_first():
    experts = make_experts(capacity_factor=1.0)
    x = np.repeat(draw_tokens(batch=1, length=1), GROUP, axis=1)  # equal tokens, equal choices
    y, _ = run(experts, x)
    slots = GROUP // EXPERTS
    served = np.any(np.asarray(y[0]) != 0, axis=-1)
    assert served.tolist() == [True] * slots + [False] * (GROUP - slots)


def test_a_short_microbatch_is_one_group():
    experts, x = make_experts(), draw_tokens(batch=1, length=GROUP // 2)
    y, _ = run(experts, x)
    assert y.shape == x.shape


def test_groups_must_divide_the_tokens():
    experts = make_experts()
    with pytest.raises(
        ConfigError,
        match=r"groups of 12 tokens do not divide a microbatch of 3 x 6 = 18 tokens "
        r"\(model.expert_group_size=12\).*parallel.num_microbatches",
    ):
        experts(draw_tokens(batch=3, length=6))


def test_balancing_loss_is_one_when_experts_share_equally():
    experts = make_experts()
    experts.router.kernel[...] = 10.0 * jnp.eye(HIDDEN, EXPERTS)
    x = np.eye(HIDDEN, dtype=np.float32)[np.arange(GROUP) % EXPERTS][None]
    _, balanced = run(experts, x)
    _, unbalanced = run(experts, np.repeat(x[:, :1], GROUP, axis=1))
    assert float(balanced) == pytest.approx(1.0, rel=1e-5)
    assert float(unbalanced) == pytest.approx(EXPERTS, rel=1e-2)


def test_random_second_expert_follows_its_gate():
    experts = make_experts(second_expert="random", capacity_factor=float(EXPERTS))
    x = draw_tokens(batch=8)
    kernel = np.asarray(experts.router.kernel[...])
    gates = np.array([reference_gates(token, kernel) for token in x.reshape(-1, HIDDEN)])
    best_two = -np.sort(-gates, axis=1)[:, :2]
    chance = np.minimum(2 * best_two[:, 1] / np.sum(best_two, axis=1), 1.0)

    num_draws = 200
    taken = np.zeros(len(gates))
    route = nnx.jit(lambda router, x_GTH: router(x_GTH)[0])
    for seed in range(num_draws):
        experts.router.key[...] = jax.random.key(seed)
        combine = np.asarray(route(experts.router, jnp.asarray(x)))
        taken += np.count_nonzero(combine, axis=(2, 3)).reshape(-1) - 1
    # Five standard deviations of a binomial share.
    slack = 5 * np.sqrt(chance * (1 - chance) / num_draws) + 1e-9
    assert np.all(np.abs(taken / num_draws - chance) <= slack)
    assert np.any(chance < 0.5)


def test_evaluation_always_takes_the_second_expert():
    experts, x = make_experts(second_expert="random"), draw_tokens()
    experts.eval()
    y, _ = run(experts, x)
    expected, _, _ = reference(experts, x, slots=2 * GROUP // EXPERTS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aux_loss_weight", [0.0, 0.01])
def test_gradients_reach_the_gate_and_every_expert(aux_loss_weight):
    model = models.build(
        MoeConfig(size="tiny", dtype="fp32", layers=2, aux_loss_weight=aux_loss_weight)
    )
    params, state = model.init(0)
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(256, size=(4, 64)) for name in ("tokens", "targets")}
    gradients, _ = jax.jit(jax.grad(model.loss, has_aux=True))(params, state, batch, KEY)
    assert np.any(np.asarray(gradients["blocks/1/experts/router/kernel"]) != 0)
    for name in ("up", "down"):
        per_expert = np.abs(np.asarray(gradients[f"blocks/1/experts/{name}"])).sum(axis=(1, 2))
        assert np.all(per_expert > 0)


def test_loss_adds_the_weighted_balancing_loss():
    model = models.build(MoeConfig(size="tiny", dtype="fp32", layers=2, aux_loss_weight=0.5))
    params, state = model.init(0)
    batch = {name: np.arange(128).reshape(2, 64) for name in ("tokens", "targets")}
    loss, (_, metrics) = jax.jit(model.loss)(params, state, batch, KEY)
    assert set(metrics) == {"cross_entropy", "aux_loss"}
    expected = metrics["cross_entropy"] + 0.5 * metrics["aux_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_every_second_layer_has_experts():
    model = models.build(MoeConfig(size="tiny", dtype="fp32"))
    kinds = [isinstance(block, ExpertsBlock) for block in model.skeleton.hollow().blocks]
    assert kinds == [False, True, False, True]
    assert model.abstract_params["blocks/3/experts/up"].shape == (4, 64, 256)
    assert model.abstract_params["blocks/3/experts/down"].shape == (4, 256, 64)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_routing_is_in_fp32_in_half_precision(dtype):
    model = models.build(MoeConfig(size="tiny", dtype=dtype, layers=2))
    params, state = model.init(0)
    batch = {name: np.arange(128).reshape(2, 64) for name in ("tokens", "targets")}
    half, _ = jax.jit(model.eval_loss)(params, state, batch)
    reference = models.build(MoeConfig(size="tiny", dtype="fp32", layers=2))
    full, _ = jax.jit(reference.eval_loss)(params, state, batch)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, rtol=0.01)
