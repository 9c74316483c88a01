"""Plans on crowded machines: who shares one, and what that does to the predicted step."""

import dataclasses

import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.predictions.predict import crowd_of, neighbours_of, stage_durations
from launcher.autopar.predictions.step_parts import submesh_parts
from launcher.autopar.programs.simulator import simulate
from launcher.config import GptConfig

MODEL = models.build(GptConfig(size="tiny", dtype="fp32", layers=2, hidden=32, seq_len=16))
FREE = load_cluster("cpu8")


def crowded(cluster, *, accelerator=False, **figures):
    device = dataclasses.replace(
        cluster.device, concurrency=((1.0, 1.0), (8.0, 8.0)), accelerator=accelerator, **figures
    )
    return dataclasses.replace(cluster, device=device)


def planned(cluster):
    options = PlanOptions(
        mode="manual", global_batch=8, num_microbatches=2, tp=1, pp=2, optimizer=optax.sgd(1e-3)
    )
    return find_plan(MODEL, cluster, options, lambda text: None)


def test_one_machine_emulates_all_hosts():
    plan = planned(FREE).plan
    machine = crowded(FREE)
    compute = [ComputeModel(machine.device, 8)] * 2
    assert crowd_of(plan, machine, compute).devices == ({0: 4}, {0: 4})
    real = crowded(FREE, accelerator=True)
    assert crowd_of(plan, real, compute).devices == ({0: 4}, {1: 4})
    assert crowd_of(plan, FREE, compute) is None


def test_a_step_costs_the_full_price_only_while_all_devices_compute():
    machine = crowded(FREE)
    found = planned(machine)
    durations = stage_durations(found.realized, machine)
    step_s = found.plan.predicted.step_s
    passes_s = 2 * (sum(durations.forward_s) + sum(durations.backward_s))
    work_s = passes_s + sum(durations.synchronize_s) + sum(durations.update_s)
    # Durations are those beside seven others; a stage alone, half of the devices, takes half as long.
    assert work_s / 2 <= step_s < simulate(found.realized.program, durations).step_s


def test_arrays_add_to_what_starting_programs_takes():
    """One thread starts the programs of both submeshes, which are on one machine."""
    plain, slower = (
        planned(dataclasses.replace(FREE, device=dataclasses.replace(FREE.device, **figures)))
        for figures in ({}, {"array_launch_s": 1.0})
    )
    added = [
        b - a
        for a, b in zip(
            plain.plan.predicted.stage_sync_s, slower.plan.predicted.stage_sync_s, strict=True
        )
    ]
    arrays = [2 * len(stage.layout.accumulators) for stage in plain.realized.stages]
    assert added == pytest.approx([2 * count for count in arrays])


def test_whose_programs_one_thread_starts():
    plan = planned(FREE).plan
    assert neighbours_of(plan, FREE) == (2, 2)
    assert neighbours_of(plan, crowded(FREE, accelerator=True)) == (1, 1)  # a host each


def test_a_class_of_work_may_suffer_more_than_others():
    device = dataclasses.replace(
        FREE.device,
        concurrency=((1.0, 1.0), (8.0, 4.0)),
        crowding={"product": 1.5, "division": 0.1},
    )
    assert device.slowdown(None, "product") == pytest.approx(6.0)
    assert device.slowdown(1, "product") == 1.0
    assert device.slowdown(8, "reduction") == device.slowdown(8) == 4.0
    assert device.slowdown(8, "division") == 1.0  # never faster than alone
    assert 1.0 < device.slowdown(4, "product") / device.slowdown(4) < 1.5


def test_the_parts_of_a_crowded_step_are_those_of_its_timeline():
    """Priced as if all eight computed, and played with four at a time."""
    found = planned(crowded(FREE))
    timeline = found.outlook.timeline
    parts = submesh_parts(found.realized, timeline)
    idle_s = [each.bubble_s + each.transfers_s for each in parts]
    assert sum(idle_s) / 2 / timeline.step_s == pytest.approx(timeline.bubble_fraction)
    assert all(each.step_s == pytest.approx(timeline.step_s) for each in parts)
    assert all(each.recomputation_s == 0 for each in parts)
