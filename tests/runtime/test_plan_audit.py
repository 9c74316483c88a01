"""For every model, the collectives of a plan's compiled programs are those that were priced."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.space import PlanOptions
from launcher.autopar.make_plan import find_plan
from launcher.autopar.realized.realize import realize
from launcher.autopar.sharding.shards import Ledger
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.models.optimizer import Optimizer
from launcher.runtime import plan_audit
from launcher.runtime.compiled.build_programs import build_programs
from launcher.runtime.compiled.microbatch_programs import MicrobatchPrograms

CONFIGS = {
    "gpt": GptConfig(size="tiny", dtype="fp32", dropout=0.1, layers=3),
    "moe": MoeConfig(size="tiny", dtype="fp32"),
    "wrn": WrnConfig(size="tiny", dtype="fp32"),
    "gpt-fp16": GptConfig(size="tiny", dtype="fp16", layers=2),
}
ON_FOUR = {
    "tensor": {"dp": 1, "tp": 4},
    "data x tensor, zero-3": {"dp": 2, "tp": 2, "zero": 3},
}
ON_EIGHT = {
    "data, zero-2": {"dp": 8, "zero": 2},
    "all three, recomputed": {"dp": 2, "tp": 2, "pp": 2, "recompute": "layer"},
    "stages of data, zero-2": {"dp": 4, "pp": 2, "zero": 2},
    "split, zero-3": {"dp": 2, "tp": 2, "pp": 2, "zero": 3, "schedule": "zb_h1"},
}
CASES = [
    ("gpt", 1, "tensor"), ("gpt", 1, "data x tensor, zero-3"), ("gpt", 2, "data, zero-2"),
    ("gpt", 2, "all three, recomputed"), ("gpt-fp16", 1, "data x tensor, zero-3"),
    ("moe", 1, "data x tensor, zero-3"), ("moe", 2, "data, zero-2"),
    ("wrn", 1, "data x tensor, zero-3"), ("wrn", 2, "data, zero-2"), ("gpt", 2, "split, zero-3"),
]  # fmt: skip
ALL = [(family, 1 + (plan in ON_EIGHT), plan) for family in CONFIGS for plan in ON_FOUR | ON_EIGHT]


def planned_of(family: str, hosts: int, plan: str):
    machine = dataclasses.replace(load_cluster("cpu8"), num_hosts=hosts)
    return planned_with(machine, family, (ON_FOUR | ON_EIGHT)[plan])


def planned_with(machine, family: str, forced):
    model = models.build(CONFIGS[family])
    transform = optax.adafactor(1e-2) if family == "moe" else optax.adamw(1e-3)
    options = PlanOptions(
        mode="manual", global_batch=16, num_microbatches=2, optimizer=transform, **forced
    )
    planned = find_plan(model, machine, options, lambda text: None)
    optimizer = Optimizer(transform=transform, clip_norm=1.0, schedule=lambda step: 0.1)
    grid = np.array(jax.devices()[: machine.num_devices], dtype=object).reshape(-1, 4)
    return planned.realized, model, optimizer, grid


def changed(planned, model, hosts: int, **fields):
    """The plan with other fields in all of its stages, realized."""
    stages = tuple(dataclasses.replace(stage, **fields) for stage in planned.plan.stages)
    machine = dataclasses.replace(load_cluster("cpu8"), num_hosts=hosts)
    return realize(
        dataclasses.replace(planned.plan, stages=stages), model, machine, planned.planner,
        planned.stages[0].settings.optimizer,
    )  # fmt: skip


def audits_of(family: str, hosts: int, plan: str):
    return plan_audit.audit_plan(*planned_of(family, hosts, plan), lambda text: None)


def check(family: str, hosts: int, plan: str) -> None:
    audits = audits_of(family, hosts, plan)
    assert all(audit.audit.agrees for audit in audits), f"\n{plan_audit.report(audits)}"
    assert sum(priced for audit in audits for _, priced, _ in audit.audit.rows) > 4


@pytest.mark.parametrize(("family", "hosts", "plan"), CASES)
def test_what_is_compiled_is_what_was_priced(family, hosts, plan):
    check(family, hosts, plan)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "hosts", "plan"), [case for case in ALL if case not in CASES])
def test_what_is_compiled_is_what_was_priced_in_the_other_cases(family, hosts, plan):
    check(family, hosts, plan)


def test_a_step_that_is_one_program_is_audited_as_one():
    (step,) = audits_of("wrn", 1, "tensor")
    assert str(step).startswith("stage 0, step (a loop over 2 microbatches, whose")
    assert "once a step" in str(step)
    assert plan_audit.report([step]).endswith("priced in 1 program, and the same compiled")


def test_gradients_are_synchronised_once_a_step_and_not_per_microbatch():
    """All that data parallelism communicates of the parameters is in the programs that run once."""
    audits = audits_of("gpt", 2, "stages of data, zero-2")
    assert [(a.stages, a.program) for a in audits] == [
        *(((0,), name) for name in ("forward", "backward", "synchronize", "update")),
        *(((1,), name) for name in ("forward_backward", "synchronize", "update", "reduce_tied")),
    ]
    per_microbatch = [a for a in audits if "ward" in a.program]
    once = [a for a in audits if a.program == "synchronize"]
    assert {a.times for a in per_microbatch} == {2}
    assert {a.times for a in once} == {1}
    reductions = ("all-reduce", "reduce-scatter")
    kinds = {row[0][0] for a in per_microbatch for row in a.audit.rows}
    assert kinds.isdisjoint(reductions)
    assert (
        sum(priced for a in once for (kind, *_), priced, _ in a.audit.rows if kind in reductions)
        > 20
    )


@pytest.mark.parametrize(("family", "hosts", "plan", "names"), [
    ("gpt", 2, "stages of data, zero-2", {"backward_synchronize", "forward_backward_synchronize"}),
    ("moe", 2, "split, zero-3", {"backward_weight_synchronize"}),
    ("wrn", 2, "data, zero-2", set()),
])  # fmt: skip
def test_overlapping_programs_have_the_collectives_of_both(family, hosts, plan, names):
    """And as many as the programs apart: nothing is brought together twice."""
    planned, model, optimizer, grid = planned_of(family, hosts, plan)
    overlapping = changed(planned, model, hosts, overlap=True)
    audits, apart = (
        plan_audit.audit_plan(realized, model, optimizer, grid, lambda text: None)
        for realized in (overlapping, planned)
    )
    assert all(audit.audit.agrees for audit in audits), f"\n{plan_audit.report(audits)}"
    assert {audit.program for audit in audits if audit.program.endswith("_synchronize")} == names
    if names:
        assert all(a.times == 1 for a in audits if a.program in names)
        assert in_a_step(audits) == in_a_step(apart)
    else:
        (step,) = audits
        assert "and those of the last one, behind it, again" in str(step)


@pytest.mark.parametrize("family", ["gpt", "moe", "wrn"])
def test_scattered_gradients_leave_nothing_to_reduce_at_the_end(family):
    planned, model, optimizer, grid = planned_of(family, 2, "stages of data, zero-2")
    scattering = changed(planned, model, 2, scatter=True, strategies={})
    audits, whole = (
        plan_audit.audit_plan(realized, model, optimizer, grid, lambda text: None)
        for realized in (scattering, planned)
    )
    assert all(audit.audit.agrees for audit in audits), f"\n{plan_audit.report(audits)}"
    assert num_scattered(audits, "backward") > num_scattered(whole, "backward")
    assert num_scattered(audits, "synchronize") < num_scattered(whole, "synchronize") / 2
    for one, other in zip(scattering.stages, planned.stages, strict=True):
        # All but what has no dim that the data axis divides.
        sums = {path for path, spec in one.layout.accumulators.items() if spec[0] >= 0}
        assert sums > {path for path, spec in other.layout.accumulators.items() if spec[0] >= 0}


def num_scattered(audits, program: str) -> int:
    """How many reduce-scatters are priced in the programs of a name."""
    return sum(
        priced
        for audited in audits
        if program in audited.program
        for (kind, *_), priced, _ in audited.audit.rows
        if kind == "reduce-scatter"
    )


def in_a_step(audits) -> Counter:
    """How often each collective is priced in a step."""
    found: Counter = Counter()
    for audited in audits:
        for what, priced, _ in audited.audit.rows:
            found[what] += priced * audited.times * len(audited.stages)
    return found


HALVES = ("backward_input", "backward_weight")


def computation_s(stage) -> dict[str, float]:
    """A stage's computation per microbatch, by program, without what it communicates."""
    emitter, found = stage.emitter, dict.fromkeys(("forward", "again", "backward", *HALVES), 0.0)
    for layer in emitter.model.layers[emitter.layout.first : emitter.layout.last]:
        for number, op in enumerate(layer.cls.joint.ops):
            strategy = emitter.picks["op", layer.cls.name, number]
            share = strategy.work_division(emitter.mesh.shape)
            seconds = stage.settings.compute.op_s(op) / share
            found["forward"] += seconds * (op in layer.cls.forward_ops)
            found["again"] += seconds * (op in layer.cls.recomputed_ops())
            found["backward"] += seconds * (op in layer.cls.backward_ops)
            found["backward_input"] += seconds * (op in layer.cls.input_ops)
            found["backward_weight"] += seconds * (op in layer.cls.weight_ops)
    return found


@pytest.mark.parametrize(("family", "hosts", "plan"), [
    ("gpt", 1, "data x tensor, zero-3"), ("moe", 1, "tensor"), ("wrn", 1, "data x tensor, zero-3"),
])  # fmt: skip
def test_what_the_planner_charged_is_what_the_programs_communicate(family, hosts, plan, written):
    realized, model, optimizer, grid = planned_of(family, hosts, plan)
    stage, programs = realized.stages[0], build_programs(realized, model, optimizer, grid)[0]
    computation, seconds = computation_s(stage), stage.sharding.seconds
    for name, charged in (
        ("forward", seconds.forward),
        ("backward", seconds.backward),
        ("backward_input", seconds.backward_input),
        ("backward_weight", seconds.backward_weight),
    ):
        communicated = sum(c.cost for c in written(programs, name))
        assert charged == pytest.approx(computation[name] + communicated, rel=1e-9), name


@pytest.mark.parametrize(("family", "forced"), [
    ("gpt", {"tp": 2, "dp": 2, "zero": 3}), ("gpt", {"tp": 4, "dp": 1}), ("moe", {"tp": 4, "dp": 1}),
    ("wrn", {"tp": 2, "dp": 2}),
])  # fmt: skip
def test_what_is_charged_for_recomputing_layers_is_what_is_written_more(family, forced, written):
    """A layer's forward ops again, but those that its backward pass has no need of."""
    machine = dataclasses.replace(load_cluster("cpu8"), num_hosts=1)
    cost, seconds = {}, {}
    for recompute in ("none", "layer"):
        found = planned_with(machine, family, {**forced, "recompute": recompute})
        realized, model, optimizer, grid = found
        (stage,) = realized.stages
        programs = build_programs(realized, model, optimizer, grid)[0]
        cost[recompute] = sum(c.cost for c in written(programs, "backward"))
        seconds[recompute] = stage.sharding
    again_s = seconds["layer"].backward_s - seconds["none"].backward_s
    communicated_s = cost["layer"] - cost["none"]
    computed = computation_s(stage)
    assert again_s == pytest.approx(computed["again"] + communicated_s, rel=1e-9)
    assert 0 < again_s < stage.sharding.seconds.forward
    if family == "wrn":  # one copy for both halves is priced in the first, and made in the second
        return
    halves_s = stage.sharding.seconds.halves("layer")
    for name, charged_s, more_s in zip(HALVES, halves_s, (computed["again"], 0.0), strict=True):
        communicated_s = sum(c.cost for c in written(programs, name))
        assert charged_s == pytest.approx(computed[name] + more_s + communicated_s, rel=1e-9)


@pytest.fixture
def written(monkeypatch):
    """The collectives of a program of a microbatch, as it is written; it is not compiled."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: lowered)

    def collectives(programs, name: str):
        programs.emitter.ledger = Ledger()
        built = MicrobatchPrograms(programs, split=name in HALVES, gathers=False)
        getattr(built, f"compile_{name}")()
        return programs.emitter.ledger.collectives

    return collectives


def kinds(collectives) -> Counter:
    return Counter((c.kind, c.num_bytes, c.axis, c.dtype) for c in collectives)


@pytest.mark.parametrize("recompute", ["none", "layer", "full"])
@pytest.mark.parametrize(("family", "forced"), [
    ("gpt", {"tp": 2, "dp": 2, "zero": 3}), ("moe", {"tp": 4, "dp": 1}), ("wrn", {"tp": 2, "dp": 2}),
])  # fmt: skip
def test_the_halves_of_a_backward_pass_communicate_what_the_whole_does(
    family, forced, recompute, written
):
    """No collective runs twice, and the prices of the halves add up."""
    machine = dataclasses.replace(load_cluster("cpu8"), num_hosts=1)
    options = {**forced, "recompute": recompute}
    realized, model, optimizer, grid = planned_with(machine, family, options)
    programs = build_programs(realized, model, optimizer, grid)[0]
    whole = kinds(written(programs, "backward"))
    first, second = (kinds(written(programs, name)) for name in HALVES)
    assert first + second == whole
    assert first
    if family == "wrn":
        assert second
    sharding = realized.stages[0].sharding
    assert sharding.backward_input_s + sharding.backward_weight_s == sharding.backward_s
    assert min(sharding.backward_input_s, sharding.backward_weight_s) > 0.0
