"""Bytes of state in closed form, and of microbatches in flight as the stage's layout lists them."""

import math
from dataclasses import replace

import optax
import pytest

from launcher import models
from launcher.autopar.cluster import Device
from launcher.autopar.clustering import cluster
from launcher.autopar.compute import ComputeModel
from launcher.autopar.intra_op import IntraOpPlanner
from launcher.autopar.layers import build_layers
from launcher.autopar.memory import StageMemory, class_memories, stage_memory
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.restrictions import Restrictions
from launcher.autopar.search import optimizer_ratio
from launcher.autopar.spec import num_shards
from launcher.autopar.stage_layout import layout
from launcher.autopar.stage_problem import StageSettings, state_spec
from launcher.autopar.trace import Role, trace_model
from launcher.autopar.work import aval_bytes
from launcher.config import MoeConfig, WrnConfig

DEVICE = Device(
    kind="test",
    memory_bytes=2**34,
    peak_flops_per_s={"fp32": 1e13},
    matmul_efficiency={"fp32": 1.0},
    memory_bytes_per_s=1e12,
    has_bf16=False,
    accelerator=True,
)
ADAM = 2.0  # bytes of state per byte of parameters
BATCH, SEQUENCE, HIDDEN = 8, 64, 64  # of the tiny GPT


def settings(*shape, zero=0, recompute="none"):
    mesh = LogicalMesh(shape=shape, alpha=(1e-6, 1e-6), beta=(1e-9, 1e-10))
    return StageSettings(
        mesh=mesh,
        compute=ComputeModel(DEVICE),
        restrictions=Restrictions(frozenset({0}) if shape[0] > 1 else frozenset()),
        num_microbatches=4,
        zero=zero,
        recompute=recompute != "none",
    )


def planner_for(model, num_layers=None):
    traced = trace_model(model, BATCH)
    return IntraOpPlanner(build_layers(traced, cluster(traced, num_layers)))


def memory_of(planner, sharding, first, last, recompute="none"):
    wiring = planner.wiring(first, last)
    return stage_memory(class_memories(planner, sharding, wiring, ADAM), wiring, recompute)


@pytest.fixture(scope="module")
def planner(tiny_gpt):
    return planner_for(tiny_gpt(layers=6), num_layers=6)


def solved(planner, chosen, recompute="none"):
    last = len(planner.model.layers)
    sharding = planner.solve(0, last, chosen)
    return sharding, memory_of(planner, sharding, 0, last, recompute)


def test_replicated_parameters_take_16_bytes_each(planner, tiny_gpt):
    """Weight, two moments and the accumulator, in fp32; the tied embedding once."""
    parameters = tiny_gpt(layers=6).num_parameters
    for shape in ((1, 1), (8, 1)):
        _, memory = solved(planner, settings(*shape))
        assert memory.state_bytes == 16 * parameters
        assert memory.gradient_bytes == 4 * parameters


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_divides_what_it_shards(planner, tiny_gpt, zero):
    """All parameters of the tiny GPT have a dim that 8 devices divide."""
    parameters = tiny_gpt(layers=6).num_parameters
    sharding, memory = solved(planner, settings(8, 1, zero=zero))
    weights = 4 / 8 if zero == 3 else 4
    accumulators = sum(
        aval_bytes(planner.model.traced.graph.avals[value])
        / num_shards(sharding.picks["accumulator", layer.cls.name, slot], (8, 1))
        for value, (layer, slot) in parameters_of(planner).items()
    )
    assert memory.state_bytes == pytest.approx((weights + 8 / 8) * parameters + accumulators)
    assert memory.gradient_bytes == pytest.approx(4 * parameters / (8 if zero >= 2 else 1))


def parameters_of(planner):
    """Value of the traced model -> the first layer that reads it, and its slot there."""
    found = {}
    for layer in planner.model.layers:
        for slot, value in enumerate(layer.inputs):
            if layer.cls.slots[slot].role is Role.PARAM:
                found.setdefault(value, (layer, slot))
    return found


@pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
@pytest.mark.parametrize("zero", [0, 2])
def test_tensor_splits_divide_the_state_of_what_they_split(planner, shape, zero):
    chosen = replace(settings(*shape, zero=zero), memory_s_per_byte=1e-9)  # so that much is split
    sharding, memory = solved(planner, chosen)
    total, split = 0.0, set()
    for value, (layer, slot) in parameters_of(planner).items():
        aval = planner.model.traced.graph.avals[value]
        home = sharding.picks["slot", layer.cls.name, slot]
        accumulator = sharding.picks["accumulator", layer.cls.name, slot]
        state = state_spec(home, aval.shape, shape) if zero else home
        for copies, spec in ((1, home), (2, state), (1, accumulator)):
            shards = math.prod(n for n, e in zip(shape, spec, strict=True) if e >= 0)
            total += copies * aval_bytes(aval) / shards
        split |= {home[1]}
    assert split & {0, 1}, "nothing is split: the test shows nothing"
    assert memory.state_bytes == pytest.approx(total)


def test_layer_recomputation_keeps_only_what_goes_from_layer_to_layer(planner):
    """Five activations between six layers, and the tokens and targets, of an eighth of the batch."""
    _, memory = solved(planner, settings(8, 1, recompute="layer"), "layer")
    activation, ids = 4 * BATCH * SEQUENCE * HIDDEN, 2 * 4 * BATCH * SEQUENCE
    assert memory.stash_bytes == (5 * activation + ids) / 8


def test_full_recomputation_keeps_only_what_the_stage_received(planner):
    activation = 4 * BATCH * SEQUENCE * HIDDEN
    sharding = planner.solve(1, 4, settings(8, 1, recompute="full"))
    memory = memory_of(planner, sharding, 1, 4, "full")
    assert memory.stash_bytes == activation / 8
    layerwise = memory_of(planner, sharding, 1, 4, "layer")
    assert layerwise.stash_bytes == 3 * activation / 8
    assert memory.workspace_bytes > layerwise.workspace_bytes


def test_recomputing_more_keeps_less(planner):
    sharding = planner.solve(0, 6, settings(4, 1))
    kept = [
        memory_of(planner, sharding, 0, 6, how).stash_bytes for how in ("none", "layer", "full")
    ]
    assert kept[0] > 10 * kept[1] > 10 * kept[2] > 0


def local_bytes(avals, specs, mesh_shape):
    return sum(aval_bytes(avals[value]) / num_shards(spec, mesh_shape) for value, spec in specs)


def bytes_in_flight(planner, described, mesh_shape):
    """What a microbatch holds between its passes: kept values, its batch, and what was sent to it."""
    traced = planner.model.traced
    by_path = {source.path: value for value, source in traced.inputs.items()}
    kept = sum(
        local_bytes(planner.model.layers[i].cls.joint.avals, [(value, spec)], mesh_shape)
        for (i, value), spec in described.kept.items()
    )
    batch = [(by_path[path], spec) for path, spec in described.batch.items()]
    received = [*batch, *described.imports.items()]
    return kept + local_bytes(traced.graph.avals, received, mesh_shape)


FAMILIES = {
    "moe": lambda: models.build(MoeConfig(size="tiny", dtype="fp32")),
    "wrn": lambda: models.build(WrnConfig(size="tiny", dtype="fp32")),
}


def check_in_flight(planner):
    last = len(planner.model.layers)
    for recompute in ("none", "layer", "full"):
        chosen = settings(2, 2, recompute=recompute)
        for ends in ((0, last), (1, last - 1), (last // 2, last)):
            sharding = planner.solve(*ends, chosen)
            memory = memory_of(planner, sharding, *ends, recompute)
            described = layout(planner, sharding, *ends, recompute)
            expected = bytes_in_flight(planner, described, chosen.mesh.shape)
            assert memory.stash_bytes == pytest.approx(expected), (recompute, ends)


def test_a_microbatch_of_a_gpt_holds_what_the_layout_lists(planner):
    check_in_flight(planner)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_microbatch_of_the_other_families_holds_what_the_layout_lists(family):
    check_in_flight(planner_for(FAMILIES[family]()))


def test_the_peak_is_in_the_steady_phase_or_when_gradients_are_whole():
    memory = StageMemory(
        state_bytes=100.0, stash_bytes=10.0, workspace_bytes=5.0, gradient_bytes=32.0
    )
    assert memory.peak_bytes(1) == 100 + 32
    assert memory.peak_bytes(3) == 100 + 3 * 10 + 5


@pytest.mark.parametrize(
    ("transform", "ratio"),
    [(optax.sgd(0.1), 0.0), (optax.sgd(0.1, momentum=0.9), 1.0), (optax.adamw(1e-3), 2.0)],
)  # fmt: skip
def test_the_optimizer_decides_how_much_state_a_parameter_has(tiny_gpt, transform, ratio):
    assert optimizer_ratio(tiny_gpt(layers=6), transform) == pytest.approx(ratio, abs=1e-4)
