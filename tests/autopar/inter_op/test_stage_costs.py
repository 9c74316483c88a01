"""Prices of ranges of layers on submeshes: counted from one solution, against solving each range."""

from dataclasses import replace

import pytest

from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.layers import build_layers
from launcher.autopar.graphs.optimizer_state import ADAMW
from launcher.autopar.graphs.trace import trace_model
from launcher.autopar.inter_op.stage_costs import Choices, StageCosts
from launcher.autopar.inter_op.stage_table import shared_bytes
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.memory import class_memories, stage_memory
from launcher.errors import InfeasiblePlanError

BATCH, MICROBATCHES = 8, 4
SUBMESHES = ((1, 1), (1, 2), (1, 4), (2, 4))
PLAIN = Choices(zero=(0,), recompute=("none",), memory_weights=(0.0,))
RANGES = [(0, 12), (0, 7), (1, 9), (2, 6), (4, 10), (6, 12)]  # of the 12 layers


@pytest.fixture(scope="module")
def planner(tiny_gpt):
    """Two thin layers for every block, and embeddings that are not tied."""
    traced = trace_model(tiny_gpt(layers=6, tied_embeddings=False), BATCH)
    return IntraOpPlanner(build_layers(traced, cluster(traced, 12)))


def costs_of(planner, cpu8, choices=PLAIN, **fields):
    arguments = {
        "num_microbatches": MICROBATCHES,
        "choices": choices,
        "optimizer": ADAMW,
        "microbatch_size": BATCH,
    }
    return StageCosts(planner, cpu8, SUBMESHES, **arguments | fields)


def options_of(costs, first, last):
    return [option for k in range(len(SUBMESHES)) for option in costs.options(first, last, k)]


@pytest.fixture(scope="module")
def costs(planner, cpu8):
    return costs_of(planner, cpu8)


def objective(option):
    return option.seconds + option.once_s / MICROBATCHES


def pinned(planner, ends, sharding):
    """The same picks in a range, with what only the range has."""
    pins = {key: [pick] for key, pick in sharding.picks.items()}
    return planner.solve(*ends, sharding.settings, pins=pins)


@pytest.mark.parametrize("ends", RANGES)
def test_counting_is_repricing_the_same_picks(planner, costs, ends):
    """All but what leaves the stage, which only this stage has."""
    for option in options_of(costs, *ends):
        sharding = option.tag.sharding
        priced = pinned(planner, ends, sharding)
        again = planner.reprice(*ends, sharding.settings, priced.picks)
        assert again.microbatch_s == priced.microbatch_s
        assert objective(option) <= again.microbatch_s * (1 + 1e-9)
        assert objective(option) == pytest.approx(again.microbatch_s, rel=5e-3)
        assert option.once_s == pytest.approx(again.once_s, rel=1e-9)


@pytest.mark.parametrize("ends", RANGES)
def test_strategies_of_the_whole_model_are_nearly_the_best_of_a_range(planner, costs, ends):
    for option in options_of(costs, *ends):
        direct = planner.solve(*ends, option.tag.sharding.settings).microbatch_s
        assert direct * 0.99 <= objective(option) <= direct * 1.01


def test_the_whole_model_is_priced_as_it_is_solved(planner, costs):
    for option in options_of(costs, 0, 12):
        direct = planner.solve(0, 12, option.tag.sharding.settings)
        assert objective(option) == pytest.approx(direct.microbatch_s, rel=1e-9)


def test_one_problem_is_solved_for_each_mesh_and_price_of_memory(planner, cpu8):
    fresh = IntraOpPlanner(planner.model)
    costs = costs_of(fresh, cpu8, replace(PLAIN, zero=(0, 2), recompute=("none", "layer", "full")))
    options_of(costs, 0, 12)
    solved = fresh.num_solved
    # 1x1; 2x1, 1x2; 4x1, 2x2, 1x4; 8x1, 4x2, 2x4
    assert solved == 1 + 2 + 3 + 3
    for ends in RANGES:
        options_of(costs, *ends)
    assert fresh.num_solved == solved


def test_a_price_on_memory_gives_options_that_take_less(planner, cpu8):
    costs = costs_of(planner, cpu8, replace(PLAIN, memory_weights=(0.0, 1e4)))
    (plain, frugal) = (
        option for option in costs.options(0, 12, 2) if option.tag.mesh.shape == (1, 4)
    )
    assert frugal.fixed_bytes < plain.fixed_bytes
    assert objective(frugal) >= objective(plain)


@pytest.mark.parametrize("recompute", ["none", "layer", "full"])
def test_an_option_holds_what_the_memory_model_counts(planner, cpu8, recompute):
    costs = costs_of(planner, cpu8, replace(PLAIN, recompute=(recompute,), zero=(2,)))
    for ends in RANGES[:4]:
        for option in options_of(costs, *ends):
            wiring = planner.wiring(*ends)
            sharding = option.tag.sharding
            memory = stage_memory(class_memories(planner, sharding, wiring), wiring, recompute)
            for in_flight in range(1, 5):
                needed = shared_bytes([option], [in_flight], [0])
                assert memory.peak_bytes(in_flight) == pytest.approx(needed, rel=1e-12)


def test_recomputation_runs_the_forward_pass_again_and_keeps_less(planner, cpu8):
    """All of it by stages; by layers without what their backward pass does not need."""
    costs = costs_of(planner, cpu8, replace(PLAIN, recompute=("none", "layer", "full")))
    options = {option.tag.recompute: option for option in costs.options(2, 8, 0)}
    none, layer, full = (options[recompute] for recompute in ("none", "layer", "full"))
    assert full.seconds - none.seconds == pytest.approx(none.forward_s)
    sharding = none.tag.sharding
    seconds = sharding.for_counts(planner.wiring(2, 8).counts, sharding.settings).seconds
    again_s = seconds.recomputed("layer")
    assert layer.seconds - none.seconds == pytest.approx(again_s)
    assert 0.5 < again_s / none.forward_s < 0.95
    assert full.stash_bytes < layer.stash_bytes < none.stash_bytes / 10
    assert layer.once_s == none.once_s


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_that_are_scattered_take_a_share_of_the_memory(planner, cpu8, zero):
    """And are sent with every microbatch, not once a step."""
    choices = replace(PLAIN, zero=(zero,), data=4, tensor=1)
    options = {
        option.tag.scatter: option
        for option in costs_of(planner, cpu8, choices).options(2, 8, 2)
        if not option.tag.overlap
    }
    whole, shards = options[False], options[True]
    sums = [
        param.accumulator_bytes
        for cls in class_memories(planner, whole.tag.sharding, planner.wiring(2, 8)).values()
        for param in cls.params.values()
    ]
    assert sum(sums) > 0
    assert shards.fixed_bytes < whole.fixed_bytes
    assert shards.once_s < whole.once_s
    assert shards.seconds > whole.seconds
    reduced = planner.reduce_s(2, 8, shards.tag.sharding).values()
    assert sum(reduced) == pytest.approx(0.0, abs=1e-9)


def test_a_range_that_borrows_a_parameter_pays_for_its_way(tiny_gpt, cpu8):
    """The tied embedding's gradient goes to the first stage, and the new value comes back."""
    traced = trace_model(tiny_gpt(layers=4), BATCH)
    planner = IntraOpPlanner(build_layers(traced, cluster(traced, 4)))
    costs, link = costs_of(planner, cpu8), cpu8.inter_host
    way_s = link.latency_s + 4 * 256 * 64 / link.bytes_per_s  # vocabulary, hidden
    for ends, ways in (((0, 4), 0), ((0, 2), 0), ((1, 3), 0), ((2, 4), 2)):
        for option in options_of(costs, *ends):
            whole = option.tag.sharding
            own = planner.reprice(*ends, whole.settings, pinned(planner, ends, whole).picks)
            assert option.once_s - own.once_s == pytest.approx(ways * way_s)


def meshes(costs, submesh):
    return {(o.tag.mesh.shape, o.tag.zero) for o in costs.options(0, 12, submesh)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, {((8, 1), 0), ((4, 2), 0)}),  # (2, 4) is slower and keeps no less
        ({"tensor": 2}, {((4, 2), 0)}),
        ({"data": 8}, {((8, 1), 0)}),
        ({"data": 4, "tensor": 4}, set()),
        ({"tensor": 3}, set()),
        ({"zero": (1,), "data": 8}, {((8, 1), 1)}),
        # ZeRO-1 is no faster than ZeRO-2, and keeps more
        ({"zero": (1, 2), "data": 8}, {((8, 1), 2)}),
    ],
)
def test_forced_degrees_leave_the_meshes_that_have_them(planner, cpu8, choices, expected):
    assert meshes(costs_of(planner, cpu8, replace(PLAIN, **choices)), 3) == expected


def test_a_data_axis_divides_the_microbatch(tiny_gpt, cpu8):
    traced = trace_model(tiny_gpt(layers=2), 2)
    planner = IntraOpPlanner(build_layers(traced, cluster(traced, 2)))
    costs = costs_of(planner, cpu8, microbatch_size=2)
    assert {option.tag.mesh.shape for option in costs.options(0, 2, 3)} == {(2, 4)}


def test_zero_needs_a_data_axis_unless_it_is_forced(planner, cpu8):
    some = costs_of(planner, cpu8, replace(PLAIN, zero=(0, 2)))
    assert meshes(some, 0) == {((1, 1), 0)}
    forced = costs_of(planner, cpu8, replace(PLAIN, zero=(2,)))
    assert meshes(forced, 0) == {((1, 1), 2)}


def test_a_node_without_choices_is_an_error_that_names_it(planner, costs, monkeypatch):
    settings = options_of(costs, 0, 7)[-1].tag.sharding.settings
    problem = planner.problem(0, 7, settings)
    problem.choices["op", "layer0", 0] = ()
    monkeypatch.setattr(planner, "problem", lambda *_: problem)
    with pytest.raises(InfeasiblePlanError, match=r"leaves no sharding for .*op.*parallel\.dp"):
        planner.solve(0, 7, settings)
