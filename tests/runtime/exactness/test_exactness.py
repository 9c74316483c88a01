"""Every plan trains as one device does: the small model of each family, plan by plan.

In double precision only the order of sums differs: after 20 steps loss and parameters are within 1e-9 of
each tensor's largest entry, with dropout, clipping, and other data in every step. In single precision the
first step is compared; there a gradient that is zero in truth (a key's bias) is all rounding, so its scale
is at least a thousandth of the largest gradient of all.

The summary of a run has the largest errors of every case; the whole table is
`pytest tests/runtime/exactness/test_exactness.py -m "slow or not slow"`.
"""

import jax
import pytest

STEPS = 20
PLANS = {
    # Written by hand, with nothing but what a plan must say.
    "one device": {
        "microbatches": 16,
        "stages": [{"layers": 4, "hosts": [0], "devices": [0]}],
    },
    "tensor": {
        "microbatches": 1,
        "stages": [{"layers": 4, "hosts": [0], "devices": [0, 1, 2, 3]}],
    },
    "zero-3, full": {
        "microbatches": 4,
        "stages": [
            {
                "layers": 4, "hosts": [0, 1], "devices": [0, 1, 2, 3], "data": 4, "zero": 3,
                "recompute": "full",
            },
        ],
    },
    "gpipe, layer, zero-1": {
        "microbatches": 4,
        "schedule": "gpipe",
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 1},
            {"layers": 4, "hosts": [1], "devices": [2, 3], "data": 2, "recompute": "layer"},
        ],
    },
    "1f1b, 1x2 2x1 1x4": {
        "microbatches": 8,
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0, 1]},
            {
                "layers": 3, "hosts": [0], "devices": [2, 3], "data": 2, "zero": 2,
                "scatter": True,
            },
            {"layers": 2, "hosts": [1], "devices": [0, 1, 2, 3], "recompute": "layer"},
        ],
    },
    "1f1b over two hosts": {
        "microbatches": 4,
        "stages": [
            {"layers": 3, "hosts": [0, 1], "devices": [0, 1], "data": 2, "recompute": "full"},
            {"layers": 1, "hosts": [0, 1], "devices": [2, 3], "data": 4, "zero": 2},
        ],
    },
    "1f1b, 4 stages": {
        "microbatches": 16,
        "stages": [
            {"layers": layers, "hosts": [0], "devices": [device]}
            for device, layers in enumerate((1, 2, 1, 1))
        ],
    },
    "interleaved": {
        "microbatches": 4,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "stages": [
            {"layers": layers, "hosts": [0], "devices": [index % 2]}
            for index, layers in enumerate((1, 2, 1, 2))
        ],
    },
    "interleaved, changing meshes": {
        "microbatches": 8,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 2},
            {"layers": 1, "hosts": [1], "devices": [0, 1], "recompute": "layer"},
            {"layers": 1, "hosts": [0], "devices": [0, 1], "recompute": "full"},
            {"layers": 2, "hosts": [1], "devices": [0, 1], "data": 2, "zero": 3},
        ],
    },
    "zb_h1": {
        "microbatches": 8,
        "schedule": "zb_h1",
        "stages": [
            {"layers": layers, "hosts": [0], "devices": [device]}
            for device, layers in enumerate((1, 3, 2))
        ],
    },
    "zb_h1, 2x1 2x2, layer, full": {
        "microbatches": 4,
        "schedule": "zb_h1",
        "stages": [
            {
                "layers": 3, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 3,
                "scatter": True, "recompute": "layer",
            },
            {
                "layers": 2, "hosts": [1], "devices": [0, 1, 2, 3], "data": 2, "zero": 1,
                "recompute": "full",
            },
        ],
    },
    # Made by the planner.
    "data": {"microbatches": 2, "mode": "data"},
    "zero-2": {"microbatches": 2, "mode": "zero"},
    "all three": {
        "microbatches": 2, "mode": "manual", "dp": 2, "tp": 2, "pp": 2, "recompute": "layer",
    },
    "auto": {"microbatches": 4, "mode": "auto"},
}  # fmt: skip
FAMILIES = ("gpt", "moe", "wrn", "custom")
# Every plan once, every family with a schedule of its own; a GPT and an MoE take longest to compile.
PLAIN = [
    ("gpt", "interleaved, changing meshes"),
    ("moe", "zb_h1, 2x1 2x2, layer, full"),
    ("wrn", "interleaved"),
]
PLAIN += [("custom", plan) for plan in PLANS if plan not in [taken for _, taken in PLAIN]]
SLOW = [(family, plan) for family in FAMILIES for plan in PLANS if (family, plan) not in PLAIN]


def check(exact, family: str, plan: str, note) -> None:
    executor = exact.executor_for(exact.model_of(family), PLANS[plan])
    _, gradients = exact.first_gradients(executor, 1e-9)
    largest = exact.train(executor, STEPS, 1e-9) | {"gradients": gradients}
    note("largest errors", [family, plan, "fp64", largest])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("family", "plan"), PLAIN)
def test_twenty_steps_in_double_precision(exact, family, plan, record_property):
    check(exact, family, plan, record_property)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("family", "plan"), SLOW)
def test_twenty_steps_in_double_precision_of_the_others(exact, family, plan, record_property):
    check(exact, family, plan, record_property)


def check_in_single_precision(exact, family: str, plan: str, note) -> None:
    executor = exact.executor_for(exact.model_of(family, "fp32"), PLANS[plan])
    loss, gradients = exact.first_gradients(executor, 1e-5, floor=1e-3)
    note("largest errors", [family, plan, "fp32", {"loss": loss, "gradients": gradients}])


@pytest.mark.parametrize("plan", ["zero-3, full", "zb_h1"])
def test_the_first_step_in_single_precision(exact, plan, record_property):
    check_in_single_precision(exact, "custom", plan, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_the_first_step_in_single_precision_of_every_plan(exact, family, plan, record_property):
    check_in_single_precision(exact, family, plan, record_property)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["interleaved, changing meshes", "1f1b, 1x2 2x1 1x4"])
def test_evaluation_after_a_step(exact, family, plan):
    exact.check_evaluation(exact.executor_for(exact.model_of(family), PLANS[plan]))


@pytest.mark.usefixtures("double")
def test_evaluation_of_interleaved_stages(exact):
    plan = PLANS["interleaved, changing meshes"]
    exact.check_evaluation(exact.executor_for(exact.model_of("custom"), plan))


def test_the_plans_are_all_kinds():
    by_hand = [plan for plan in PLANS.values() if "stages" in plan]
    stages = [stage for plan in by_hand for stage in plan["stages"]]
    assert {plan.get("schedule", "1f1b") for plan in by_hand} == {
        "gpipe", "1f1b", "interleaved", "zb_h1",
    }  # fmt: skip
    assert {stage.get("zero", 0) for stage in stages} == {0, 1, 2, 3}
    assert {stage.get("recompute", "none") for stage in stages} == {"none", "layer", "full"}
    assert {plan["microbatches"] for plan in PLANS.values()} == {1, 2, 4, 8, 16}
    assert {plan for _, plan in PLAIN} == set(PLANS)
    assert {family for family, _ in PLAIN} == set(FAMILIES)
    assert not jax.config.jax_enable_x64
