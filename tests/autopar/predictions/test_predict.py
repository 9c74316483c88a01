"""Predictions in closed form: step time, bubble, bytes sent, FLOPs, memory."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from launcher.autopar.graphs.trace import trace_model
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.intra_op.memory import class_memories, stage_memory
from launcher.autopar.make_plan import find_plan
from launcher.autopar.predictions.predict import model_flops_per_step, predict

BATCH = 32


def planned(model, cluster, **fields):
    options = PlanOptions(**{"global_batch": BATCH, "mode": "manual", **fields})
    return find_plan(model, cluster, options, lambda text: None)


@pytest.fixture(scope="module")
def twins(toy_model):
    """Two equal halves, but for the sum at the end: a pipeline of two stages that is balanced."""
    width = 256

    def loss(params, state, batch, key_data):
        x = batch["x"]
        for k in range(8):
            x = jnp.tanh(x @ params[f"w{k}"])
        return jnp.sum(x), (state, {})

    return toy_model(
        loss=loss,
        abstract_params={
            f"w{k}": jax.ShapeDtypeStruct((width, width), jnp.float32) for k in range(8)
        },
        batch=lambda size: {"x": jax.ShapeDtypeStruct((size, width), jnp.float32)},
    )


@pytest.fixture(scope="module")
def two_hosts(cpu8):
    """A device each, for a pipeline in which all but matrix products takes next to nothing."""
    fast = replace(cpu8.inter_host, bytes_per_s=1e15, latency_s=1e-12)
    device = replace(cpu8.device, memory_bytes_per_s=1e15)
    return replace(cpu8, devices_per_host=1, inter_host=fast, device=device)


@pytest.fixture(scope="module")
def prompt(cpu8):
    """Links whose messages cost by the byte alone, or few large ones would be the cheaper ones."""
    links = {
        name: replace(link, latency_s=1e-12)
        for name, link in (("intra_host", cpu8.intra_host), ("inter_host", cpu8.inter_host))
    }
    return replace(cpu8, **links)


@pytest.mark.parametrize("num_microbatches", [4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_balanced_pipeline_of_two_stages(twins, two_hosts, num_microbatches, schedule):
    """The last stage is never idle between its first microbatch and its last."""
    found = planned(twins, two_hosts, pp=2, num_microbatches=num_microbatches, schedule=schedule)
    p = found.plan.predicted
    forward, backward = p.stage_forward_s, p.stage_backward_s
    assert forward[0] == pytest.approx(forward[1], rel=0.01)
    # The first stage makes no gradient of the batch.
    assert backward[0] == pytest.approx(backward[1] * 7 / 8, rel=0.02)
    last_s = num_microbatches * (forward[1] + backward[1])
    norm_s = two_hosts.intra_host.latency_s
    expected = forward[0] + last_s + backward[0] + max(p.stage_update_s)
    assert expected <= p.step_s <= expected + 2.1 * norm_s
    busy_s = num_microbatches * (sum(forward) + sum(backward)) + sum(p.stage_update_s)
    assert p.bubble_fraction == pytest.approx(1 - busy_s / (2 * p.step_s), abs=1e-9)


def test_one_stage_takes_the_sum_of_its_parts(tiny_gpt, cpu8):
    for mode in ("single", "data"):
        p = planned(tiny_gpt(layers=3), cpu8, mode=mode, num_microbatches=4).plan.predicted
        (forward,), (backward,) = p.stage_forward_s, p.stage_backward_s
        (synchronize,), (update,) = p.stage_sync_s, p.stage_update_s
        assert p.step_s == pytest.approx(4 * (forward + backward) + synchronize + update)
        assert p.bubble_fraction == pytest.approx(0.0, abs=1e-9)


def test_every_program_of_a_step_is_launched(tiny_gpt, cpu8):
    """Forward and backward of four microbatches; then synchronisation and update."""
    slow = replace(cpu8, device=replace(cpu8.device, program_launch_s=0.5))
    without, with_launches = (
        planned(tiny_gpt(layers=3), cluster, mode="single", num_microbatches=4).plan.predicted
        for cluster in (cpu8, slow)
    )
    assert with_launches.step_s == pytest.approx(without.step_s + 0.5 * (4 * 2 + 2))
    assert with_launches.communicated_bytes == without.communicated_bytes == 0.0


@pytest.mark.parametrize(("pp", "at_once"), [(1, 8), (2, 4), (8, 1)])
def test_stages_slow_down_those_on_their_host(tiny_gpt, cpu8, pp, at_once):
    """Eight devices on one, two and eight hosts: a stage feels all of its host that compute with it."""
    hosts = 8 // at_once
    crowded = replace(
        cpu8,
        num_hosts=hosts,
        devices_per_host=at_once,
        # Hosts of CPU devices would all be one machine.
        device=replace(cpu8.device, accelerator=True, concurrency=((1.0, 1.0), (8.0, 8.0))),
    )
    found = planned(tiny_gpt(layers=8), crowded, pp=pp, num_microbatches=2)
    assert {stage.settings.compute.at_once for stage in found.realized.stages} == {at_once}
    halved = planned(tiny_gpt(layers=8), crowded, pp=8, num_microbatches=2)
    assert {stage.settings.compute.at_once for stage in halved.realized.stages} == {at_once}
    ideal = replace(crowded, device=replace(crowded.device, concurrency=((1.0, 1.0),)))
    alone = predict(halved.plan, tiny_gpt(layers=8), ideal)
    for slow_s, alone_s in zip(
        halved.plan.predicted.stage_forward_s, alone.stage_forward_s, strict=True
    ):
        assert slow_s == pytest.approx(at_once * alone_s)


def test_one_microbatch_goes_through_two_stages_and_back(tiny_gpt, cpu8):
    """Everything in a row: nothing overlaps. The tied embedding goes to its user and back."""
    found = planned(tiny_gpt(layers=3), cpu8, tp=4, pp=2, num_microbatches=1)
    p = found.plan.predicted
    link = cpu8.inter_host
    activation = 4 * BATCH * 64 * 64
    across_s = link.latency_s + activation / link.bytes_per_s
    first = sum(p.stage_forward_s) + sum(p.stage_backward_s) + 2 * across_s
    assert p.step_s >= first + p.stage_sync_s[0] + p.stage_update_s[0]
    tied_s = 2 * (link.latency_s + 4 * 256 * 64 / link.bytes_per_s)
    once_s = sum(p.stage_sync_s) + sum(p.stage_update_s) + 2 * tied_s + 4 * link.latency_s
    # What the four devices of a host receive in pieces, they gather: twice activations, twice weights.
    near = cpu8.intra_host
    gathers_s = 2 * (3 * near.latency_s + 3 / 4 * activation / near.bytes_per_s)
    gathers_s += 2 * (3 * near.latency_s + 3 / 4 * 4 * 256 * 64 / near.bytes_per_s)
    assert p.step_s <= first + once_s + gathers_s


def test_data_parallelism_sends_what_rings_send(tiny_gpt, prompt):
    """Every gradient is all-reduced once a step, and the loss in every microbatch."""
    model = tiny_gpt(layers=3)
    n, num_microbatches = 8, 4
    p = planned(model, prompt, mode="data", num_microbatches=num_microbatches).plan.predicted
    per_device = 2 * (n - 1) / n * (4 * model.num_parameters + num_microbatches * 4)
    assert p.communicated_bytes == pytest.approx(n * per_device)


def test_zero_2_sends_as_much_and_zero_3_sends_weights_for_every_microbatch(tiny_gpt, prompt):
    model = tiny_gpt(layers=3)
    sent = [
        planned(model, prompt, mode="zero", zero=zero, num_microbatches=2).plan.predicted.communicated_bytes
        for zero in (2, 3)
    ]  # fmt: skip
    n, weights = 8, 4 * model.num_parameters
    assert sent[0] == pytest.approx(n * 2 * (n - 1) / n * (weights + 2 * 4))
    assert sent[1] > 2 * n * (n - 1) / n * weights  # gathered at least once in each microbatch


def test_one_device_sends_nothing(tiny_gpt, cpu8):
    p = planned(tiny_gpt(layers=3), cpu8, mode="single", num_microbatches=2).plan.predicted
    assert p.communicated_bytes == 0.0


def test_a_pipeline_sends_an_activation_and_its_gradient_for_every_microbatch(twins, two_hosts):
    p = planned(twins, two_hosts, pp=2, num_microbatches=4).plan.predicted
    assert p.communicated_bytes == 2 * 4 * BATCH * 256


def sent(messages):
    return {
        edge: {path: crossing.bytes_across for path, crossing in carried.items()}
        for edge, carried in messages.items()
    }


def test_a_tied_parameter_is_sent_once_a_step_and_so_is_its_gradient(toy_model, two_hosts):
    width, num_microbatches = 64, 4

    def loss(params, state, batch, key_data):
        x = jnp.tanh(batch["x"] @ params["tied"]) @ params["tied"]
        x = jnp.tanh(x @ jax.lax.stop_gradient(params["frozen"]))
        return jnp.sum(x @ params["tied"] @ params["frozen"]), (state, {})

    square = jax.ShapeDtypeStruct((width, width), jnp.float32)
    model = toy_model(
        loss=loss,
        abstract_params={"tied": square, "frozen": square},
        batch=lambda size: {"x": jax.ShapeDtypeStruct((size, width), jnp.float32)},
    )
    found = planned(model, two_hosts, pp=2, num_microbatches=num_microbatches)
    assert [stage.layers for stage in found.plan.stages] == [(0, 3), (3, 5)]
    # "frozen" is trained in the second stage alone: the first gets its new value, and sends nothing.
    messages, num_bytes = found.realized.messages, 4 * width**2
    assert sent(messages.tied_gradients) == {(1, 0): {"tied": num_bytes}, (0, 1): {}}
    assert sent(messages.tied_parameters) == {
        (0, 1): {"tied": num_bytes},
        (1, 0): {"frozen": num_bytes},
    }
    activations = 2 * 4 * BATCH * width  # of all microbatches, and their gradients
    assert found.plan.predicted.communicated_bytes == activations + 3 * 4 * width**2


def test_flops_are_three_times_the_forward_products(tiny_gpt, cpu8):
    """Of a GPT: six per parameter in a matrix and token, and attention (Megatron, SC'21)."""
    layers, hidden, seq, vocab = 3, 64, 64, 256
    traced = trace_model(tiny_gpt(layers=layers), BATCH)
    tokens = BATCH * seq
    products = 12 * layers * hidden**2 + hidden * vocab
    attention = 2 * layers * seq * hidden  # scores, and their product with the values
    expected = 3 * 2 * tokens * (products + attention)
    assert model_flops_per_step(traced, 1) == expected
    p = planned(tiny_gpt(layers=layers), cpu8, mode="data", num_microbatches=4).plan.predicted
    assert p.tflops_per_device == pytest.approx(expected / p.step_s / 8 / 1e12)


@pytest.mark.parametrize(("schedule", "in_flight"), [("gpipe", (4, 4)), ("1f1b", (2, 1))])
def test_peaks_count_the_microbatches_in_flight(tiny_gpt, cpu8, schedule, in_flight):
    found = planned(tiny_gpt(layers=3), cpu8, tp=4, pp=2, num_microbatches=4, schedule=schedule)
    for stage, peak, count in zip(
        found.realized.stages, found.plan.predicted.peak_bytes_per_device, in_flight, strict=True
    ):
        planner = found.realized.planner
        wiring = planner.wiring(*stage.stage.layers)
        memories = class_memories(planner, stage.sharding, wiring)
        counted = stage_memory(memories, wiring, "none")
        if (schedule, stage) == ("1f1b", found.realized.stages[-1]):
            # Both passes are one program there, in which what is kept ends layer by layer.
            assert counted.state_bytes + counted.stash_bytes < peak < counted.peak_bytes(count)
        else:
            assert peak == pytest.approx(counted.peak_bytes(count), rel=0.02)


def test_the_optimizer_is_adam_unless_another_is_given(tiny_gpt, cpu8):
    model = tiny_gpt(layers=3)
    plan = planned(model, cpu8, mode="single", num_microbatches=2).plan
    (adam,) = predict(plan, model, cpu8).peak_bytes_per_device
    (sgd,) = predict(plan, model, cpu8, optax.sgd(0.1)).peak_bytes_per_device
    assert adam - sgd == pytest.approx(8 * model.num_parameters, rel=1e-4)
    assert math.isfinite(adam)
