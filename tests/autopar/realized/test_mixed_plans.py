"""Plans on several kinds of hosts: a stage has what its kind can do, in every mode and at every price."""

from dataclasses import replace

import pytest
from machines import mixed, ragged, times_faster

from launcher.autopar.answers.compare import compare, priced, verdict
from launcher.autopar.answers.why_not import why_not
from launcher.autopar.inter_op.placement import place_on
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.pages.cluster_picture import cluster_svg
from launcher.autopar.pages.plan_page import page
from launcher.autopar.plans.plan import Stage
from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.plans.stage_hosts import devices_of, peak_flops_per_s, peaks_by_kind, tightest
from launcher.autopar.plans.summary import summarize
from launcher.autopar.predictions.predict import crowd_of, predict
from launcher.errors import ConfigError, InfeasiblePlanError, PlanError

AUTO = PlanOptions(mode="auto", global_batch=32, num_microbatches=4)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=8)


def planned(model, cluster, **options):
    return find_plan(model, cluster, replace(AUTO, **options), lambda text: None)


@pytest.fixture(scope="module")
def found(gpt):
    return planned(gpt, ragged())


def hosts_of(cpu8, **figures):
    return replace(cpu8, num_hosts=1, **figures)


def open_plan(found, *stages):
    """The plan that was found, with stages of which the devices alone are given."""
    return replace(found.plan, stages=stages, num_layers=None, schedule="1f1b", predicted=None)


def work(plan, cluster, name):
    """How many layers the hosts of a kind have."""
    own = [stage for stage in plan.stages if cluster.kind_of(stage.hosts).name == name]
    return sum(stage.layers[1] - stage.layers[0] for stage in own)


# What the search finds


def test_stages_lie_inside_kinds_and_take_all_devices(found):
    cluster, plan = ragged(), found.plan
    check_without_model(plan, num_layers=None, cluster=cluster)
    assert {cluster.kind_of(stage.hosts).name for stage in plan.stages} == {"slow", "fast"}
    assert plan.num_devices == cluster.num_devices
    assert plan.search.optimality_gap < 0.3
    assert found.tight.fits


def test_faster_hosts_get_more_layers(gpt):
    shares = []
    for factor in (1.0, 4.0):
        cluster = ragged(factor)
        plan = planned(gpt, cluster, pp=2, schedule="1f1b").plan
        shares.append(work(plan, cluster, "fast") / plan.num_layers)
    assert shares[0] < 0.7 < shares[1]


def test_memory_is_that_of_each_kind(gpt, cpu8):
    host = hosts_of(cpu8)
    needed = max(planned(gpt, host, zero=0, recompute="none").plan.predicted.peak_bytes_per_device)
    small = replace(cpu8.device, kind="small", memory_bytes=int(needed / 4))
    cluster = mixed(host, hosts_of(cpu8, name="tight", device=small))
    plan = planned(gpt, cluster, schedule="1f1b", zero=0, recompute="none").plan
    for stage, device, peak_bytes in zip(
        plan.stages, devices_of(plan, cluster), plan.predicted.peak_bytes_per_device, strict=True
    ):
        assert peak_bytes <= device.usable_bytes, stage
    assert 0 < work(plan, cluster, "tight") < work(plan, cluster, "cpu8")
    tiny = replace(small, memory_bytes=2**10)
    with pytest.raises(InfeasiblePlanError, match=r"1 KiB, .* too many .*hosts to cluster\.groups"):
        planned(gpt, mixed(host, hosts_of(cpu8, device=tiny)))


def test_kinds_of_the_same_figures_are_priced_as_one(gpt, cpu8):
    alike = mixed(hosts_of(cpu8), hosts_of(cpu8))
    apart = planned(gpt, alike).plan
    assert predict(apart, gpt, cpu8).step_s == apart.predicted.step_s
    together = planned(gpt, cpu8).plan  # may also span both
    assert together.predicted.step_s <= apart.predicted.step_s * (1 + 1e-9)
    # With stages of a host each there is no difference.
    forced = {"mode": "manual", "tp": 2, "dp": 2, "pp": 2, "num_microbatches": 8}
    plans = [planned(gpt, cluster, **forced).plan for cluster in (alike, cpu8)]
    assert plans[0].predicted == plans[1].predicted
    assert plans[0].stages == plans[1].stages


def test_a_faster_kind_makes_a_faster_plan(gpt, found):
    model, plan = gpt, found.plan
    faster, slower = predict(plan, model, ragged(4.0)), predict(plan, model, ragged(1.0))
    assert faster.step_s < plan.predicted.step_s < slower.step_s
    for index, stage in enumerate(plan.stages):
        changed = faster.stage_forward_s[index] < slower.stage_forward_s[index]
        assert changed == (ragged().kind_of(stage.hosts).name == "fast")


# Modes without search


def test_by_hand_every_kind_has_its_stages(gpt):
    cluster = ragged()
    plan = planned(gpt, cluster, mode="manual", pp=2, tp=2).plan
    assert [dict(stage.mesh) for stage in plan.stages] == [{"data": 2, "tensor": 2}] * 2
    assert {stage.hosts for stage in plan.stages} == {(0, 1), (2,)}
    deeper = planned(gpt, cluster, mode="manual", pp=4, dp=2).plan
    assert [stage.num_devices for stage in deeper.stages] == [2] * 4
    single = planned(gpt, cluster, mode="single").plan
    assert [(stage.hosts, stage.devices) for stage in single.stages] == [((0,), (0,))]


CANNOT = [
    ({"mode": "data"}, "parallel=data cannot share out the 2 hosts x 2 devices and 1 host x 4 devices of "
     r"cluster=mixed: .* 2 kinds need as many .*parallel.pp=1; set parallel=auto, or .*parallel\.pp=2"),
    ({"mode": "zero"}, r"parallel=zero cannot .*set parallel=auto, or parallel=manual and parallel\.pp=2"),
    ({"mode": "manual"}, r"parallel=manual cannot .*; set parallel\.pp=2, 3, 4, 5, .* or 8"),
    ({"pp": 1}, r"parallel\.pp=1 cannot share out .*; set parallel\.pp=2, 3, 4"),
    ({"mode": "manual", "pp": 3, "dp": 2}, r"dp 2 x tp 1 x pp 3 is 6 devices, not 8; set parallel.*pp=4"),
    ({"tp": 4, "pp": 2}, r"tensor axis must divide the 2 devices of a host; set parallel\.tp=1 or 2"),
    ({"dp": 8}, r"parallel\.dp=8 cannot share out .*; set parallel\.dp=1, 2 or 4"),
    ({"schedule": "interleaved"}, "schedule=interleaved has 2 stages .* cluster=mixed are of 2 kinds; take"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"), CANNOT, ids=[str(options) for options, _ in CANNOT]
)
def test_what_needs_equal_hosts_is_refused_with_a_cure(gpt, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(gpt, ragged(), **options)


def test_stages_that_a_kind_has_no_room_for(cpu8):
    cluster = mixed(hosts_of(cpu8, devices_per_host=3), hosts_of(cpu8))
    with pytest.raises(InfeasiblePlanError, match=r"out of 1 hosts of 3 .*groups\[0\]\.hosts=1\)"):
        place_on(cluster, [(1, 2), (1, 2), (1, 4)], [0, 0, 1])
    assert place_on(cluster, [(1, 4), (1, 2), (1, 1)], [1, 0, 0]) == (
        ((1,), (0, 1, 2, 3)), ((0,), (0, 1)), ((0,), (2,)),
    )  # fmt: skip


# Plans from files


def test_a_plan_file_says_which_kinds_it_was_made_for(found, cpu8, gpt):
    text = to_json(found.plan)
    assert '"groups": [' in text
    assert from_json(text) == found.plan
    assert "groups" not in to_json(replace(found.plan, cluster=cpu8.ref()))
    again = adopt_plan(from_json(text), gpt, ragged(), AUTO)
    assert again.plan.predicted == found.plan.predicted


def test_devices_alone_are_cut_by_what_their_kind_can_do(gpt, found):
    cluster = ragged(8.0)
    given = open_plan(
        found, Stage(hosts=(0, 1), devices=(0, 1)), Stage(hosts=(2,), devices=(0, 1, 2, 3))
    )
    plan = adopt_plan(given, gpt, cluster, AUTO).plan
    assert work(plan, cluster, "slow") < work(plan, cluster, "fast") / 2


BAD_STAGES = [
    ((1, 2), (0, 1), r"stages\[0\]\.hosts=\[1, 2\] are of 2 kinds, .* emulated CPU on 0-1, .* on 2 \("),
    ((0,), (0, 3), r"stages\[0\]\.devices has 3, outside 0\.\.1 .*per_host=2\)"),
    ((3,), (0,), r"stages\[0\]\.hosts has 3, outside 0\.\.2.*cluster\.groups"),
]  # fmt: skip


@pytest.mark.parametrize(("hosts", "devices", "message"), BAD_STAGES)
def test_stages_that_cannot_be_are_named(gpt, found, hosts, devices, message):
    plan = open_plan(found, Stage(hosts=hosts, devices=devices))
    with pytest.raises(PlanError, match=message):
        adopt_plan(plan, gpt, ragged(), AUTO)


# What is said of them


def test_alternatives_are_priced_on_their_own_kinds(gpt, found):
    chosen = priced("this plan", found)
    (other,) = why_not(chosen, [{"pp": 4}], gpt, ragged(), AUTO, lambda text: None).alternatives
    assert len(other.best.plan.stages) == 4
    assert verdict(compare(chosen, other.best, gpt.abstract_params))


def test_the_summary_and_the_page_name_the_kinds(found, gpt):
    cluster = ragged()
    text = summarize(found.plan, cluster, gpt.abstract_params)
    assert "2 hosts x 2 emulated CPU and 1 host x 4 emulated CPU x 2" in " ".join(text.split())
    assert "of 2 GiB per emulated CPU x 2" in " ".join(text.split())
    rows = text.splitlines()[text.splitlines().index("") + 2 :]
    for stage, row in zip(found.plan.stages, rows, strict=False):
        assert ("emulated CPU x 2" in row) == (stage.hosts == (2,)), row
    html = page(found.plan, found.outlook.timeline, cluster)
    assert "host 2 (emulated CPU x 2), device 3" in html
    assert (
        "device 2" not in cluster_svg(found.plan, cluster).split("host 1 ")[1].split("host 2 ")[0]
    )


def test_the_tightest_stage_is_that_with_the_least_left(found, cpu8):
    small = replace(cpu8.device, memory_bytes=3 * 2**20)
    predicted = replace(found.plan.predicted, peak_bytes_per_device=(5 * 2**20, 4 * 2**20))
    tight = tightest(predicted, [cpu8.device, small])
    assert (tight.needed_bytes, tight.device, tight.fits) == (4 * 2**20, small, False)


def test_the_peak_is_the_mean_of_the_devices_that_are_used(found):
    slow, fast = (replace(kind, nominal=False) for kind in ragged(3.0).kinds)
    cluster = mixed(slow, fast, nominal=False)
    peak = slow.device.peak_flops_per_s["fp32"]
    plan = found.plan
    assert peak_flops_per_s(plan, cluster, "fp32") == pytest.approx(2 * peak)  # 4 of 1, 4 of 3
    assert peak_flops_per_s(plan, cluster, "bf16") is None
    on_fast = replace(plan, stages=tuple(s for s in plan.stages if s.hosts == (2,)))
    assert peak_flops_per_s(on_fast, cluster, "fp32") == 3 * peak
    assert peak_flops_per_s(plan, ragged(), "fp32") is None
    words = [word for word, _, _ in peaks_by_kind(plan, plan.predicted, cluster)]
    assert sorted(words) == ["emulated CPU", "emulated CPU x 3"]


def test_every_kind_slows_down_by_its_own_curve(found, cpu8):
    slow, fast = ragged().kinds
    crowded = replace(times_faster(fast.device, 1.0), concurrency=((1.0, 1.0), (8.0, 8.0)))
    cluster = mixed(slow, replace(fast, device=crowded))
    compute = [stage.settings.compute for stage in found.realized.stages]
    crowd = crowd_of(found.plan, cluster, compute)
    assert crowd_of(found.plan, ragged(), compute) is None
    for stage, slowdown in zip(found.plan.stages, crowd.slowdown, strict=True):
        assert slowdown(4) == (4.0 if stage.hosts == (2,) else 1.0)
