"""What a search tries, and that searching more finds no worse."""

from dataclasses import replace

import optax
import pytest

from launcher import models
from launcher.autopar.graphs.trace import Role
from launcher.autopar.inter_op import search as search_module
from launcher.autopar.inter_op.candidate import Tried
from launcher.autopar.inter_op.search import search
from launcher.autopar.inter_op.space import PlanOptions, make_space
from launcher.autopar.inter_op.stage_costs import Choices
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.realized.realize import layered_model
from launcher.config import MoeConfig
from launcher.errors import ConfigError, InfeasiblePlanError

BATCH = 32


def options(mode, **fields):
    return PlanOptions(mode=mode, **{"global_batch": BATCH, **fields})


def run(model, cluster, mode, **fields):
    return search(model, cluster, options(mode, **fields), lambda text: None)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


def test_what_cannot_be_is_refused_before_anything_is_planned(gpt, cpu8):
    with pytest.raises(
        ConfigError, match=r"parallel\.tp=3 cannot share out the 2 hosts x 4 devices"
    ):
        run(gpt, cpu8, "auto", tp=3)
    with pytest.raises(ConfigError, match=r"parallel\.num_microbatches=8.* axis of 8 devices"):
        run(gpt, cpu8, "data", num_microbatches=8)
    with pytest.raises(ConfigError, match=r"parallel\.ep=2 splits experts, and the model has none"):
        run(gpt, cpu8, "auto", ep=2)


def test_a_model_that_does_not_fit_is_told_in_bytes_with_the_cures_of_its_mode(gpt, cpu8):
    small = replace(cpu8, device=replace(cpu8.device, memory_bytes=2**20))
    with pytest.raises(
        InfeasiblePlanError, match=r"[\d,]+ bytes too many .*parallel=zero"
    ) as caught:
        run(gpt, small, "data", num_microbatches=4)
    assert "parallel.zero=3" not in str(caught.value)


def test_microbatches_are_tried_from_small_to_large_and_next_to_the_best(gpt, cpu8):
    tried = []
    found = search(gpt, cpu8, options("data"), tried.append)
    counts = [int(text.split()[0]) for text in tried]
    assert counts[0] == BATCH // 8  # a sample for each of the eight devices
    best = found.candidates[0].num_microbatches
    assert {c for c in (2 * best, best // 2) if c and BATCH % c == 0} <= set(counts)
    totals = [candidate.step_s for candidate in found.candidates]
    assert totals == sorted(totals)
    assert found.ilp_solved >= 1
    assert found.priced >= len(found.candidates)


def test_stages_are_placed_side_by_side(gpt, cpu8):
    (candidate,) = run(gpt, cpu8, "manual", tp=2, pp=4, num_microbatches=4).candidates
    placement = candidate.arrangement.placement
    used = [(h, d) for hosts, devices in placement for h in hosts for d in devices]
    assert len(used) == len(set(used)) == 8


def test_virtual_stages_take_the_submeshes_in_turn(gpt, cpu8):
    (candidate,) = run(
        gpt, cpu8, "manual", pp=2, schedule="interleaved", virtual_stages=2, num_microbatches=4
    ).candidates
    placement = candidate.arrangement.placement
    assert placement == (((0,), (0, 1, 2, 3)), ((1,), (0, 1, 2, 3))) * 2
    assert [choice.first for choice in candidate.arrangement.stages] == [0, 2, 3, 4]


def test_groups_of_microbatches_come_out_even(gpt, cpu8):
    fields = {"schedule": "interleaved", "pp": 4}
    for mode in ("manual", "auto"):
        with pytest.raises(
            ConfigError, match=r"num_microbatches=2 is no multiple of the 4 submeshes .*give a mul"
        ):
            run(gpt, cpu8, mode, num_microbatches=2, **fields)
        with pytest.raises(
            ConfigError,
            match=r"train\.global_batch=30 has no number .*parallel\.pp=4 .*global_batch=32, or",
        ):
            run(gpt, cpu8, mode, global_batch=30, **fields)
    counts = {c.num_microbatches for c in run(gpt, cpu8, "manual", **fields).candidates}
    assert counts
    assert all(number % 4 == 0 for number in counts)


def grid():
    """All degrees of eight devices in rectangles, and ZeRO where there is a data axis."""
    for tp in (1, 2, 4):
        for pp in (1, 2, 4):  # eight stages are of other layers
            if tp * pp <= 8:
                dp = 8 // (tp * pp)
                for zero in (0, 2) if dp > 1 else (0,):
                    yield {"dp": dp, "tp": tp, "pp": pp, "zero": zero}


MIXED = (
    {"dp": 2, "tp": 2, "pp": 2, "zero": 2},
    {"dp": 4, "tp": 1, "pp": 2, "zero": 0},
    {"dp": 1, "tp": 4, "pp": 2, "zero": 0},
)


def check_against_hand(gpt, cpu8, num_microbatches, grid):
    """In the objective of the search; the simulator's view is in test_make_plan."""
    best, *_ = run(gpt, cpu8, "auto", num_microbatches=num_microbatches).candidates
    for degrees in grid:
        if BATCH // num_microbatches % degrees["dp"] == 0:
            (manual,) = run(
                gpt, cpu8, "manual", num_microbatches=num_microbatches, **degrees
            ).candidates
            assert best.step_s <= manual.step_s * (1 + 1e-9), degrees


def test_auto_is_no_slower_than_mixed_plans_by_hand(gpt, cpu8):
    check_against_hand(gpt, cpu8, 4, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_auto_is_no_slower_than_any_plan_by_hand(gpt, cpu8, num_microbatches):
    check_against_hand(gpt, cpu8, num_microbatches, grid())


def test_forced_experts_are_split_over_the_data_axis_of_every_stage(cpu8):
    model = models.build(MoeConfig(size="tiny", dtype="fp32", layers=2, hidden=32))
    candidate, *_ = run(model, cpu8, "auto", ep=4, num_microbatches=4).candidates
    specs = {}
    for choice in candidate.arrangement.stages:
        assert choice.option.tag.mesh.shape[0] == 4
        layers = candidate.planner.model.layers[choice.first : choice.last]
        for layer, slot, path in parameters(layers, candidate.planner.model.traced):
            if path.endswith(("experts/up", "experts/down")):
                specs[path] = choice.option.tag.sharding.picks["slot", layer.cls.name, slot]
    assert specs
    assert {spec[0] for spec in specs.values()} == {0}, "dim 0 is that of the experts"


def parameters(layers, traced):
    for layer in layers:
        for slot, value in enumerate(layer.inputs):
            if layer.cls.slots[slot].role is Role.PARAM:
                yield layer, slot, traced.inputs[value].path


def test_submeshes_of_a_part_of_a_space_have_their_numbers_in_all_of_it(cpu8):
    whole = make_space(options("auto"), cpu8)
    part = whole.only({1, 3})
    assert [whole.submeshes[number] for number in part.numbers_in(whole)] == list(part.submeshes)
    assert set(part.like({0}, 2).submeshes) <= set(part.submeshes)
    sizes = whole.sizes
    assert whole.like({0}, 2).sizes == tuple(size for size in sizes if size <= 2 * sizes[0])
    assert whole.describe_limits(whole) == ""
    assert "submeshes of" in part.describe_limits(whole)


def test_the_stages_of_every_candidate_have_the_submesh_that_they_say(gpt, cpu8):
    found = run(gpt, cpu8, "auto")
    for candidate in found.candidates:
        for choice in candidate.arrangement.stages:
            mesh = choice.option.tag.mesh
            hosts, devices = found.space.submeshes[choice.submesh]
            assert mesh.shape[0] * mesh.shape[1] == hosts * devices


def test_what_saves_memory_is_tried_where_nothing_without_it_was_worth_it(monkeypatch, gpt, cpu8):
    """An option that is left out as too slow must not hide that others did not fit."""
    asked = []

    def try_choices(*args):
        asked.append(args[-1])
        return Tried(
            num_solved=0, candidates=(), cuts=(1, 1), bounds=(), num_candidates=0, has_failures=True
        )

    some, everything = Choices(zero=(0, 2)), make_space(options("auto"), cpu8).choices
    monkeypatch.setattr(search_module, "_try_choices", try_choices)
    monkeypatch.setattr(search_module, "worthwhile", lambda *args: some)
    planner = IntraOpPlanner(layered_model(gpt, 8))
    space = make_space(options("auto"), cpu8)
    search_module._try(cpu8, options("auto"), planner, 4, 1.0, ({},), space)
    assert asked == [(some,), (everything,)]


def test_less_memory_is_slower_and_recomputed_for(gpt, cpu8):
    plans = []
    for mebibytes in (2048, 3, 2):
        device = replace(cpu8.device, memory_bytes=mebibytes * 2**20)
        (found,) = run(
            gpt, replace(cpu8, device=device), "auto", num_microbatches=8, schedule="1f1b"
        ).candidates
        plans.append(found)
        stages = found.arrangement.stages
        for index, choice in enumerate(stages):
            held = min(8, len(stages) - index) * choice.option.stash_bytes
            assert choice.option.fixed_bytes + held <= device.memory_bytes
    roomy, *tight = (plan.step_s for plan in plans)
    assert roomy < tight[0] < tight[1]
    recomputed = [{c.option.tag.recompute for c in plan.arrangement.stages} for plan in plans]
    assert recomputed[0] == {"none"}
    assert recomputed[-1] == {"layer"}


def test_the_optimizer_counts(gpt, cpu8):
    """Without state, what Adam's moments keep from fitting fits."""

    def needed(optimizer):
        (found,) = run(gpt, cpu8, "data", num_microbatches=2, optimizer=optimizer).candidates
        return found.arrangement.stages[0].option.fixed_bytes

    parameters = 4 * gpt.num_parameters
    assert needed(optax.adamw(1e-3)) - needed(optax.sgd(0.1)) == pytest.approx(
        2 * parameters, rel=1e-3
    )
