"""A plan file on another cluster: priced anew where its submeshes exist, refused where they do not."""

from dataclasses import replace

import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan, find_plan
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.predictions.predict import predict
from launcher.autopar.text.wording import seconds
from launcher.errors import PlanError

OPTIONS = PlanOptions(mode="from_file", global_batch=32)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


@pytest.fixture(scope="module")
def found(gpt, cpu8):
    """A searched plan of two hosts, as it comes back from its file."""
    options = replace(OPTIONS, mode="manual", tp=2, pp=2)
    plan = find_plan(gpt, cpu8, options, lambda text: None).plan
    assert plan.runners_up
    return from_json(to_json(plan))


def test_at_home_it_keeps_all_it_says(found, gpt, cpu8, caplog):
    caplog.set_level("INFO", "launcher")
    assert adopt_plan(found, gpt, cpu8, OPTIONS).plan == found
    assert "promises" not in caplog.text


@pytest.mark.parametrize("name", ["8xp3", "dgx-h100"])
def test_elsewhere_it_is_priced_anew(name, found, gpt, caplog):
    caplog.set_level("INFO", "launcher")
    cluster = load_cluster(name).replace(hosts=3)
    plan = adopt_plan(found, gpt, cluster, OPTIONS).plan
    assert plan.cluster == cluster.ref()
    assert plan.predicted == predict(found, gpt, cluster)
    assert plan.predicted.step_s < found.predicted.step_s
    assert (plan.search, plan.runners_up) == (None, ())
    assert [replace(s, strategies={}) for s in plan.stages] == [
        replace(s, strategies={}) for s in found.stages
    ]
    promised = seconds(found.predicted.step_s)
    assert f"promises {promised} a step on cpu8, and here, on {name}, it is" in caplog.text


def test_the_same_machine_with_other_links_is_another_one(found, gpt, cpu8):
    slow = replace(cpu8, inter_host=replace(cpu8.inter_host, bytes_per_s=1e6))
    plan = adopt_plan(found, gpt, slow, OPTIONS).plan
    assert plan.predicted.step_s > 2 * found.predicted.step_s
    assert plan.runners_up == ()


@pytest.mark.parametrize("change", [{"name": "other"}, {"memory_bytes": 2**20}])
def test_where_it_takes_as_long_but_others_would_do_it_drops_its_claims(found, gpt, cpu8, change):
    device = replace(cpu8.device, memory_bytes=change.get("memory_bytes", cpu8.device.memory_bytes))
    other = replace(cpu8, device=device, name=change.get("name", cpu8.name))
    plan = adopt_plan(found, gpt, other, OPTIONS).plan
    assert plan.predicted.step_s == found.predicted.step_s
    assert (plan.search, plan.runners_up) == (None, ())


def test_what_is_missing_is_named(found, gpt, cpu8):
    with pytest.raises(
        PlanError,
        match=r"stages\[1\]\.hosts has 1, outside 0\.\.0 \(cluster\.hosts=1\): stay inside the cluster, "
        r"take one that has all \(cluster\.hosts=2\), or plan again for this one",
    ):
        adopt_plan(found, gpt, cpu8.replace(hosts=1), OPTIONS)
    narrow = replace(cpu8, devices_per_host=2)
    with pytest.raises(
        PlanError,
        match=r"stages\[0\]\.devices has 2-3, outside 0\.\.1 \(cluster\.devices_per_host=2\)"
        r".*cluster\.devices_per_host=4",
    ):
        adopt_plan(found, gpt, narrow, OPTIONS)


def test_what_does_not_fit_is_warned_of(found, gpt, cpu8, caplog):
    device = replace(cpu8.device, memory_bytes=2**20, reserved_bytes=0)
    adopt_plan(found, gpt, replace(cpu8, device=device), OPTIONS)
    assert "the plan does not fit: stage " in caplog.text
    assert "on a device that has 1 MiB to fill (cluster.device.memory_gib less" in caplog.text


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_in_another_dtype_the_ops_are_sharded_anew(dtype, found, tiny_gpt, cpu8, caplog):
    """Its casts are ops that the plan has no strategies for; its parameters lie where it says."""
    half = tiny_gpt(layers=4, dtype=dtype)
    plan = adopt_plan(found, half, cpu8, OPTIONS).plan
    assert "the plan was made for model.dtype=fp32, and this run has" in caplog.text
    assert plan.model.dtype == dtype
    assert [stage.params for stage in plan.stages] == [stage.params for stage in found.stages]
    assert all(stage.strategies for stage in plan.stages)


@pytest.mark.parametrize(
    ("kernels", "told"),
    [
        (
            {"attention": "cudnn"},
            "model.attention=plain, and this run has cudnn: set model.attention=",
        ),
        (
            {"loss_chunks": 2},
            "model.loss_chunks=1, and this run has 2: set model.loss_chunks=1 to do",
        ),
    ],
)
def test_by_other_kernels_the_ops_are_sharded_anew(kernels, told, found, tiny_gpt, cpu8, caplog):
    other = tiny_gpt(layers=4, **kernels)
    plan = adopt_plan(replace(found, num_layers=None), other, cpu8, OPTIONS).plan
    assert f"the plan was made for {told}" in caplog.text
    assert (plan.model.attention, plan.model.loss_chunks) == (
        other.kernels.attention, other.kernels.loss_chunks,
    )  # fmt: skip
    assert all(stage.strategies for stage in plan.stages)


def test_between_half_precisions_the_strategies_stay(found, tiny_gpt, cpu8):
    half, brain = (tiny_gpt(layers=4, dtype=dtype) for dtype in ("fp16", "bf16"))
    plan = adopt_plan(found, half, cpu8, OPTIONS).plan
    again = adopt_plan(plan, brain, cpu8, OPTIONS).plan
    assert [stage.strategies for stage in again.stages] == [s.strategies for s in plan.stages]
