"""What is said where nothing fits; every value that a message names does fit."""

import re
from dataclasses import replace

import pytest

from launcher import models
from launcher.autopar.inter_op.advice import (
    check_batch,
    check_degrees,
    check_experts,
    check_stages,
    memory_cures,
)
from launcher.autopar.inter_op.space import PlanOptions, fits
from launcher.autopar.realized.realize import layered_model
from launcher.config import MoeConfig
from launcher.errors import ConfigError, InfeasiblePlanError


def options(mode, **fields):
    return PlanOptions(mode=mode, **{"global_batch": 32, **fields})


def refusal(check, *arguments):
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cures(message):
    """The values that a message names after `set`, by key."""
    named = re.findall(r"([a-z_.]+)=([\d, or.]*\d)", message.partition("; set ")[2])
    return {key: [int(text) for text in re.findall(r"\d+", values)] for key, values in named}


IMPOSSIBLE = {
    "three do not divide a host": ("auto", {"tp": 3}, r"tp=3 .*divide the 4 devices of a host"),
    "no tensor axis over hosts": ("auto", {"tp": 8}, r"tp=8 .*divide the 4 devices of a host"),
    "no three stages of four": ("auto", {"tp": 4, "pp": 3}, r"tp=4, parallel\.pp=3 .* take all 8"),
    "no rectangle of three": ("auto", {"dp": 3}, r"dp=3 .*whole hosts.* take all 8"),
    "more stages than devices": ("auto", {"pp": 20}, r"pp=20 .* take all 8"),
    "experts on another axis": ("auto", {"dp": 2, "ep": 4}, r"ep=4 .*data axis, of 2 devices"),
    "experts on three": ("auto", {"ep": 3}, r"ep=3"),
    "by hand too few": ("manual", {"dp": 3}, r"dp 3 x tp 1 x pp 1 is 3 devices, not 8"),
    "by hand too many": (
        "manual",
        {"dp": 2, "tp": 2, "pp": 4},
        r"dp 2 x tp 2 x pp 4 is 16 devices",
    ),
    "by hand, tensor": ("manual", {"tp": 3}, r"tp=3 .*divide the 4 devices of a host"),
    "by hand, experts": ("manual", {"tp": 2, "ep": 3}, r"data axis, of 4 devices here"),
    "data alone": ("data", {"dp": 4}, r"dp 4 x tp 1 x pp 1 is 4 devices, not 8"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_degrees_that_cannot_be_are_told_with_those_that_can(cpu8, case):
    mode, degrees, words = IMPOSSIBLE[case]
    given = options(mode, **degrees)
    message = refusal(check_degrees, given, cpu8)
    assert re.search(words, message)
    assert "num_microbatches" not in message, "nobody set it"
    named = cures(message)
    for key, values in named.items():
        for value in values:
            assert fits(replace(given, **{key.removeprefix("parallel."): value}), cpu8), (
                key,
                value,
            )
    assert named or "leave" in message


def test_stages_of_six_devices_are_no_rectangles(cpu8):
    message = refusal(check_degrees, options("manual", pp=2), replace(cpu8, num_hosts=3))
    assert "parallel.pp=2 cannot share out the 3 hosts x 4 devices" in message
    assert cures(message)["parallel.pp"] == [1, 3, 6, 12]


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"pp": 8}, {"dp": 4, "tp": 2}])
def test_degrees_that_fit_pass(cpu8, degrees):
    check_degrees(options("manual", **degrees), cpu8)
    check_degrees(options("auto", **degrees), cpu8)


def test_microbatches_divide_the_batch(cpu8):
    message = refusal(check_batch, options("data", num_microbatches=5), cpu8)
    assert "train.global_batch=32 does not divide into parallel.num_microbatches=5" in message
    assert cures(message)["parallel.num_microbatches"] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("mode", ["data", "zero", "manual"])
def test_a_microbatch_has_a_sample_for_every_data_shard(cpu8, mode):
    message = refusal(check_batch, options(mode, num_microbatches=32), cpu8)
    assert (
        "a microbatch of 1 sample (train.global_batch=32, parallel.num_microbatches=32)" in message
    )
    assert f"a data axis of 8 devices (parallel={mode})" in message
    assert cures(message) == {"parallel.num_microbatches": [1, 2, 4], "train.global_batch": [256]}
    assert ("degrees" in message) == (mode == "manual"), "other modes have no degrees to change"


def test_a_batch_that_no_microbatch_makes_even(cpu8):
    message = refusal(check_batch, options("data", global_batch=12), cpu8)
    assert "a batch of 12 samples (train.global_batch=12) cannot be shared evenly" in message
    assert cures(message) == {"train.global_batch": [16]}
    implied = refusal(check_batch, options("auto", global_batch=12, tp=1, pp=1), cpu8)
    assert "data axis of 8 devices (parallel=auto, parallel.tp=1, parallel.pp=1)" in implied
    check_batch(options("auto", global_batch=12), cpu8)


def test_more_stages_than_layers(cpu8):
    many = replace(cpu8, num_hosts=100)
    # One sample is shared by the tensor axis of one host, of 4 devices.
    with pytest.raises(
        InfeasiblePlanError, match=r"400 devices are 100 stages, .* 99 layers; set a"
    ):
        check_stages(options("auto"), many, num_layers=99, microbatch_size=1)
    check_stages(options("auto"), many, num_layers=100, microbatch_size=1)
    check_stages(options("auto"), many, num_layers=50, microbatch_size=2)


def test_experts_are_there_and_can_be_divided(cpu8, tiny_gpt):
    dense = layered_model(tiny_gpt(layers=2), 4)
    for ep in (None, 1):
        check_experts(options("auto", ep=ep), cpu8, dense)
    message = refusal(check_experts, options("auto", ep=2), cpu8, dense)
    assert "parallel.ep=2 splits experts, and the model has none" in message
    six = MoeConfig(size="tiny", dtype="fp32", experts=6, layers=2)
    experts = layered_model(models.build(six), 4)
    check_experts(options("auto", ep=2), cpu8, experts)
    message = refusal(check_experts, options("auto", ep=4), cpu8, experts)
    assert "parallel.ep=4 does not divide the 6 experts of the model" in message
    assert cures(message)["parallel.ep"] == [1, 2], "three devices are no data axis here"


@pytest.mark.parametrize(
    ("given", "named", "not_named"),
    [
        (options("single"), ["recompute=layer", "parallel=auto"], ["tp", "zero", "hosts"]),
        (options("data"), ["recompute=layer", "parallel=zero"], ["tp", "zero=3"]),
        (options("zero"), ["zero=3", "parallel=auto", "cluster.hosts=5 or more"], ["tp"]),
        (options("zero", zero=3), ["recompute=layer"], ["zero=3"]),
        (options("zero", recompute="layer"), ["zero=3"], ["recompute"]),
        (options("manual"), ["recompute=layer", "zero=3", "parallel.tp"], ["parallel=auto"]),
        (options("auto"), ["cluster.hosts=5 or more"], ["recompute", "zero", "parallel=auto"]),
        (
            options("auto", recompute="none", zero=2),
            ["out parallel.recompute", "out parallel.zero"],
            [],
        ),
        (options("data", num_microbatches=1), ["num_microbatches=2 or 4"], []),
        (options("data", num_microbatches=4), ["recompute"], ["num_microbatches"]),
    ],
)
def test_cures_for_memory_are_those_of_the_mode(cpu8, given, named, not_named):
    text = memory_cures(given, cpu8, 10_000_000)(2.5)
    assert all(words in text for words in named)
    assert not any(words in text for words in not_named)
    assert text.startswith("what may help: ")
    assert text.endswith(
        "take a smaller model.size (of about 4 million parameters instead of 10 million)"
    )


def test_cures_have_no_numbers_where_none_are_known(cpu8):
    text = memory_cures(options("auto"), cpu8, 10_000_000)(None)
    assert "set more cluster.hosts (there are 2)" in text
    assert text.endswith("take a smaller model.size")
