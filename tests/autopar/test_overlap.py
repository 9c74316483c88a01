"""When plans synchronise gradients during the last backward pass, and what they promise for it."""

from dataclasses import replace

import pytest

from launcher.autopar.answers.compare import compare, priced
from launcher.autopar.inter_op.search import search
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.plans.summary import summarize
from launcher.autopar.predictions.predict import predict
from launcher.autopar.predictions.step_parts import submesh_parts
from launcher.autopar.programs.program import Wiring
from launcher.autopar.realized.realize import check_overlap
from launcher.errors import PlanError

BATCH = 32


def options_of(**fields) -> PlanOptions:
    return PlanOptions(**{"global_batch": BATCH, "mode": "data", "num_microbatches": 4, **fields})


def planned(model, machine, **fields):
    return find_plan(model, machine, options_of(**fields), lambda text: None)


@pytest.fixture(scope="module")
def overlapping(cpu8):
    """Devices that compute and communicate at once, and whose programs start in no time."""
    device = replace(
        cpu8.device, overlaps_collectives=True, program_launch_s=0.0, array_launch_s=0.0,
        concurrency=((1.0, 1.0),),
    )  # fmt: skip
    return replace(cpu8, device=device)


def with_overlap(plan, *stages: int):
    changed = (replace(s, overlap=k in stages) for k, s in enumerate(plan.stages))
    return replace(plan, stages=tuple(changed))


@pytest.mark.parametrize("fields", [{}, {"num_microbatches": 2}, {"mode": "zero"}])
def test_the_planner_overlaps_where_that_saves_and_promises_what_is_left(
    tiny_gpt, overlapping, fields
):
    model = tiny_gpt(layers=3)
    found = planned(model, overlapping, **fields)
    (stage,) = found.plan.stages
    assert stage.overlap
    plain = predict(with_overlap(found.plan), model, overlapping)
    saved_s = plain.step_s - found.plan.predicted.step_s
    assert saved_s >= 0.01 * plain.step_s
    assert found.plan.predicted.stage_sync_s[0] == pytest.approx(plain.stage_sync_s[0] - saved_s)
    again = adopt_plan(from_json(to_json(found.plan)), model, overlapping, options_of(**fields))
    assert again.plan.predicted == found.plan.predicted
    assert "gradients of stage 0: synchronised during the last backward pass" in " ".join(
        summarize(found.plan, overlapping, model.abstract_params).split()
    )


@pytest.mark.parametrize("fields", [{}, {"mode": "manual", "dp": 4, "pp": 2}])
def test_the_search_counts_what_the_finished_plan_promises(tiny_gpt, overlapping, fields):
    model = tiny_gpt(layers=3, tied_embeddings=False)
    found = search(model, overlapping, options_of(**fields), lambda text: None).candidates[0]
    first, *others = found.arrangement.stages
    assert first.option.tag.overlap
    assert not any(choice.option.tag.overlap for choice in others)
    finished = planned(model, overlapping, **fields).plan
    assert [stage.overlap for stage in finished.stages] == [True] + [False] * len(others)
    # Norms are sent, and what crosses a cut lies in other shards.
    assert finished.predicted.step_s == pytest.approx(
        found.step_s, rel=1e-9 if not others else 0.02
    )


def test_the_parts_of_an_overlapping_step_add_up_to_it(tiny_gpt, overlapping):
    found = planned(tiny_gpt(layers=3), overlapping)
    (parts,) = submesh_parts(found.realized, found.outlook.timeline)
    assert parts.step_s == pytest.approx(found.plan.predicted.step_s)
    assert parts.synchronization_s == pytest.approx(found.plan.predicted.stage_sync_s[0])


def test_emulated_devices_do_not_overlap(tiny_gpt, cpu8):
    model = tiny_gpt(layers=3)
    found = planned(model, cpu8)
    assert not found.plan.stages[0].overlap
    # Told to, they synchronise in the same time, and start a program less.
    told = predict(with_overlap(found.plan, 0), model, cpu8)
    sharding = found.realized.stages[0].sharding
    assert told.stage_sync_s[0] == pytest.approx(sharding.seconds.synchronize)


def test_less_than_a_hundredth_is_not_worth_compiling_longer(tiny_gpt, overlapping):
    links = {
        name: replace(getattr(overlapping, name), bytes_per_s=1e13, latency_s=1e-12)
        for name in ("intra_host", "inter_host")
    }
    assert not planned(tiny_gpt(layers=3), replace(overlapping, **links)).plan.stages[0].overlap


def test_split_backward_passes_are_not_offered_it(tiny_gpt, overlapping):
    given = {"mode": "manual", "dp": 4, "pp": 2, "schedule": "zb_h1"}
    plan = planned(tiny_gpt(layers=3), overlapping, **given).plan
    assert not any(stage.overlap for stage in plan.stages)
    told = predict(with_overlap(plan, 0), tiny_gpt(layers=3), overlapping)
    assert told.stage_sync_s[0] < plan.predicted.stage_sync_s[0]


def test_a_comparison_names_the_overlap(tiny_gpt, overlapping):
    model = tiny_gpt(layers=3)
    found = planned(model, overlapping)
    other = adopt_plan(with_overlap(found.plan), model, overlapping, options_of())
    comparison = compare(
        priced("this plan", found), priced("that one", other), model.abstract_params
    )
    assert [(d.what, d.one, d.other) for d in comparison.differences] == [("overlap", "yes", "no")]
    gaps_s = {name: gap_s for name, gap_s in comparison.gaps_s.items() if abs(gap_s) > 1e-9}
    assert set(gaps_s) == {"synchronization"}


def test_gradients_that_come_too_late_are_the_plans_fault():
    wiring = Wiring.chain(3, tied=((2, 0),), with_norm=True)
    check_overlap(replace(wiring, overlapping=frozenset({0, 1})))
    with pytest.raises(
        PlanError, match=r"stages\[2\]\.overlap=true .* stage 0, which .*: write false"
    ):
        check_overlap(replace(wiring, overlapping=frozenset({2})))
