"""Bytes of state in closed form, and of microbatches in flight as the stage's layout lists them."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.optimizer_state import ADAMW, KeptState, OptimizerFootprint
from launcher.autopar.graphs.trace import Role, trace_model
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.memory import (
    StageMemory,
    class_memories,
    stage_memory,
    unread_memory,
)
from launcher.autopar.intra_op.stage_layout import layout
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.sharding.param_costs import state_spec
from launcher.autopar.sharding.restrictions import Restrictions
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, num_shards
from launcher.config import MoeConfig, WrnConfig

BATCH, SEQUENCE, HIDDEN = 8, 64, 64  # of the tiny GPT


@pytest.fixture(scope="module")
def settings(device):
    def made(*shape, zero=0, recompute="none"):
        mesh = LogicalMesh(shape=shape, alpha=(1e-6, 1e-6), beta=(1e-9, 1e-10))
        return StageSettings(
            mesh=mesh,
            compute=ComputeModel(device),
            restrictions=Restrictions(frozenset({0}) if shape[0] > 1 else frozenset()),
            num_microbatches=4,
            zero=zero,
            recompute=recompute,
        )

    return made


def planner_for(model, num_layers=None):
    traced = trace_model(model, BATCH)
    return IntraOpPlanner(build_layers(traced, cluster(traced, num_layers)))


def memory_of(planner, sharding, first, last, recompute="none"):
    wiring = planner.wiring(first, last)
    return stage_memory(class_memories(planner, sharding, wiring), wiring, recompute)


@pytest.fixture(scope="module")
def planner(tiny_gpt):
    return planner_for(tiny_gpt(layers=6), num_layers=6)


def solved(planner, chosen, recompute="none"):
    last = len(planner.model.layers)
    sharding = planner.solve(0, last, chosen)
    return sharding, memory_of(planner, sharding, 0, last, recompute)


def test_replicated_parameters_take_16_bytes_each(planner, tiny_gpt, settings):
    """Weight, two moments and the accumulator, in fp32; the tied embedding once."""
    parameters = tiny_gpt(layers=6).num_parameters
    for shape in ((1, 1), (8, 1)):
        _, memory = solved(planner, settings(*shape))
        assert memory.state_bytes == 16 * parameters
        assert memory.gradient_bytes == 4 * parameters


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_divides_what_it_shards(planner, tiny_gpt, zero, settings):
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
def test_tensor_splits_divide_the_state_of_what_they_split(planner, shape, zero, settings):
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


def test_layer_recomputation_keeps_only_what_goes_from_layer_to_layer(planner, settings):
    """Five activations between six layers, and the tokens and targets, of an eighth of the batch."""
    _, memory = solved(planner, settings(8, 1, recompute="layer"), "layer")
    activation, ids = 4 * BATCH * SEQUENCE * HIDDEN, 2 * 4 * BATCH * SEQUENCE
    assert memory.stash_bytes == (5 * activation + ids) / 8


def test_full_recomputation_keeps_only_what_the_stage_received(planner, settings):
    activation = 4 * BATCH * SEQUENCE * HIDDEN
    sharding = planner.solve(1, 4, settings(8, 1, recompute="full"))
    memory = memory_of(planner, sharding, 1, 4, "full")
    assert memory.stash_bytes == activation / 8
    layerwise = memory_of(planner, sharding, 1, 4, "layer")
    assert layerwise.stash_bytes == 3 * activation / 8
    assert memory.workspace_bytes > layerwise.workspace_bytes


def test_recomputing_more_keeps_less(planner, settings):
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


def check_in_flight(planner, settings):
    last = len(planner.model.layers)
    for recompute in ("none", "layer", "full"):
        chosen = settings(2, 2, recompute=recompute)
        for ends in ((0, last), (1, last - 1), (last // 2, last)):
            sharding = planner.solve(*ends, chosen)
            memory = memory_of(planner, sharding, *ends, recompute)
            described = layout(planner, sharding, *ends, recompute)
            expected = bytes_in_flight(planner, described, chosen.mesh.shape)
            assert memory.stash_bytes == pytest.approx(expected), (recompute, ends)


def test_a_microbatch_of_a_gpt_holds_what_the_layout_lists(planner, settings):
    check_in_flight(planner, settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_microbatch_of_the_other_families_holds_what_the_layout_lists(family, settings):
    check_in_flight(planner_for(FAMILIES[family]()), settings)


def test_the_peak_is_in_the_steady_phase_or_when_gradients_are_whole():
    memory = StageMemory(
        state_bytes=100.0, stash_bytes=10.0, workspace_bytes=5.0, gradient_bytes=32.0
    )
    assert memory.peak_bytes(1) == 100 + 32
    assert memory.peak_bytes(3) == 100 + 3 * 10 + 5


WIDTH, DEPTH = 32, 4
SQUARE = 4 * WIDTH**2  # bytes of a parameter


@pytest.fixture(scope="module")
def shared(toy_model):
    """One block applied over and over, between a table that is read first and last, and one unread."""

    def loss(params, state, batch, key_data):
        x = batch["x"] @ params["table"]
        for _ in range(DEPTH):
            x = jnp.tanh(x @ params["block"])
        return jnp.mean((x @ params["table"].T) ** 2), (state, {})

    names = ("table", "block", "spare")
    model = toy_model(
        loss=loss,
        abstract_params={n: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for n in names},
        batch=lambda size: {"x": jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)},
    )
    return planner_for(model, num_layers=DEPTH + 2)


# The layers of a range -> the parameters it updates, and those it has a copy of.
SHARES = [
    ((0, 6), 2, 0),
    ((0, 1), 1, 0),  # the table
    ((0, 3), 2, 0),  # and the block, once for two layers
    ((2, 4), 0, 1),  # the block, once
    ((3, 6), 0, 2),  # both again
]


@pytest.mark.parametrize(("ends", "owned", "borrowed"), SHARES)
def test_a_shared_parameter_counts_once_in_a_stage_and_its_state_where_it_is_updated(
    shared, ends, owned, borrowed, settings
):
    """Weight and accumulator where it is read; the moments of Adam only in its first stage."""
    sharding = shared.solve(0, DEPTH + 2, settings(1, 1))
    memories = class_memories(shared, sharding, shared.wiring(0, DEPTH + 2))
    wiring = shared.wiring(*ends)
    unread = unread_memory(shared, sharding.settings) if wiring.unread else ()
    counted = stage_memory(memories, wiring, "none", unread)
    spare = 3 * SQUARE if ends[1] == DEPTH + 2 else 0  # no accumulator: it has no gradient
    assert counted.state_bytes == 4 * SQUARE * owned + 2 * SQUARE * borrowed + spare
    assert counted.gradient_bytes == SQUARE * (owned + borrowed) + spare / 3


@pytest.mark.parametrize(("ends", "owned", "borrowed"), SHARES)
def test_a_shared_parameter_is_synchronised_once_in_a_stage_and_updated_where_it_is_owned(
    shared, ends, owned, borrowed, settings
):
    chosen = settings(8, 1)
    whole = shared.solve(0, DEPTH + 2, chosen)
    assert whole.picks["accumulator", "layer0", 1] == (PARTIAL, REPLICATED)
    counted = whole.for_counts(shared.wiring(*ends).counts, chosen).seconds
    reduce_s = chosen.mesh.all_reduce(0, SQUARE)
    assert counted.synchronize == pytest.approx((owned + borrowed) * reduce_s)
    assert counted.update == pytest.approx(
        owned * 7 * SQUARE / chosen.compute.device.memory_bytes_per_s
    )
    alone = shared.solve(*ends, chosen).seconds
    assert alone.synchronize == pytest.approx(counted.synchronize)
    assert alone.update == pytest.approx(counted.update)


def factored(rows, columns):
    """A row and a column of means, and two placeholders of one entry (Adafactor, section 4)."""
    return 4 * (rows + columns + 1)


@pytest.mark.parametrize(
    ("transform", "alike", "whole"),
    [
        (optax.sgd(0.1), 0, 0),
        (optax.sgd(0.1, momentum=0.9), 1, 0),
        (optax.adamw(1e-3), 2, 0),
        (optax.scale_by_factored_rms(), 0, factored(256, 128)),
    ],
)
def test_the_optimizer_decides_how_much_state_a_parameter_has(transform, alike, whole):
    aval = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    footprint = OptimizerFootprint(transform)
    kept, size = footprint.kept(aval), 4 * 256 * 128
    assert (kept.alike_bytes, kept.whole_bytes) == (alike * size, whole)
    assert footprint.update_bytes(aval) == ((3 + 2 * alike) * size, 2 * whole)


def test_state_that_is_not_shaped_like_its_parameter_is_whole_on_every_device(tiny_gpt, settings):
    planner = planner_for(tiny_gpt(layers=2, hidden=256, heads=4), num_layers=2)
    avals = [planner.model.traced.graph.avals[value] for value in parameters_of(planner)]
    optimizer = OptimizerFootprint(optax.scale_by_factored_rms())
    chosen = replace(settings(8, 1, zero=2), optimizer=optimizer)
    sharding = planner.solve(0, 2, chosen)
    memory = memory_of(planner, sharding, 0, 2)
    state = sum(
        factored(*aval.shape)
        if aval.ndim == 2 and min(aval.shape) >= 128
        else aval_bytes(aval) / 8 + 8
        for aval in avals
    )
    weights = sum(map(aval_bytes, avals))
    accumulators = sum(
        aval_bytes(planner.model.traced.graph.avals[value])
        / num_shards(sharding.picks["accumulator", layer.cls.name, slot], (8, 1))
        for value, (layer, slot) in parameters_of(planner).items()
    )
    assert memory.state_bytes == pytest.approx(weights + state + accumulators)


def test_an_integer_has_no_optimizer_state():
    assert ADAMW.kept(jax.ShapeDtypeStruct((8,), jnp.int32)) == KeptState(0, 0)
