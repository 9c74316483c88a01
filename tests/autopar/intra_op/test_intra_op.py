"""The solver's price against a slow walk over the ops, and its plans against what everybody knows.

Known answers: a large batch is split and weights are not (data parallelism); a tiny batch with wide weights
splits columns and then rows (Megatron), four all-reduces per transformer block.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.layers import LayeredModel, build_layers
from launcher.autopar.graphs.trace import Role, trace_model
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.sharding.param_costs import optimizer_spec
from launcher.autopar.sharding.reshard import Kind
from launcher.autopar.sharding.restrictions import Restrictions
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED
from tests.support.stage_walk import Walk

R, P = REPLICATED, PARTIAL


def mesh_of(*shape, alpha=1e-6, beta=1e-11):
    return LogicalMesh(shape=shape, alpha=(3 * alpha, alpha), beta=(4 * beta, beta))


@pytest.fixture(scope="module")
def settings(device):
    def made(mesh, **fields):
        held = frozenset({0}) if min(mesh.shape) > 1 else frozenset()
        return StageSettings(
            mesh=mesh,
            compute=ComputeModel(device),
            **{"restrictions": Restrictions(held), "num_microbatches": 8, **fields},
        )

    return made


def planner_for(model, microbatch_size, num_layers=None):
    traced = trace_model(model, microbatch_size)
    return IntraOpPlanner(build_layers(traced, cluster(traced, num_layers)))


def collectives(planner, sharding, phase):
    walk = Walk(planner, sharding)
    walk.price()
    return [step for part, steps in walk.steps.items() if part.startswith(phase) for step in steps]


PARTS = (
    *("forward", "shared_input", "shared_weight"),
    *("backward_input", "backward_weight", "synchronize", "update"),
)
MESHES = [(4, 1), (1, 4), (2, 2), (2, 4)]


def assert_price_is_that_of_a_walk(planner, chosen):
    sharding = planner.solve(0, 1, chosen)
    walked, found = Walk(planner, sharding).price(), sharding.seconds
    for part in PARTS:
        ours, theirs = (vars_of(seconds)[part] for seconds in (found, walked))
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15), part
    shared = walked.shared_input + walked.shared_weight
    again = walked.forward - shared if chosen.recompute == "full" else 0.0
    once = (walked.synchronize + walked.update) / chosen.num_microbatches
    total = walked.forward + walked.backward + again + once
    assert sharding.microbatch_s == pytest.approx(total, rel=1e-9)
    pairwise, keys = planner.problem(0, 1, chosen).pairwise()
    choices = planner.problem(0, 1, chosen).choices
    picked = [choices[key].index(sharding.picks[key]) for key in keys]
    # The solver counts what both passes need twice: whether they do depends on two strategies and a spec.
    counted = total + shared if chosen.recompute == "full" else total
    assert pairwise.cost(picked) == pytest.approx(counted, rel=1e-9)
    assert sharding.gap_fraction <= 1e-9


def vars_of(seconds):
    return {name: getattr(seconds, name) for name in seconds.__dataclass_fields__}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", MESHES)
def test_the_price_of_a_perceptron_is_that_of_a_walk(perceptron, shape, zero, settings):
    planner = planner_for(perceptron(hidden=16, inner=32, blocks=2), 8, num_layers=1)
    assert_price_is_that_of_a_walk(planner, settings(mesh_of(*shape), zero=zero))


@pytest.mark.parametrize("shape", MESHES)
def test_the_price_of_a_gpt_is_that_of_a_walk(tiny_gpt, shape, settings):
    planner = planner_for(tiny_gpt(layers=1, hidden=32, heads=4, dropout=0.1), 4, num_layers=1)
    for chosen in (settings(mesh_of(*shape)), settings(mesh_of(*shape), recompute="full")):
        assert_price_is_that_of_a_walk(planner, chosen)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_no_single_node_can_be_bettered(tiny_gpt, shape, settings):
    planner = planner_for(tiny_gpt(layers=3), 4)
    problem = planner.problem(0, 3, settings(mesh_of(*shape)))
    sharding = planner.solve(0, 3, problem.settings)
    pairwise, keys = problem.pairwise()
    best = [problem.choices[key].index(sharding.picks[key]) for key in keys]
    local = [costs.copy() for costs in pairwise.node_costs]  # of each node, the others kept
    for (i, j), matrix in pairwise.edge_costs.items():
        local[i] += matrix[:, best[j]]
        local[j] += matrix[best[i], :]
    for costs, pick in zip(local, best, strict=True):
        assert costs[pick] <= costs.min() + 1e-15


def specs(planner, sharding, kind="slot"):
    """Spec by path."""
    (layer,) = planner.model.layers
    return {
        planner.model.traced.inputs[value].path: sharding.picks[kind, layer.cls.name, slot]
        for slot, value in enumerate(layer.inputs)
        if (kind, layer.cls.name, slot) in sharding.picks
    }


def test_a_large_batch_is_split_and_weights_are_synchronised_once(perceptron, settings):
    planner = planner_for(perceptron(hidden=64, inner=256), 4096, num_layers=1)
    chosen = settings(mesh_of(4, 1, alpha=1e-7, beta=2.5e-10))
    sharding = planner.solve(0, 1, chosen)
    homes = specs(planner, sharding)
    assert {homes["0/up"], homes["0/down"]} == {(R, R)}
    assert set(specs(planner, sharding, "accumulator").values()) == {(P, R)}
    batch_splits = {
        sharding.picks["op", "layer0", index].operand_spec(0)
        for index, op in enumerate(planner.model.classes[0].joint.ops)
        if str(op.primitive) == "dot_general"
    }
    assert batch_splits == {(0, R)}
    (loss,) = collectives(planner, sharding, "forward")
    assert (loss.kind, loss.num_bytes) == (Kind.ALL_REDUCE, 4)
    assert collectives(planner, sharding, "backward") == []
    weights = 4 * 64 * 256
    assert sharding.seconds.synchronize == pytest.approx(2 * chosen.mesh.all_reduce(0, weights))
    assert sharding.seconds.update == pytest.approx(7 * 2 * weights / 1e12)


def test_a_tiny_batch_splits_columns_and_then_rows_with_one_all_reduce(perceptron, settings):
    planner = planner_for(perceptron(hidden=1024, inner=4096), 8, num_layers=1)
    sharding = planner.solve(0, 1, settings(mesh_of(1, 4)))
    homes = specs(planner, sharding)
    assert (homes["0/up"], homes["0/down"]) == ((R, 1), (R, 0))
    assert specs(planner, sharding, "accumulator") == {"0/up": (R, 1), "0/down": (R, 0)}
    (step,) = collectives(planner, sharding, "forward")
    assert (step.kind, step.num_bytes) == (Kind.ALL_REDUCE, 4 * 8 * 1024)
    assert collectives(planner, sharding, "backward") == []
    assert sharding.seconds.synchronize == 0.0


def test_a_transformer_block_on_a_tensor_axis_is_megatrons(tiny_gpt, settings):
    """Two all-reduces forward, two backward; or reduce-scatters and all-gathers of the same bytes."""
    planner = planner_for(tiny_gpt(layers=4, hidden=1024, heads=16, seq_len=16), 1, num_layers=4)
    chosen = settings(mesh_of(1, 4))
    sharding = planner.solve(0, 4, chosen)
    block = planner.model.layers[1]
    homes = {
        planner.model.traced.inputs[value].path: sharding.picks["slot", block.cls.name, slot]
        for slot, value in enumerate(block.inputs)
        if block.cls.slots[slot].role is Role.PARAM
    }
    assert homes["blocks/1/mlp/up/kernel"] == (R, 1)
    assert homes["blocks/1/mlp/down/kernel"] == (R, 0)
    assert homes["blocks/1/attention/qkv/kernel"][1] == 1
    assert homes["blocks/1/attention/out/kernel"] == (R, 0)
    bytes_only = replace(
        chosen,
        mesh=replace(chosen.mesh, alpha=(0.0, 0.0), beta=(0.0, 1.0)),
        compute=ComputeModel(
            replace(
                chosen.compute.device, peak_flops_per_s={"fp32": np.inf}, memory_bytes_per_s=np.inf
            )
        ),
    )
    costs = planner.reprice(0, 4, bytes_only, sharding.picks).group_seconds
    name = block.cls.name
    sent = costs[name] + next(costs[g] for g in costs if g[0] == name and g[2] == name)
    activation = 4 * 16 * 1024
    all_reduce = bytes_only.mesh.all_reduce(1, activation)
    assert sent.forward + sent.backward == pytest.approx(4 * all_reduce, rel=0.02)


def test_the_solver_is_no_dearer_than_the_plans_of_people(tiny_gpt, settings):
    """Data parallelism and Megatron's splits are both among the plans it may choose."""
    planner = planner_for(tiny_gpt(layers=3), 8)
    for beta in (1e-12, 1e-10, 1e-8):
        chosen = settings(mesh_of(1, 4, beta=beta))
        free = planner.solve(0, 3, chosen).microbatch_s
        for pins in (weights_whole(planner), megatron(planner)):
            assert free <= planner.solve(0, 3, chosen, pins=pins).microbatch_s * (1 + 1e-9)


def param_slots(planner):
    for layer in planner.model.layers:
        for slot, value in enumerate(layer.inputs):
            if layer.cls.slots[slot].role is Role.PARAM:
                yield planner.model.traced.inputs[value].path, ("slot", layer.cls.name, slot)


def weights_whole(planner):
    return {key: [(R, R)] for _, key in param_slots(planner)}


def megatron(planner):
    split = {"qkv/kernel": (R, 1), "up/kernel": (R, 1), "out/kernel": (R, 0), "down/kernel": (R, 0)}
    return {
        key: [spec]
        for (path, key), (ending, spec) in itertools.product(param_slots(planner), split.items())
        if path.endswith(ending)
    }


def test_pins_are_kept_and_cost_no_less(tiny_gpt, settings):
    planner = planner_for(tiny_gpt(layers=3), 8)
    chosen = settings(mesh_of(2, 2))
    free, pins = planner.solve(0, 3, chosen), megatron(planner)
    held = planner.solve(0, 3, chosen, pins=pins)
    assert pins
    assert all(held.picks[key] in allowed for key, allowed in pins.items())
    assert held.microbatch_s >= free.microbatch_s - 1e-15
    assert held.microbatch_s < 1.0, "the penalty of a forbidden choice is no part of the price"


def test_a_stage_whose_every_node_is_pinned_is_priced_and_not_solved(tiny_gpt, settings):
    planner = planner_for(tiny_gpt(layers=3), 8)
    chosen = settings(mesh_of(2, 2))
    first = planner.solve(0, 3, chosen)
    assert planner.num_solved == 1
    again = planner.solve(0, 3, chosen, pins={key: [pick] for key, pick in first.picks.items()})
    assert planner.num_solved == 1
    assert again.seconds == first.seconds


def unfolded(layered):
    """The same layers, each of a class of its own."""
    layers = tuple(
        replace(layer, cls=replace(layer.cls, name=f"{layer.cls.name}.{i}"))
        for i, layer in enumerate(layered.layers)
    )
    classes = tuple(layer.cls for layer in layers)
    return LayeredModel(layered.traced, layers, classes, layered.random_ops)


@pytest.mark.parametrize(
    ("shape", "alpha"), [((2, 4), 1e-6), ((2, 4), 1e-5), ((1, 4), 1e-6), ((4, 2), 1e-7)]
)
def test_folding_equal_layers_loses_nothing(tiny_gpt, shape, alpha, settings):
    folded = planner_for(tiny_gpt(layers=6), 8)
    separate = IntraOpPlanner(unfolded(folded.model))
    chosen = settings(mesh_of(*shape, alpha=alpha))
    last = len(folded.model.layers)
    one, other = (planner.solve(0, last, chosen) for planner in (folded, separate))
    picks = {
        (kind, b.cls.name, index): pick
        for a, b in zip(folded.model.layers, separate.model.layers, strict=True)
        for (kind, name, index), pick in one.picks.items()
        if name == a.cls.name
    }
    keys = separate.problem(0, last, chosen).choices
    forced = separate.reprice(0, last, chosen, {key: picks[key] for key in keys})
    assert forced.microbatch_s == pytest.approx(one.microbatch_s, rel=1e-9)
    assert other.microbatch_s == pytest.approx(one.microbatch_s, rel=1e-3)
    assert other.microbatch_s <= one.microbatch_s * (1 + 1e-9)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_puts_state_on_the_data_axis(perceptron, zero, settings):
    planner = planner_for(perceptron(hidden=16, inner=32), 8, num_layers=1)
    sharding = planner.solve(0, 1, settings(mesh_of(4, 1), zero=zero))
    for path, home in specs(planner, sharding).items():
        if "/" not in path:
            continue
        shape = {"0/up": (16, 32), "0/down": (32, 16)}[path]
        state = optimizer_spec(home, shape, mesh_of(4, 1), zero)
        assert (state[0] >= 0) == (zero > 0)
        assert zero < 3 or home[0] >= 0


def test_zero_2_scatters_gradients_and_gathers_parameters(perceptron, settings):
    planner = planner_for(perceptron(hidden=64, inner=256), 4096, num_layers=1)
    mesh = mesh_of(4, 1, beta=1e-10)
    held = Restrictions(frozenset({0}))
    plain, zero_1, zero_2 = (
        planner.solve(0, 1, settings(mesh, zero=zero, restrictions=held)).seconds
        for zero in (0, 1, 2)
    )
    weights = 4 * 64 * 256
    assert zero_2.synchronize == pytest.approx(
        2 * (mesh.reduce_scatter(0, weights) + mesh.all_gather(0, weights))
    )
    assert zero_1.synchronize == pytest.approx(
        2 * (mesh.all_reduce(0, weights) + mesh.all_gather(0, weights))
    )
    assert zero_2.update == pytest.approx(plain.update / 4)


def test_a_price_on_memory_splits_more_and_is_no_part_of_the_cost(perceptron, settings):
    planner = planner_for(perceptron(hidden=64, inner=256), 4096, num_layers=1)
    chosen = settings(mesh_of(1, 4))
    dear = replace(chosen, memory_s_per_byte=1.0)
    cheap, splitting = planner.solve(0, 1, chosen), planner.solve(0, 1, dear)
    weights = [specs(planner, splitting)[path] for path in ("0/up", "0/down")]
    assert all(spec[1] >= 0 for spec in weights)
    assert cheap.microbatch_s <= splitting.microbatch_s < 1.0
    walked = Walk(planner, splitting).price()
    assert splitting.seconds.forward == pytest.approx(walked.forward)
