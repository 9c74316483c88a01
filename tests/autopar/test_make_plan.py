"""From options to a plan: what was forced is in it, it holds together, and it replays."""

import gc
import importlib
import json
from dataclasses import replace

import pytest
from plans import plan_of, stage_of

from launcher.autopar.graphs.clustering import cluster
from launcher.autopar.graphs.trace import trace_model
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import (
    _check_memory,
    adopt_plan,
    find_plan,
    make_plan,
    no_garbage_collection,
)
from launcher.autopar.plans.plan import ModelRef
from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.plans.stage_hosts import tightest
from launcher.autopar.predictions.predict import foresee, predict
from launcher.autopar.realized.realize import realize
from launcher.errors import ConfigError, InfeasiblePlanError, PlanError

BATCH, MICROBATCHES = 32, 4


def options(mode, **fields):
    given = {"global_batch": BATCH, "num_microbatches": MICROBATCHES, **fields}
    return PlanOptions(mode=mode, **given)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


def planned(model, cluster, mode, **fields):
    return find_plan(model, cluster, options(mode, **fields), lambda text: None)


FORCED = {
    "single": ("single", {}),
    "data": ("data", {}),
    "zero-3": ("zero", {"zero": 3}),
    "all degrees": ("manual", {"dp": 2, "tp": 2, "pp": 2}),
    "gpipe with recomputation": (
        "manual", {"dp": 1, "tp": 4, "pp": 2, "zero": 1, "recompute": "full", "schedule": "gpipe"},
    ),
    "another number of microbatches": ("manual", {"tp": 4, "num_microbatches": 8}),
    "auto with tp": ("auto", {"tp": 4}),
    "auto with dp and zero": ("auto", {"dp": 4, "zero": 3}),
    "auto with pp and recomputation": ("auto", {"pp": 4, "recompute": "layer", "schedule": "gpipe"}),
    "auto with eight stages": ("auto", {"pp": 8, "num_microbatches": 16}),
    "split backward": ("manual", {"tp": 2, "pp": 4, "schedule": "zb_h1"}),
    "auto with split backward": ("auto", {"pp": 4, "schedule": "zb_h1"}),
    "virtual stages": ("manual", {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "virtual stages of no layers' number": (
        "manual", {"tp": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 3},
    ),
    "auto with virtual stages": ("auto", {"schedule": "interleaved", "virtual_stages": 2, "pp": 2}),
    "virtual stages left open": ("auto", {"schedule": "interleaved", "tp": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORCED)
def test_what_is_forced_is_in_the_plan(name, gpt, cpu8):
    mode, fields = FORCED[name]
    plan = make_plan(gpt, cpu8, options(mode, **fields))
    check_without_model(plan, num_layers=None, cluster=cpu8, fingerprint=gpt.fingerprint)
    assert plan.num_microbatches == fields.get("num_microbatches", MICROBATCHES)
    if mode != "auto" or "schedule" in fields:
        assert plan.schedule == fields.get("schedule", "1f1b")
    assert plan.num_devices == (1 if mode == "single" else 8)
    for stage in plan.stages:
        mesh = dict(stage.mesh)
        assert mesh["data"] == fields.get("dp", mesh["data"])
        assert mesh["tensor"] == fields.get("tp", mesh["tensor"])
        assert stage.zero == fields.get("zero", stage.zero)
        assert stage.recompute == fields.get("recompute", stage.recompute)
    assert plan.num_submeshes == fields.get("pp", plan.num_submeshes)
    least = 2 if plan.schedule == "interleaved" else 1
    if mode != "auto" or "schedule" in fields:
        assert plan.virtual_stages == fields.get("virtual_stages", least)
    assert plan.virtual_stages >= least
    assert predict(replace(plan, predicted=None), gpt, cpu8) == plan.predicted


@pytest.mark.parametrize("schedule", ["interleaved", "zb_h1"])
def test_the_schedules_keep_what_they_promise(schedule, gpt, cpu8):
    """Less bubble than 1F1B has on the same submeshes; the peak of a submesh for each of its stages."""
    fields = {"tp": 4, "pp": 2, "num_microbatches": 4}
    plain = planned(gpt, cpu8, "manual", **fields)
    found = planned(gpt, cpu8, "manual", schedule=schedule, **fields)
    predicted = found.plan.predicted
    assert predicted.bubble_fraction < plain.plan.predicted.bubble_fraction
    assert predicted.step_s < plain.plan.predicted.step_s
    program = found.realized.program
    assert program.num_submeshes == 2
    assert program.splits_backward == (schedule == "zb_h1")
    peaks = dict(zip(found.plan.submesh_of, predicted.peak_bytes_per_device, strict=True))
    assert predicted.peak_bytes_per_device == tuple(peaks[i] for i in found.plan.submesh_of)
    assert sum(predicted.stage_forward_s) == pytest.approx(
        sum(plain.plan.predicted.stage_forward_s), rel=0.05
    )


def test_a_found_plan_holds_together(gpt, cpu8):
    found = planned(gpt, cpu8, "manual", tp=2, pp=2)
    plan = found.plan
    assert (plan.global_batch, plan.cluster, plan.num_layers) == (BATCH, cpu8.ref(), 6)
    assert plan.model == ModelRef(
        name="gpt",
        size="tiny",
        fingerprint=gpt.fingerprint,
        dtype="fp32",
        attention="plain",
        loss_chunks=1,
    )
    assert {path for stage in plan.stages for path in stage.params} == set(gpt.abstract_params)
    for stage in plan.stages:
        assert stage.params.keys() == stage.optimizer_state.keys()
        assert all(
            len(dims) == len(gpt.abstract_params[p].shape) for p, dims in stage.params.items()
        )
    assert plan.predicted == found.outlook.prediction
    assert plan.predicted.step_s == found.outlook.timeline.step_s
    assert plan.search.ilp_solved >= 1
    assert plan.search.candidates >= 1
    assert 0.0 <= plan.search.optimality_gap < 0.2
    assert "4 microbatches" in plan.search.space
    assert found.realized.plan == plan


def test_zero_2_puts_optimizer_state_on_the_data_axis(gpt, cpu8):
    (stage,) = make_plan(gpt, cpu8, options("zero")).stages
    assert all(dims.count("data") == 1 for dims in stage.optimizer_state.values())
    assert all(set(dims) == {None} for dims in stage.params.values())


def test_zero_3_puts_the_parameters_there_too(gpt, cpu8):
    (stage,) = make_plan(gpt, cpu8, options("zero", zero=3)).stages
    assert all("data" in dims for dims in stage.params.values())


def test_runners_up_are_other_numbers_of_microbatches_and_slower(gpt, cpu8):
    plan = make_plan(gpt, cpu8, options("data", num_microbatches=None))
    assert plan.runners_up
    for runner in plan.runners_up:
        assert runner.step_s >= plan.predicted.step_s
        assert f"{runner.step_s / plan.predicted.step_s:.2f} times" in runner.why
        assert f" {plan.num_microbatches} microbatches" not in runner.description


def test_the_simulator_judges_every_plan_alike(gpt, cpu8):
    """What `predict` says of a plan is what making it promised."""
    plan = make_plan(gpt, cpu8, options("manual", tp=2, pp=2))
    assert predict(replace(plan, predicted=None), gpt, cpu8) == plan.predicted


def test_a_plan_too_large_for_a_device_is_told_with_both_numbers(gpt, cpu8):
    found = planned(gpt, cpu8, "single")
    small = replace(cpu8, device=replace(cpu8.device, memory_bytes=2**22))
    tight = tightest(found.plan.predicted, [small.device])
    with pytest.raises(
        InfeasiblePlanError,
        match=r"needs [\d.]+ MiB for stage 0 on a device that has 4 MiB to fill, .*memory_gib=0\.0039",
    ):
        _check_memory(tight, gpt, small, options("single"))


def test_memory_that_finished_plans_lack_is_left_out_of_another_search(gpt, cpu8, monkeypatch):
    """Finished plans need half as much again here; at first none fits."""
    fastest = planned(gpt, cpu8, "auto", schedule="1f1b").plan

    def more(realized, cluster):
        outlook = foresee(realized, cluster)
        peaks = tuple(1.5 * peak for peak in outlook.prediction.peak_bytes_per_device)
        return replace(outlook, prediction=replace(outlook.prediction, peak_bytes_per_device=peaks))

    monkeypatch.setattr(importlib.import_module("launcher.autopar.make_plan"), "foresee", more)
    limit = int(1.2 * max(fastest.predicted.peak_bytes_per_device))
    small = replace(cpu8, device=replace(cpu8.device, memory_bytes=limit, reserved_bytes=0))
    said: list[str] = []
    found = find_plan(gpt, small, options("auto", schedule="1f1b"), said.append).plan
    assert max(found.predicted.peak_bytes_per_device) <= limit
    assert any("searching again with" in line for line in said)
    assert found.predicted.step_s >= fastest.predicted.step_s


def test_a_reserve_is_left_empty(gpt, cpu8):
    found = planned(gpt, cpu8, "single")
    (needed,) = map(int, found.plan.predicted.peak_bytes_per_device)
    # The search counts in closed form, a little more than the finished plan needs.
    for spare, fits in ((needed // 10, True), (-(2**20), False)):
        device = replace(cpu8.device, reserved_bytes=cpu8.device.memory_bytes - needed - spare)
        machine = replace(cpu8, device=device)
        assert tightest(found.plan.predicted, [device]).fits == fits
        if fits:
            planned(gpt, machine, "single")
        else:
            with pytest.raises(InfeasiblePlanError, match="[GM]iB"):
                planned(gpt, machine, "single")


def test_virtual_stages_by_hand_are_completed_and_run_on_the_same_devices(gpt, cpu8):
    text = to_json(make_plan(gpt, cpu8, options("manual", tp=2, pp=2)))
    tree = json.loads(text)
    hosts, mesh = ([0], [1]), {"data": 2, "tensor": 2}
    tree = {key: tree[key] for key in ("version", "model", "cluster", "global_batch")} | {
        "num_microbatches": 4,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "stages": [
            {"layers": [i, i + 1], "hosts": hosts[i % 2], "devices": [0, 1, 2, 3], "mesh": mesh}
            for i in range(4)
        ],
    }
    adopted = adopt_plan(from_json(json.dumps(tree)), gpt, cpu8, options("from_file"))
    assert adopted.plan.submesh_of == adopted.realized.wiring.submesh_of == (0, 1, 0, 1)
    assert adopted.realized.program.num_submeshes == 2
    assert all(stage.strategies for stage in adopted.plan.stages)
    assert adopted.plan.predicted.bubble_fraction < 0.5
    tree["num_microbatches"] = 1
    with pytest.raises(PlanError, match="num_microbatches=1 is no multiple of 2, the submeshes"):
        adopt_plan(from_json(json.dumps(tree)), gpt, cpu8, options("from_file"))


def bare(stages, num_layers=None):
    batch = {"global_batch": BATCH, "num_microbatches": MICROBATCHES}
    return plan_of(*stages, num_layers=num_layers, **batch)


_TWO = (stage_of((0, 3), mesh=(2, 2)), stage_of((3, 4), host=1, mesh=(4, 1), zero=2))


def test_a_bare_plan_is_completed_by_the_solver(gpt, cpu8):
    found = adopt_plan(bare(_TWO), gpt, cpu8, options("auto"))
    for before, after in zip(_TWO, found.plan.stages, strict=True):
        assert (after.layers, after.mesh, after.zero) == (before.layers, before.mesh, before.zero)
        assert after.params
        assert after.strategies
    assert found.plan.num_layers == 4
    assert found.plan.predicted.step_s > 0
    again = adopt_plan(found.plan, gpt, cpu8, options("auto")).plan
    assert again == found.plan
    assert adopt_plan(from_json(to_json(found.plan)), gpt, cpu8, options("auto")).plan == again


def test_placed_parameters_stay_where_the_plan_puts_them(gpt, cpu8):
    path = "blocks/3/mlp/up/kernel"
    dims = (None, ("tensor",))
    stages = (_TWO[0], stage_of((3, 4), host=1, mesh=(1, 4), params={path: dims}))
    found = adopt_plan(bare(stages), gpt, cpu8, options("auto")).plan
    assert found.stages[1].params[path] == (None, "tensor")


BROKEN = {
    "a dim too many": (
        (_TWO[0], replace(_TWO[1], params={"blocks/3/mlp/up/bias": (None, "data")})), None,
        r"has 2 entries, and the tensor has 1 dim",
    ),
    "an axis that may not split": (
        (_TWO[0], replace(_TWO[1], params={"blocks/3/mlp/up/bias": ("data",)})), None,
        r"is not possible on the mesh .*drop the entry",
    ),
    "blocks that differ": (
        (replace(_TWO[0], params={
            "blocks/1/mlp/up/bias": ("tensor",), "blocks/2/mlp/up/bias": (None,)
        }), _TWO[1]), None,
        r"'blocks/2/mlp/up/bias' must lie as 'blocks/1/mlp/up/bias'",
    ),
    "an unknown strategy": (
        (replace(_TWO[0], strategies={"layer0/op": ("0:nonsense",)}), _TWO[1]), None,
        r"no strategy 'nonsense' for .*stages\[\]\.strategies.*drop",
    ),
    "a strategy of no op": (
        (replace(_TWO[0], strategies={"layer0/op": ("9999:R>R",)}), _TWO[1]), None,
        r"no strategy 'R>R' for entry 9999 of layer0/op",
    ),
    "a strategy without a number": (
        (replace(_TWO[0], strategies={"layer0/op": ("R>R",)}), _TWO[1]), None,
        r"strategy 'R>R' of layer0/op names no node .*number:choice",
    ),
    "a data axis that cuts samples": (
        (replace(_TWO[0], mesh=(("data", 4), ("tensor", 1))), _TWO[1]), 16,
        r"microbatch of 2 samples cannot be cut into 4 equal parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_plans_that_cannot_be(name, gpt, cpu8):
    stages, num_microbatches, words = BROKEN[name]
    plan = replace(bare(stages), num_microbatches=num_microbatches or MICROBATCHES)
    with pytest.raises(PlanError, match=words):
        adopt_plan(plan, gpt, cpu8, options("auto"))


def test_a_plan_may_cut_the_model_into_another_number_of_layers(gpt, cpu8):
    """Left out, `num_layers` is where the last stage ends, also in a plan that was never a file."""
    stages = (replace(_TWO[0], layers=(0, 1)), replace(_TWO[1], layers=(1, 2)))
    for num_layers in (2, None):
        found = adopt_plan(bare(stages, num_layers=num_layers), gpt, cpu8, options("auto"))
        assert len(found.realized.planner.model.layers) == 2
        assert found.plan.num_layers == 2


def test_more_layers_than_the_model_can_be_cut_into(gpt, cpu8):
    stages = (_TWO[0], replace(_TWO[1], layers=(3, 300)))
    with pytest.raises(
        ConfigError, match=r"^stages\[1\]\.layers\[1\]=300 is more layers than the (\d+)"
    ) as error:
        adopt_plan(bare(stages), gpt, cpu8, options("auto"))
    most = int(str(error.value).rpartition("layers[1]=")[2].split()[0])
    traced = trace_model(gpt, BATCH // MICROBATCHES)
    assert len(cluster(traced, most).layers) == most
    with pytest.raises(ConfigError, match=rf"parallel.pp={most + 1} .* parallel.pp={most} or less"):
        cluster(traced, most + 1, key="parallel.pp")


@pytest.mark.parametrize(("dtype", "is_told"), [("bf16", True), ("fp32", False), (None, False)])
def test_a_plan_for_another_dtype_is_warned_of(gpt, cpu8, dtype, is_told, caplog):
    plan = bare(_TWO)
    adopt_plan(replace(plan, model=replace(plan.model, dtype=dtype)), gpt, cpu8, options("auto"))
    assert ("set model.dtype=bf16" in caplog.text) == is_told


def test_a_bare_plan_for_another_size_is_refused(gpt, cpu8):
    other = replace(bare(_TWO), model=ModelRef(name="gpt", size="125m"))
    message = r"for model\.size=125m, .* is model\.size=tiny: take the plan's, or write that size"
    with pytest.raises(PlanError, match=message):
        adopt_plan(other, gpt, cpu8, options("auto"))
    same = replace(other, model=replace(other.model, fingerprint=gpt.fingerprint))
    assert adopt_plan(same, gpt, cpu8, options("auto")).plan.model.size == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_auto_is_no_slower_than_any_plan_by_hand_in_the_simulator(gpt, cpu8, num_microbatches):
    """To 5 %: the search does not see how transfers overlap with computing."""
    best = planned(gpt, cpu8, "auto", num_microbatches=num_microbatches).plan.predicted.step_s
    for tp, pp in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)):
        dp = 8 // (tp * pp)
        if (BATCH // num_microbatches) % dp:
            continue
        manual = planned(
            gpt, cpu8, "manual", dp=dp, tp=tp, pp=pp, num_microbatches=num_microbatches
        )
        assert best <= 1.05 * manual.plan.predicted.step_s, (dp, tp, pp)


def test_a_realized_plan_knows_who_sends_what_to_whom(gpt, cpu8):
    realized = planned(gpt, cpu8, "manual", tp=2, pp=2).realized
    avals = realized.planner.model.traced.graph.avals
    (activation,) = realized.sent[0, 1]
    assert avals[activation].shape == (BATCH // MICROBATCHES, 64, 64)
    assert realized.returned[0, 1] == (activation,)
    tied = [path for path in gpt.abstract_params if "token" in path]
    assert {path: realized.users[path] for path in tied} == {path: (1,) for path in tied}
    assert {realized.owner[path] for path in tied} == {0}
    assert realize(realized.plan, gpt, cpu8).program == realized.program


def test_what_the_last_plan_leaves_is_looked_at_by_the_next():
    with no_garbage_collection(is_last=True):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count()
    with no_garbage_collection():
        assert not gc.get_freeze_count()
    assert not gc.get_freeze_count()
