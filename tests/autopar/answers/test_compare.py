"""Two plans side by side: the parts explain the whole difference, and what was decided is told."""

from dataclasses import replace

import jax
import pytest

from launcher.autopar.answers.compare import (
    THIS_PLAN,
    PricedPlan,
    adopt_other,
    compare,
    comparison_text,
    part_rows,
    priced,
    verdict,
)
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.plans.plan_file import write_plan
from launcher.autopar.plans.stage_hosts import TightStage
from launcher.autopar.predictions.step_parts import StepParts
from launcher.errors import PlanError

OPTIONS = PlanOptions(mode="manual", global_batch=32, num_microbatches=4)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


@pytest.fixture(scope="module")
def found(gpt, cpu8):
    """A pipeline, and the same work on one submesh, three times."""

    def make(**fields):
        return find_plan(gpt, cpu8, replace(OPTIONS, **fields), lambda text: None)

    return {
        "deep": make(pp=4, tp=2),
        "flat": make(tp=4),
        "again": make(tp=4, recompute="layer"),
        "zero": make(tp=4, zero=3),
    }


def side(plan, name, **parts):
    """A plan whose step is made of these parts."""
    made = StepParts(**parts)
    predicted = replace(plan.predicted, step_s=made.step_s)
    tight = TightStage(0, 0.0, load_cluster("cpu8").device)
    return PricedPlan(name=name, plan=replace(plan, predicted=predicted), parts=made, tight=tight)


@pytest.mark.parametrize("pair", [("deep", "flat"), ("flat", "deep"), ("flat", "again")])
def test_the_gaps_add_up_to_the_difference(pair, found, gpt):
    one, other = (priced(name, found[name]) for name in pair)
    comparison = compare(one, other, gpt.abstract_params)
    assert sum(comparison.gaps_s.values()) == pytest.approx(
        other.step_s - one.step_s, rel=1e-9, abs=1e-12
    )
    assert list(part_rows(comparison))[-1][0] == "a step"


def test_recomputation_alone_explains_a_plan_that_recomputes(found, gpt):
    comparison = compare(priced("a", found["flat"]), priced("b", found["again"]), {})
    gap_s = comparison.other.step_s - comparison.one.step_s
    assert comparison.gaps_s["recomputation"] == pytest.approx(gap_s, rel=1e-6)
    assert " more recomputation (" in verdict(comparison)
    assert [d.what for d in comparison.differences] == ["recompute"]


def test_what_differs_is_told(found, gpt):
    comparison = compare(
        priced(THIS_PLAN, found["flat"]), priced("b.json", found["deep"]), gpt.abstract_params
    )
    told = {d.what: (d.one, d.other) for d in comparison.differences}
    assert told["stages"] == ("1", "4")
    assert told["data x tensor"] == ("2x4", "1x2")
    assert told["hosts/devices"] == ("0-1/0-3", "0/0-1, 0/2-3, 1/0-1, 1/2-3")
    assert told.keys() == {"stages", "layers of a stage", "hosts/devices", "data x tensor"}
    assert "what differs" in comparison_text(comparison)


def test_tensors_that_lie_otherwise_are_told(found, gpt):
    one, other = (priced(name, found[name]) for name in ("flat", "zero"))
    comparison = compare(one, other, gpt.abstract_params)
    assert [d.what for d in comparison.differences] == ["zero"]
    told = {d.what: (d.one, d.other) for d in comparison.tensors}
    assert told["embedding/token [256, 64]"][0] == "[-, -]"
    assert "data=2" in told["embedding/token [256, 64]"][1]
    lines = comparison_text(comparison).splitlines()
    assert "embedding/token [256, 64] lies as" in lines
    assert max(map(len, lines)) <= 100
    assert lines[-1] == f"and {len(told) - 5} more groups of tensors"


def test_tensors_of_one_name_are_told_apart_by_their_shapes(plan):
    """As in a Wide-ResNet, whose blocks grow."""
    first, second = plan.stages

    sizes = {"1/kernel": 8, "2/kernel": 8, "3/kernel": 4, "4/kernel": 4}
    shapes = {path: jax.ShapeDtypeStruct((size,), "float32") for path, size in sizes.items()}

    def lying(small):
        params = {path: small if size == 4 else (None,) for path, size in sizes.items()}
        stage = replace(first, params=params, optimizer_state={})
        stages = (stage, replace(second, params={}, optimizer_state={}))
        return replace(side(plan, "a", computation_s=1.0), plan=replace(plan, stages=stages))

    (told,) = compare(lying((None,)), lying(("tensor",)), shapes).tensors
    assert (told.what, told.one) == ("*/kernel [4]", "[-]")


def test_a_plan_is_like_itself(found, gpt):
    one = priced(THIS_PLAN, found["deep"])
    comparison = compare(one, replace(one, name="b.json"), gpt.abstract_params)
    assert verdict(comparison) == "b.json takes the same time as this plan"
    assert "the plans decide nothing differently" in comparison_text(comparison)
    assert not any(comparison.gaps_s.values())


def test_the_verdict_names_the_largest_parts_first(plan):
    one = side(plan, "this plan", computation_s=2.0, bubble_s=1.2, communication_s=1.0)
    other = side(plan, "b.json", computation_s=2.01, bubble_s=2.1, communication_s=0.7)
    assert verdict(compare(one, other, {})) == (
        "b.json is 1.15 times slower than this plan: 900 ms more bubble (2.1 s against 1.2 s), "
        "300 ms less communication (700 ms against 1 s)"
    )
    assert verdict(compare(other, one, {})).startswith(
        "this plan is 1.15 times faster than b.json: 900 ms less bubble (1.2 s against 2.1 s)"
    )


def test_a_part_that_one_plan_has_not_is_none(plan):
    one = side(plan, "this plan", computation_s=2.0)
    other = side(plan, "b.json", computation_s=2.0, recomputation_s=0.5)
    assert "500 ms more recomputation (500 ms against none)" in verdict(compare(one, other, {}))


def test_a_plan_that_does_not_fit_is_said_so(plan):
    one = side(plan, "this plan", computation_s=2.0)
    small = replace(load_cluster("cpu8").device, memory_bytes=2**20)
    other = replace(side(plan, "b.json", computation_s=1.0), tight=TightStage(0, 2**21, small))
    assert "; b.json does not fit, it needs " in verdict(compare(one, other, {}))


def test_the_other_plan_is_priced_here(found, gpt, cpu8, tmp_path):
    path = tmp_path / "b.json"
    write_plan(replace(found["deep"].plan, predicted=None), path)
    adopted = adopt_other(path, gpt, cpu8, OPTIONS)
    assert adopted.plan.predicted == found["deep"].plan.predicted


def test_a_plan_that_does_not_compare_is_refused(found, gpt, cpu8, tmp_path):
    path = tmp_path / "b.json"
    with pytest.raises(PlanError, match=r"there is no plan file .*b\.json \(plan\.compare="):
        adopt_other(path, gpt, cpu8, OPTIONS)
    write_plan(found["deep"].plan, path)
    with pytest.raises(
        PlanError,
        match=r"plan\.compare=.*b\.json: the plan is for a global batch of 32 samples, and this run's has 64 "
        r"\(train\.global_batch\).*set train\.global_batch=32",
    ):
        adopt_other(path, gpt, cpu8, replace(OPTIONS, global_batch=64))
    with pytest.raises(
        PlanError,
        match=r"plan\.compare=.*b\.json: stages\[2\]\.hosts has 1, outside 0\.\.0 \(cluster\.hosts=1\)"
        r".*take one that has all \(cluster\.hosts=2\)",
    ):
        adopt_other(path, gpt, cpu8.replace(hosts=1), OPTIONS)
