"""What a plan must hold to be one, and how each mistake is told."""

import dataclasses
import re

import pytest

from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.plans.plan import axes_of
from launcher.autopar.plans.plan_checks import check_without_model
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.errors import PlanError


def test_a_sound_plan_passes(plan, cpu8):
    check_without_model(plan, 4, cpu8)
    check_without_model(plan, None, cpu8, fingerprint="f2090328d21e94a6")
    assert (plan.microbatch_size, plan.num_devices) == (4, 8)


def test_a_plan_may_run_on_a_larger_cluster_and_leave_devices_unused(plan):
    check_without_model(plan, 4, load_cluster("8xp3"))


def test_a_plan_by_hand_says_little(plan, cpu8):
    bare = dataclasses.replace(
        plan,
        num_layers=None,
        predicted=None,
        search=None,
        stages=tuple(
            dataclasses.replace(stage, params={}, optimizer_state={}, strategies={})
            for stage in plan.stages
        ),
    )
    check_without_model(bare, None, cpu8)


HEADS = [
    ({"version": 2}, "version=2 is not 1"),
    ({"schedule": "zigzag"}, "schedule=zigzag is unknown: take gpipe or 1f1b or"),
    ({"virtual_stages": 2}, "virtual_stages=2 is not 1, all that schedule=1f1b takes: write 1, or"),
    (
        {"virtual_stages": 2, "schedule": "zb_h1"},
        "virtual_stages=2 is not 1, all that schedule=zb_h1",
    ),
    ({"schedule": "interleaved"}, "virtual_stages=1 is less than 2, the least that schedule=inter"),
    ({"num_microbatches": 5}, "num_microbatches=5 does not divide global_batch=32"),
    ({"num_microbatches": 0}, "num_microbatches=0 does not divide"),
    ({"stages": ()}, "0 stages, at least 1 is needed"),
    ({"num_layers": 5}, "stages[1].layers ends at 4, not at num_layers=5"),
]


@pytest.mark.parametrize(("changes", "message"), HEADS, ids=[str(case[0]) for case in HEADS])
def test_the_head_is_checked(plan, cpu8, changes, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        check_without_model(dataclasses.replace(plan, **changes), None, cpu8)


@pytest.fixture
def virtual(plan):
    """Four stages in turn on two submeshes."""
    first, second = plan.stages
    layers = [(0, 1), (1, 2), (2, 3), (3, 4)]
    stages = [
        dataclasses.replace(stage, layers=pair)
        for stage, pair in zip((first, second) * 2, layers, strict=True)
    ]
    return dataclasses.replace(
        plan, schedule="interleaved", virtual_stages=2, stages=tuple(stages), predicted=None
    )


def test_virtual_stages_share_their_devices(virtual, cpu8):
    check_without_model(virtual, 4, cpu8)
    assert (virtual.num_submeshes, virtual.num_devices) == (2, 8)
    assert virtual.submesh_of == (0, 1, 0, 1)
    assert [stage.hosts for stage in virtual.submeshes] == [(0,), (1,)]
    assert from_json(to_json(virtual)) == virtual


VIRTUAL = [
    (
        {"virtual_stages": 3},
        "stages has 4 entries, no multiple of virtual_stages=3, the stages of a submesh: give 3 or 6",
    ),
    (
        {"num_microbatches": 1},
        "num_microbatches=1 is no multiple of 2, the submeshes of 4 stages with virtual_stages=2",
    ),
]


@pytest.mark.parametrize(("changes", "message"), VIRTUAL, ids=[str(case[0]) for case in VIRTUAL])
def test_virtual_stages_must_come_out_even(virtual, cpu8, changes, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        check_without_model(dataclasses.replace(virtual, **changes), None, cpu8)


def test_stages_of_a_submesh_name_the_same_devices_and_no_others_do(virtual, cpu8):
    first, second, third, fourth = virtual.stages
    moved = dataclasses.replace(third, devices=(0, 1))
    with pytest.raises(
        PlanError,
        match=r"stages\[2\] has hosts=\[0\] and devices=\[0, 1\], and stages\[0\] on the same submesh "
        r"\(virtual_stages=2\) has \[0\] and \[0, 1, 2, 3\]: write the same",
    ):
        check_without_model(
            dataclasses.replace(virtual, stages=(first, second, moved, fourth)), None, cpu8
        )
    on_first = [dataclasses.replace(stage, hosts=(0,)) for stage in virtual.stages]
    with pytest.raises(PlanError, match="device 0 of host 0 is used twice, by stage 0 too"):
        check_without_model(dataclasses.replace(virtual, stages=tuple(on_first)), None, cpu8)


def test_the_plan_must_be_for_the_model(plan, cpu8):
    with pytest.raises(PlanError, match="model.fingerprint=f2090328d21e94a6 is not abc"):
        check_without_model(plan, 4, cpu8, fingerprint="abc")
    with pytest.raises(PlanError, match=r"ends at 4, not at the model's layers=6"):
        check_without_model(plan, 6, cpu8)


# Changes of stage 1, and what is said about it.
STAGES = [
    ({"layers": (3, 4)}, "stages[1].layers=[3, 4] begins at 3, and stage 0 ends at 2"),
    ({"layers": (2, 2)}, "stages[1].layers=[2, 2] ends at 2, not after 2"),
    ({"hosts": (2,)}, "stages[1].hosts has 2, outside 0..1 (cluster.hosts=2)"),
    ({"hosts": (-1,)}, "stages[1].hosts has -1, outside 0..1"),
    ({"hosts": ()}, "stages[1].hosts=[] has 0 entries"),
    ({"devices": (0, 1, 2, 4)}, "has 4, outside 0..3 (cluster.devices_per_host=4)"),
    ({"devices": (0, 1, 2, 2)}, "stages[1].devices=[0, 1, 2, 2] names an index twice"),
    ({"hosts": (0,)}, "device 0 of host 0 is used twice, by stage 0 too"),
    (
        {"mesh": (("data", 4), ("tensor", 2))},
        "stages[1].mesh data=4 x tensor=2 is 8 devices, and 1 host x 4 devices are 4",
    ),
    ({"mesh": (("data", -2), ("tensor", -2))}, "stages[1].mesh data=-2 x tensor=-2 is 4"),
    ({"mesh": (("tensor", 4),)}, "stages[1].mesh has the axes tensor, not data and tensor"),
    ({"recompute": "some"}, "stages[1].recompute=some is unknown: take none or layer or full"),
    ({"zero": 4}, "stages[1].zero=4 is not in 0..3"),
    ({"params": {"a/b": ("model",)}}, "stages[1].params['a/b']=model is unknown"),
    (
        {"params": {"a/b": ("data", ("tensor", "data"))}},
        "stages[1].params['a/b']=['data', ('tensor', 'data')] splits by an axis twice",
    ),
    ({"optimizer_state": {"c": (("x",),)}}, "stages[1].optimizer_state['c']=x is unknown"),
]


@pytest.mark.parametrize(("changes", "message"), STAGES, ids=[str(case[0]) for case in STAGES])
def test_stages_are_checked(plan, cpu8, changes, message):
    first, second = plan.stages
    stages = (first, dataclasses.replace(second, **changes))
    broken = dataclasses.replace(plan, stages=stages, num_layers=None)
    with pytest.raises(PlanError, match=re.escape(message)):
        check_without_model(broken, None, cpu8)


def test_the_first_layer_is_layer_0(plan, cpu8):
    first, second = plan.stages
    stages = (dataclasses.replace(first, layers=(1, 2)), second)
    broken = dataclasses.replace(plan, stages=stages)
    with pytest.raises(PlanError, match="begins at 1, and the model begins at 0"):
        check_without_model(broken, None, cpu8)


def test_predictions_have_an_entry_per_stage(plan, cpu8):
    predicted = dataclasses.replace(plan.predicted, stage_sync_s=(0.0,))
    with pytest.raises(PlanError, match=r"predicted.stage_sync_s has 1 entries for 2 stages"):
        check_without_model(dataclasses.replace(plan, predicted=predicted), None, cpu8)


def test_axes_of_a_spec():
    assert list(axes_of((None, "tensor", ("data", "expert")))) == ["tensor", "data", "expert"]
