"""The parts of a step: they add up to it, and each is what its name says."""

from dataclasses import replace

import pytest

from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.predictions.step_parts import (
    PARTS,
    StepParts,
    average,
    device_parts,
    submesh_parts,
)

FORCED = {
    "one device": ("single", {}),
    "data parallel": ("data", {}),
    "tensor parallel": ("manual", {"tp": 4, "dp": 2}),
    "pipeline": ("manual", {"pp": 4, "tp": 2}),
    "recomputed": ("manual", {"pp": 2, "tp": 2, "recompute": "full"}),
    "recomputed by layers": ("manual", {"pp": 2, "tp": 2, "recompute": "layer"}),
    "recomputed whole": ("manual", {"pp": 2, "tp": 4, "recompute": "full", "zero": 1}),
    "virtual stages": ("manual", {"pp": 2, "schedule": "interleaved"}),
    "split backward": ("manual", {"pp": 4, "schedule": "zb_h1"}),
}


@pytest.fixture(scope="module")
def planned(tiny_gpt, cpu8):
    """Plans by name, each made once."""
    made = {}

    def find(name):
        if name not in made:
            mode, fields = FORCED[name]
            options = PlanOptions(mode=mode, global_batch=32, num_microbatches=4, **fields)
            made[name] = find_plan(tiny_gpt(layers=4), cpu8, options, lambda text: None)
        return made[name]

    return find


@pytest.mark.parametrize("name", FORCED)
def test_the_parts_add_up_to_the_step(name, planned):
    found = planned(name)
    step_s = found.plan.predicted.step_s
    timeline = found.outlook.timeline
    parts = submesh_parts(found.realized, timeline)
    assert len(parts) == found.plan.num_submeshes
    for each in (*parts, device_parts(found.realized, timeline)):
        assert each.step_s == pytest.approx(step_s, rel=1e-9)
        assert min(each.named().values()) >= -1e-12
        assert tuple(each.named()) == PARTS
    idle_s = sum(each.transfers_s + each.bubble_s for each in parts) / len(parts)
    assert idle_s / step_s == pytest.approx(timeline.bubble_fraction, abs=1e-9)


@pytest.mark.parametrize("name", FORCED)
def test_computation_is_what_the_plan_costs_where_links_are_free(name, planned):
    """The same picks priced anew on a mesh whose messages cost nothing."""
    found = planned(name)
    parts = submesh_parts(found.realized, found.outlook.timeline)
    computed_s = [0.0] * found.plan.num_submeshes
    for stage, home in zip(found.realized.stages, found.plan.submesh_of, strict=True):
        mesh = stage.settings.mesh
        none = (0.0,) * mesh.num_axes
        free = replace(stage.settings, mesh=replace(mesh, alpha=none, beta=none, wired=None))
        planner = found.realized.planner
        priced = planner.reprice(*stage.stage.layers, free, stage.sharding.picks).seconds
        computed_s[home] += found.plan.num_microbatches * (priced.forward + priced.backward)
    for each, expected_s in zip(parts, computed_s, strict=True):
        assert each.computation_s == pytest.approx(expected_s, rel=1e-9)


def test_one_device_computes_and_updates_all_the_time(planned):
    found = planned("one device")
    (parts,) = submesh_parts(found.realized, found.outlook.timeline)
    named = parts.named()
    for name in ("recomputation", "communication", "synchronization", "transfers", "bubble"):
        assert named[name] == pytest.approx(0.0, abs=1e-9 * parts.step_s), name
    assert parts.update_s > 0


def test_each_part_shows_where_it_belongs(planned):
    """Collectives with a tensor axis, gradients with a data axis, a bubble with a pipeline."""

    def parts(name):
        return device_parts(planned(name).realized, planned(name).outlook.timeline)

    data = parts("data parallel")
    assert data.synchronization_s > 0
    assert data.bubble_s == pytest.approx(0.0, abs=1e-9 * data.step_s)
    assert parts("tensor parallel").communication_s > 0
    assert parts("pipeline").bubble_s > 0
    assert parts("pipeline").recomputation_s == 0
    found = planned("recomputed")
    again_s = [
        found.plan.num_microbatches * forward_s
        for forward_s in found.plan.predicted.stage_forward_s
    ]
    assert parts("recomputed").recomputation_s == pytest.approx(sum(again_s) / 2)
    assert 0 < parts("recomputed by layers").recomputation_s < sum(again_s) / 2


def test_the_average_weighs_submeshes_by_their_devices():
    parts = (StepParts(computation_s=4.0), StepParts(computation_s=1.0, bubble_s=3.0))
    assert average(parts, (1, 3)) == StepParts(computation_s=1.75, bubble_s=2.25)
