"""Stages that synchronise while they go back for the last time train as one device does.

Every program that ends with `synchronize` is there: a loop with its last microbatch behind it, a backward
pass alone, one with its forward pass, and the second half of a split one; with gradients that lie as their
sums do and others, and with gradients of tied parameters, lent and borrowed.
"""

import pytest

STEPS = 20
ALL = [0, 1, 2, 3]
PLANS = {
    "a loop, zero-2": {
        "microbatches": 4,
        "stages": [{"layers": 4, "hosts": [0], "devices": ALL, "data": 4, "zero": 2}],
    },
    "a loop, zero-3, layer": {
        "microbatches": 2,
        "stages": [
            {
                "layers": 4, "hosts": [0], "devices": ALL, "data": 2, "zero": 3,
                "recompute": "layer",
            },
        ],
    },
    "one microbatch": {
        "microbatches": 1,
        "stages": [{"layers": 4, "hosts": [0], "devices": ALL, "data": 2}],
    },
    "1f1b": {
        "microbatches": 8,
        "stages": [
            {"layers": 1, "hosts": [0], "devices": [0, 1], "data": 2},
            {"layers": 3, "hosts": [0], "devices": [2, 3], "data": 2, "zero": 2},
            {"layers": 2, "hosts": [1], "devices": ALL, "data": 2, "recompute": "full"},
        ],
    },
    "gpipe": {
        "microbatches": 4,
        "schedule": "gpipe",
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 1},
            {"layers": 2, "hosts": [1], "devices": [0, 1], "recompute": "layer"},
        ],
    },
    "gpipe, one microbatch": {
        "microbatches": 1,
        "schedule": "gpipe",
        "stages": [
            {"layers": 2, "hosts": [0], "devices": [0, 1]},
            {"layers": 2, "hosts": [1], "devices": [0, 1], "data": 2, "zero": 3},
        ],
    },
    "interleaved": {
        "microbatches": 4,
        "schedule": "interleaved",
        "virtual_stages": 2,
        "stages": [
            {"layers": layers, "hosts": [index % 2], "devices": [0, 1], "data": 2, "zero": zero}
            for index, (layers, zero) in enumerate([(1, 0), (2, 2), (1, 3), (2, 0)])
        ],
    },
    "zb_h1": {
        "microbatches": 4,
        "schedule": "zb_h1",
        "stages": [
            {"layers": 3, "hosts": [0], "devices": [0, 1], "data": 2, "zero": 3},
            {
                "layers": 2, "hosts": [1], "devices": ALL, "data": 2, "zero": 2,
                "recompute": "layer",
            },
        ],
    },
}  # fmt: skip
PLAIN = [
    ("gpt", "1f1b"), ("moe", "zb_h1"), ("wrn", "interleaved"), ("gpt", "a loop, zero-2"),
    *(("custom", plan) for plan in PLANS if plan not in ("1f1b", "zb_h1", "interleaved")),
]  # fmt: skip
SLOW = [
    (f, plan) for f in ("gpt", "moe", "wrn", "custom") for plan in PLANS if (f, plan) not in PLAIN
]


def overlapping(plan: str) -> dict:
    given = PLANS[plan]
    return given | {"stages": [stage | {"overlap": True} for stage in given["stages"]]}


def check(exact, family: str, plan: str, note) -> None:
    executor = exact.executor_for(exact.model_of(family), overlapping(plan))
    _, gradients = exact.first_gradients(executor, 1e-9)
    largest = exact.train(executor, STEPS, 1e-9) | {"gradients": gradients}
    note("largest errors", [family, f"{plan}, overlapping", "fp64", largest])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("family", "plan"), PLAIN)
def test_twenty_steps_in_double_precision(exact, family, plan, record_property):
    check(exact, family, plan, record_property)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("family", "plan"), SLOW)
def test_twenty_steps_in_double_precision_of_the_others(exact, family, plan, record_property):
    check(exact, family, plan, record_property)
