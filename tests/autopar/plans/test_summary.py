"""The summary: what stands in it, in how many columns."""

import dataclasses

import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.plans.plan import RunnerUp
from launcher.autopar.plans.summary import WIDTH, headline, mfu, summarize


def test_the_summary_as_people_see_it(plan, cpu8, params, golden):
    golden("plans/two_stages.txt", summarize(plan, cpu8, params) + "\n")


def test_it_says_what_a_plan_promises(plan, cpu8, params):
    text = summarize(plan, cpu8, params)
    for part in (
        "gpt tiny (82.9 thousand parameters, fp32) on cpu8, 2 hosts x 4 emulated CPU",
        "32 samples = 8 microbatches of 4 samples, schedule 1f1b",
        "41.2 ms a step",
        "bubble 15.8 %",
        "MFU ?",
        "nominal",
        "4.96 MiB of 2 GiB",
        "1,482 candidates, 12 sharding problems",
        "2 stages, 16 microbatches: 1.09 times the step time",
    ):
        assert part in text, part


def test_virtual_stages_are_told(plan, cpu8):
    first, second = plan.stages
    stages = tuple(
        dataclasses.replace(stage, layers=(i, i + 1)) for i, stage in enumerate((first, second) * 2)
    )
    virtual = dataclasses.replace(
        plan, schedule="interleaved", virtual_stages=2, stages=stages, predicted=None
    )
    text = " ".join(summarize(virtual, cpu8).split())
    assert "schedule interleaved, 2 stages on each of 2 submeshes" in text
    assert "stages i and i + 2 share a submesh and its memory" in text


def test_no_line_is_too_wide(plan, cpu8, params):
    hosts = tuple(range(0, 2000, 2))
    wide = dataclasses.replace(
        plan,
        stages=tuple(dataclasses.replace(stage, hosts=hosts) for stage in plan.stages),
        runners_up=(RunnerUp(description="long " * 40, step_s=3.0, why="slow " * 30),),
    )
    lines = summarize(wide, cpu8, params).splitlines()
    assert max(map(len, lines)) <= WIDTH


def test_equal_blocks_are_one_line(plan, cpu8, params):
    lines = summarize(plan, cpu8, params).splitlines()
    rows = [line for line in lines if "blocks/" in line]
    assert rows[0].split() == [
        "blocks/*/mlp/up/kernel", "4", "x", "[64,", "256]", "0", "[-,", "tensor=2]", "[-,",
        "tensor=2]",
    ]  # fmt: skip
    after = lines[lines.index(rows[0]) + 1]
    assert after.split() == ["1", "[-,", "-]", "[-,", "-]"]  # in stage 1 the axis has one device
    assert not [line for line in lines if "blocks/0" in line]


def test_many_stages_are_cut_in_the_middle(plan, cpu8):
    many = dataclasses.replace(
        plan,
        stages=tuple(dataclasses.replace(plan.stages[0], layers=(i, i + 1)) for i in range(40)),
        predicted=None,
    )
    lines = summarize(many, cpu8).splitlines()
    assert "  ... 16 stages more ..." in lines
    assert [line.split()[0] for line in lines if line.split()[1:2] == ["39-39"] or "0-0" in line]


def test_a_plan_without_a_price(plan, cpu8):
    bare = dataclasses.replace(
        plan,
        predicted=None,
        search=None,
        runners_up=(),
        stages=tuple(dataclasses.replace(stage, params={}) for stage in plan.stages),
    )
    text = summarize(bare, cpu8)
    assert "the plan has not been priced" in text
    assert text.endswith("mesh: data x tensor")


def test_ways_beyond_the_third_are_only_counted(plan, cpu8, params):
    specs = [(None, None), ("data", None), (None, "data"), ("tensor", None), (None, "tensor")]
    stages = tuple(
        dataclasses.replace(
            plan.stages[0], params={"blocks/0/mlp/up/kernel": spec}, optimizer_state={}
        )
        for spec in specs
    )
    text = summarize(dataclasses.replace(plan, stages=stages, predicted=None), cpu8, params)
    assert "3-4     in other ways" in text


def test_mfu_needs_a_known_peak(plan, cpu8):
    assert mfu(plan.predicted, plan, cpu8) is None
    v100 = load_cluster("1xp3")
    half = dataclasses.replace(plan.predicted, tflops_per_device=7.85)
    assert mfu(half, plan, v100) == pytest.approx(0.5)


def test_the_headline_without_shapes(plan, cpu8):
    assert headline(plan, cpu8, {}).startswith("gpt tiny (fp32) on cpu8")


def test_devices_without_a_stage_are_told(plan, cpu8):
    assert "idle" not in summarize(plan, cpu8)
    alone = dataclasses.replace(plan, stages=plan.stages[:1], predicted=None)
    assert "idle       4 devices of the 8, on which no stage lies\n" in summarize(alone, cpu8)
    narrow = dataclasses.replace(plan.stages[1], devices=(0, 1, 2), mesh=())
    seven = dataclasses.replace(plan, stages=(plan.stages[0], narrow), predicted=None)
    assert "idle       1 device of the 8, " in summarize(seven, cpu8)


def test_one_candidate(plan, cpu8):
    one = dataclasses.replace(plan, search=dataclasses.replace(plan.search, candidates=1))
    assert "searched   1 candidate, 12 sharding problems" in summarize(one, cpu8)


@pytest.mark.parametrize(
    ("spec", "legend"),
    [
        ((None, "data"), "[-, data=2]: dim 1 is split over the 2 devices of the data axis"),
        (
            (("data", "tensor"), None),
            "[-, data*tensor=4]: dim 1 is split over the 4 devices of the data*tensor axes",
        ),
        ((None, None), "1 group; -: a dim that is not split"),
    ],
)
def test_specs_are_explained_by_one_that_is_there(plan, cpu8, params, spec, legend):
    kernel = {"blocks/0/mlp/up/kernel": spec}
    stages = (dataclasses.replace(plan.stages[0], params=kernel, optimizer_state={}),)
    text = summarize(dataclasses.replace(plan, stages=stages, predicted=None), cpu8, params)
    assert legend in text
    assert "tensor=4" not in text or "tensor=4" in legend
