"""Plans that leave stages open: how little is enough, and that what is filled in is the best."""

import itertools
import random
from dataclasses import replace

import pytest

from launcher.autopar.clusters.hosts import ClusterRef
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import adopt_plan
from launcher.autopar.plans.plan import ModelRef, Plan, Stage
from launcher.autopar.plans.plan_file import from_json, to_json
from launcher.autopar.plans.summary import summarize
from launcher.autopar.predictions.predict import predict
from launcher.autopar.realized.open_stages import even_cuts
from launcher.autopar.realized.realize import layered_model
from launcher.errors import PlanError

OPTIONS = PlanOptions(mode="from_file", global_batch=32)
ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def gpt(tiny_gpt):
    return tiny_gpt(layers=4)


def open_plan(*stages, **fields):
    given = {"num_microbatches": 4, "schedule": "1f1b", **fields}
    return Plan(
        model=ModelRef(name="gpt", size="tiny"),
        cluster=ClusterRef(name="cpu8", hosts=2, devices_per_host=4),
        global_batch=32,
        stages=tuple(stages),
        **given,
    )


def covers(plan, num_layers):
    """Whether the stages follow one another, each with a layer, from the first to the last."""
    ends = [0, *(stage.layers[1] for stage in plan.stages)]
    follow = [stage.layers for stage in plan.stages] == list(itertools.pairwise(ends))
    return follow and ends == sorted(set(ends)) and ends[-1] == plan.num_layers == num_layers


@pytest.mark.parametrize("seed", range(30))
def test_cuts_are_the_best_of_all(seed):
    draw = random.Random(seed)
    work = [draw.choice((0.0, 1.0, draw.random())) for _ in range(draw.randint(3, 8))]
    devices = [draw.choice((1, 2, 4)) for _ in range(draw.randint(1, 3))]

    def largest(ends):
        return max(
            sum(work[first:last]) / share
            for first, last, share in zip((0, *ends[:-1]), ends, devices, strict=True)
        )

    ends = even_cuts([work] * len(devices), devices)
    every = itertools.combinations(range(1, len(work)), len(devices) - 1)
    assert largest(ends) == pytest.approx(min(largest((*cut, len(work))) for cut in every))
    assert all(first < last for first, last in itertools.pairwise((0, *ends)))


def test_devices_alone_are_enough_for_a_stage(gpt, cpu8):
    given = open_plan(Stage(hosts=(0,), devices=ALL), Stage(hosts=(1,), devices=ALL))
    assert from_json(to_json(given)) == given
    assert "open" in summarize(given, cpu8)
    plan = adopt_plan(given, gpt, cpu8, OPTIONS).plan
    assert covers(plan, len(layered_model(gpt, 8).layers))
    assert all(dict(s.mesh)["data"] * dict(s.mesh)["tensor"] == 4 for s in plan.stages)
    assert all(s.params and s.optimizer_state and s.strategies for s in plan.stages)
    assert plan.cluster == cpu8.ref()
    assert predict(given, gpt, cpu8) == plan.predicted
    assert predict(from_json(to_json(plan)), gpt, cpu8) == plan.predicted


def test_the_mesh_is_the_fastest(gpt, cpu8):
    def step_s(*mesh):
        stages = [Stage(layers=(0, 4), hosts=(0,), devices=ALL, mesh=mesh)]
        return predict(open_plan(*stages), gpt, cpu8).step_s

    every = [step_s(("data", 4 // n), ("tensor", n)) for n in (1, 2, 4)]
    assert step_s() == pytest.approx(min(every), rel=0.01)


def test_a_mesh_that_fits_goes_before_one_that_is_fast(tiny_gpt, cpu8):
    """Over slow links every device had better compute all, and hold all."""
    wide = tiny_gpt(layers=4, hidden=256)
    slow = replace(cpu8, intra_host=replace(cpu8.intra_host, bytes_per_s=1e6))

    def adopted(cluster, *mesh):
        stage = Stage(layers=(0, 4), hosts=(0,), devices=ALL, mesh=mesh)
        return adopt_plan(open_plan(stage, num_microbatches=1), wide, cluster, OPTIONS).plan

    meshes = [(("data", 4 // n), ("tensor", n)) for n in (1, 2, 4)]
    needed = {mesh: adopted(slow, *mesh).predicted.peak_bytes_per_device[0] for mesh in meshes}
    free = adopted(slow).stages[0].mesh
    least = min(needed, key=needed.get)
    assert needed[least] < 0.8 * needed[free]
    memory_bytes = int((needed[least] + needed[free]) / 2)
    small = replace(cpu8.device, memory_bytes=memory_bytes, reserved_bytes=0)
    tight = adopted(replace(slow, device=small))
    assert tight.predicted.peak_bytes_per_device[0] <= memory_bytes


def test_what_a_stage_fixes_decides_its_mesh(gpt, cpu8):
    split = {"blocks/0/mlp/up/kernel": (None, "tensor")}
    stage = Stage(layers=(0, 4), hosts=(0,), devices=ALL, params=split)
    mesh = dict(adopt_plan(open_plan(stage), gpt, cpu8, OPTIONS).plan.stages[0].mesh)
    assert mesh["data"] * mesh["tensor"] == 4


def test_more_stages_than_layers_cut_the_model_finer(gpt, cpu8):
    stages = [Stage(hosts=(i // 4,), devices=(i % 4,)) for i in range(8)]
    plan = adopt_plan(open_plan(*stages), gpt, cpu8, OPTIONS).plan
    assert [stage.layers for stage in plan.stages] == [(i, i + 1) for i in range(8)]


def test_virtual_stages_may_be_open_too(gpt, cpu8):
    stages = [Stage(hosts=(i % 2,), devices=ALL) for i in range(4)]
    given = open_plan(*stages, schedule="interleaved", virtual_stages=2)
    plan = adopt_plan(given, gpt, cpu8, OPTIONS).plan
    assert covers(plan, len(layered_model(gpt, 8).layers))


def test_layers_are_given_for_all_stages_or_none(gpt, cpu8):
    given = open_plan(Stage(hosts=(0,), devices=ALL, layers=(0, 2)), Stage(hosts=(1,), devices=ALL))
    with pytest.raises(
        PlanError,
        match=r"stages\[1\]\.layers is left out, and 1 of 2 stages have theirs: give them all, or none",
    ):
        adopt_plan(given, gpt, cpu8, OPTIONS)


def test_a_microbatch_that_no_mesh_shares_is_told(gpt, cpu8):
    given = open_plan(Stage(hosts=(0, 1), devices=ALL), num_microbatches=32)
    with pytest.raises(
        PlanError,
        match=r"stages\[0\] has no mesh, and none of its 2 hosts x 4 devices shares a microbatch of 1",
    ):
        adopt_plan(given, gpt, cpu8, OPTIONS)
