"""The DP against an enumeration of all plans, and placements against a picture of the cluster."""

import itertools
import math
import random
import re
import time

import pytest

from launcher.autopar.inter_op.inter_op import plan_stages
from launcher.autopar.inter_op.placement import place
from launcher.autopar.inter_op.stage_table import StageOption
from launcher.errors import InfeasiblePlanError

CASES, CASES_PER_TEST = 1600, 200
SUBMESHES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8))


def one_f_one_b(stages_to_end, num_microbatches):
    return min(stages_to_end, num_microbatches)


def gpipe(stages_to_end, num_microbatches):
    del stages_to_end
    return num_microbatches


def option(seconds=1.0, once_s=0.0, fixed_bytes=0.0, stash_bytes=0.0, tag=None):
    return StageOption(
        forward_s=seconds / 4,
        backward_s=seconds - seconds / 4,
        once_s=once_s,
        fixed_bytes=fixed_bytes,
        stash_bytes=stash_bytes,
        tag=tag,
    )


def random_case(rng):
    """Arguments of plan_stages: at most 5 layers and 8 devices, some of them without a plan."""
    num_layers = rng.choice((1, 2, 3, 4, 5, 5))
    inner = [cut for cut in range(1, num_layers) if rng.random() < 0.9]
    submeshes = rng.sample([(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4)], rng.randint(2, 4))
    draw = rng.choice((rng.random, lambda: float(rng.randint(0, 3))))  # the second one makes ties
    num_microbatches = rng.choice((1, 2, 3, 4, 8, 32))
    once_weight = rng.choice((0.0, 1.0, 5.0, num_microbatches, 2 * num_microbatches))
    counts = (0, 1, 2, 2, 2, 3) if num_layers > 3 else (0, 3, 6, 8)
    table = {
        (first, last, submesh): tuple(
            option(
                seconds=(last - first) * (0.2 + draw()),
                once_s=once_weight * draw(),
                fixed_bytes=(last - first) * draw(),
                stash_bytes=draw(),
                tag=(first, last, submesh, number),
            )
            for number in range(rng.choice(counts))
        )
        for first, last in itertools.combinations(range(num_layers + 1), 2)
        for submesh in range(len(submeshes))
    }
    received_s = [rng.random() for _ in range(num_layers + 1)]
    return {
        "num_layers": num_layers,
        "submeshes": submeshes,
        "num_devices": rng.randint(1, 8),
        "num_microbatches": num_microbatches,
        "memory_bytes": rng.choice((3.0, 5.0, 10.0, 100.0)),
        "options": lambda *key: table[key],
        "cuts": (0, *inner, num_layers),
        "in_flight": rng.choice((one_f_one_b, gpipe)),
        "num_stages": rng.choice((None, None, rng.randint(1, len(inner) + 1))),
        "use_all_devices": rng.random() < 0.7,
        "transfer_s": received_s.__getitem__,
    }


def all_plans(case):
    """Every row of stages, as (first, last, submesh, option), that the cluster has room for."""
    cuts, sizes = case["cuts"], [math.prod(shape) for shape in case["submeshes"]]
    for chosen in itertools.product((False, True), repeat=len(cuts) - 2):
        bounds = [0, *itertools.compress(cuts[1:-1], chosen), case["num_layers"]]
        if case["num_stages"] not in (None, len(bounds) - 1):
            continue
        for submeshes in itertools.product(range(len(sizes)), repeat=len(bounds) - 1):
            idle = case["num_devices"] - sum(sizes[submesh] for submesh in submeshes)
            if idle < 0 or (idle and case["use_all_devices"]):
                continue
            pairs = zip(itertools.pairwise(bounds), submeshes, strict=True)
            ranges = [(first, last, submesh) for (first, last), submesh in pairs]
            for options in itertools.product(*(case["options"](*key) for key in ranges)):
                yield [(*key, chosen) for key, chosen in zip(ranges, options, strict=True)]


def seconds_of(plan, case):
    times = [
        chosen.seconds + (case["transfer_s"](first) if first else 0.0)
        for first, _, _, chosen in plan
    ]
    longest_once_s = max(chosen.once_s for _, _, _, chosen in plan)
    return sum(times) + (case["num_microbatches"] - 1) * max(times) + longest_once_s


def bytes_of(plan, case):
    return max(
        chosen.fixed_bytes
        + case["in_flight"](len(plan) - i, case["num_microbatches"]) * chosen.stash_bytes
        for i, (_, _, _, chosen) in enumerate(plan)
    )


def check_against_all_plans(case):
    plans = list(all_plans(case))
    fitting = [plan for plan in plans if bytes_of(plan, case) <= case["memory_bytes"]]
    if fitting:
        result = plan_stages(**case)
        stages = [(stage.first, stage.last, stage.submesh, stage.option) for stage in result.stages]
        assert stages in fitting
        assert result.total_s == pytest.approx(seconds_of(stages, case), rel=1e-12)
        assert result.total_s == pytest.approx(
            min(seconds_of(plan, case) for plan in fitting), rel=1e-12
        )
        return "found"
    with pytest.raises(InfeasiblePlanError) as error:
        plan_stages(**case)
    missing = re.search(r"([\d,]+) bytes too many", str(error.value))
    if not plans:
        assert missing is None
        return "none"
    least_bytes = min(bytes_of(plan, case) for plan in plans)
    assert int(missing[1].replace(",", "")) == math.ceil(least_bytes - case["memory_bytes"])
    return "too large"


@pytest.mark.parametrize("seed", range(CASES // CASES_PER_TEST))
def test_no_plan_is_better_than_the_one_found(seed):
    rng = random.Random(seed)
    seen = [check_against_all_plans(random_case(rng)) for _ in range(CASES_PER_TEST)]
    assert set(seen) == {"found", "none", "too large"}
    assert seen.count("found") > CASES_PER_TEST // 3


def plan(table, **changes):
    """Plan 2 layers on 4 devices; `table` has the options of each (first, last, submesh shape)."""
    case = {
        "num_layers": 2,
        "submeshes": ((1, 1), (1, 2), (1, 3), (1, 4)),
        "num_devices": 4,
        "num_microbatches": 4,
        "memory_bytes": 10.0,
        "cuts": (0, 1, 2),
        "in_flight": one_f_one_b,
        **changes,
    }
    shapes = case["submeshes"]
    return plan_stages(
        options=lambda first, last, submesh: table.get((first, last, shapes[submesh]), ()), **case
    )


def tags(result):
    return [stage.option.tag for stage in result.stages]


def test_total_counts_the_slowest_stage_once_per_further_microbatch():
    table = {
        (0, 1, (1, 2)): [option(seconds=2.0, once_s=3.0, tag="first")],
        (1, 2, (1, 2)): [option(seconds=1.0, once_s=5.0, tag="second")],
    }
    result = plan(table, transfer_s=lambda cut: 0.5 * cut)
    assert tags(result) == ["first", "second"]
    assert [(stage.first, stage.last, stage.submesh) for stage in result.stages] == [
        (0, 1, 1),
        (1, 2, 1),
    ]
    assert result.total_s == 2.0 + 1.5 + 3 * 2.0 + 5.0
    assert (result.num_candidates, result.num_too_large) == (2, 0)


def test_number_of_stages_can_be_forced():
    table = {
        (0, 2, (1, 4)): [option(seconds=1.0, tag="whole")],
        (0, 1, (1, 2)): [option(seconds=2.0, tag="first")],
        (1, 2, (1, 2)): [option(seconds=2.0, tag="second")],
    }
    assert tags(plan(table)) == ["whole"]
    assert tags(plan(table, num_stages=1)) == ["whole"]
    assert tags(plan(table, num_stages=2)) == ["first", "second"]


def test_devices_may_stay_idle_only_if_allowed():
    table = {
        (0, 2, (1, 4)): [option(seconds=3.0, tag="all")],
        (0, 2, (1, 2)): [option(seconds=2.0, tag="some")],
    }
    assert tags(plan(table)) == ["all"]
    assert tags(plan(table, use_all_devices=False)) == ["some"]


def test_slow_work_once_per_step_is_weighed_against_microbatches():
    table = {
        (0, 2, (1, 4)): [
            option(seconds=1.0, once_s=8.0, tag="slow update"),
            option(seconds=2.0, once_s=1.0, tag="fast update"),
        ]
    }
    assert tags(plan(table, num_microbatches=4)) == ["fast update"]
    assert tags(plan(table, num_microbatches=16)) == ["slow update"]


@pytest.mark.parametrize(
    ("in_flight", "expected", "num_too_large"),
    [(one_f_one_b, ["lean", "fast"], 1), (gpipe, ["lean", "lean"], 2)],
)
def test_stages_further_from_the_end_stash_more(in_flight, expected, num_too_large):
    # The fast way fits with one microbatch in flight, not with two.
    ways = [option(seconds=1.0, stash_bytes=6.0, tag="fast"), option(seconds=2.0, tag="lean")]
    table = {(0, 1, (1, 2)): ways, (1, 2, (1, 2)): ways}
    result = plan(table, in_flight=in_flight)
    assert tags(result) == expected
    assert result.num_too_large == num_too_large


def test_only_ranges_that_leave_room_for_the_others_are_asked_for():
    asked = []

    def options(*key):
        asked.append(key)
        return (option(),)

    plan_stages(
        num_layers=4,
        submeshes=((1, 2), (1, 4)),
        num_devices=4,
        num_microbatches=1,
        memory_bytes=1.0,
        options=options,
        cuts=(0, 1, 4),
        in_flight=gpipe,
    )
    assert asked == [(0, 1, 0), (0, 4, 1), (1, 4, 0)]


def test_cuts_must_begin_and_end_with_the_model():
    with pytest.raises(ValueError, match=r"cuts \(0, 2\) do not ascend from 0 to the 3 layers"):
        plan({}, num_layers=3, cuts=(0, 2))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"num_stages": 3},
            r"4 devices and 2 pieces .* to 3 stages on .* 1x1, .*\(parallel.pp=3\); set another",
        ),
        (
            {"submeshes": ((1, 3), (2, 4))},
            r"4 devices .* any number of stages on submeshes of 1x3, 2x4 \(parallel.pp=null\)",
        ),
        ({}, r"some of the 2 layers have no sharding .*parallel.num_microbatches=4\); set another"),
    ],
)
def test_what_no_plan_can_do_is_said(changes, text):
    with pytest.raises(InfeasiblePlanError, match=text):
        plan({(0, 1, (1, 2)): [option()]}, **changes)


def test_missing_memory_is_that_of_the_least_demanding_plan():
    gib = 2.0**30
    table = {
        (0, 2, (1, 4)): [option(fixed_bytes=9 * gib, stash_bytes=4 * gib)],
        (0, 1, (1, 2)): [option(fixed_bytes=5 * gib, stash_bytes=3 * gib)],
        (1, 2, (1, 2)): [option(fixed_bytes=12 * gib)],
    }
    text = (
        r"needs 12 GiB for layer 1 of 2 on a device that has 10 GiB, 2 GiB or 2,147,483,648 bytes too many "
        r"\(parallel\.num_microbatches=4\); set parallel\.zero=3$"
    )
    with pytest.raises(InfeasiblePlanError, match=text):
        plan(table, memory_bytes=10 * gib, cures=lambda times: "set parallel.zero=3")


def paper_scale_case(num_layers, num_microbatches, **changes):
    """64 devices, 10 ways per stage, and a memory that lets about half of them fit."""
    rng = random.Random(num_layers)
    work = [rng.uniform(0.8, 1.2) for _ in range(num_layers)]
    table = {}
    for first, last in itertools.combinations(range(num_layers + 1), 2):
        total = sum(work[first:last])
        for submesh, (hosts, devices) in enumerate(SUBMESHES):
            size = hosts * devices
            slowdown = 1 + 0.2 * math.log2(size)
            table[first, last, submesh] = [
                option(
                    seconds=total / size * slowdown * (1 + way % 2 / 3) * rng.uniform(1, 1.1),
                    once_s=total / size * hosts * rng.uniform(1, 3),
                    fixed_bytes=total / size * (1 + (way % 3 == 0)),
                    stash_bytes=total / size * (0.3 if way % 2 == 0 else 0.04),
                )
                for way in range(10)
            ]
    return {
        "num_layers": num_layers,
        "submeshes": SUBMESHES,
        "num_devices": 64,
        "num_microbatches": num_microbatches,
        "memory_bytes": 3 * sum(work) / 64,
        "options": lambda *key: table[key],
        "cuts": range(num_layers + 1),
        "in_flight": one_f_one_b,
        **changes,
    }


@pytest.mark.parametrize("num_microbatches", [1, 8, 128])
def test_tens_of_passes_are_enough(num_microbatches):
    result = plan_stages(**paper_scale_case(16, num_microbatches))
    assert result.num_too_large > result.num_candidates // 10
    assert result.num_passes < 100


@pytest.mark.slow
@pytest.mark.parametrize(("num_layers", "limit_s"), [(24, 2.0), (48, 6.0)])
def test_paper_scale_takes_seconds(num_layers, limit_s):
    case = paper_scale_case(num_layers, 128)
    start_s = time.process_time()
    plan_stages(**case)
    assert time.process_time() - start_s < limit_s


def check_placement(submeshes, placed, num_hosts, devices_per_host):
    taken = [pair for hosts, devices in placed for pair in itertools.product(hosts, devices)]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(itertools.product(range(num_hosts), range(devices_per_host)))
    assert [(len(hosts), len(devices)) for hosts, devices in placed] == list(submeshes)
    for hosts, devices in placed:
        assert hosts == tuple(range(hosts[0], hosts[-1] + 1))
        assert devices == tuple(range(devices[0], devices[-1] + 1))


@pytest.mark.parametrize("seed", range(5))
def test_powers_of_two_always_fit_and_are_aligned(seed):
    rng = random.Random(seed)
    for _ in range(100):
        num_hosts, devices_per_host = rng.randint(1, 9), rng.choice((1, 2, 4, 8, 16))
        left, submeshes = num_hosts * devices_per_host, []
        while left and rng.random() < 0.95:  # sometimes devices stay idle
            slices = [(1, 2**k) for k in range(devices_per_host.bit_length())]
            blocks = [(hosts, devices_per_host) for hosts in range(2, num_hosts + 1)]
            submeshes.append(rng.choice([s for s in slices + blocks if math.prod(s) <= left]))
            left -= math.prod(submeshes[-1])
        placed = place(submeshes, num_hosts, devices_per_host)
        check_placement(submeshes, placed, num_hosts, devices_per_host)
        assert all(devices[0] % len(devices) == 0 for _, devices in placed)


def test_equal_stages_are_placed_in_their_order():
    assert place([(1, 2), (1, 4), (1, 2), (2, 8)], 3, 8) == (
        ((2,), (4, 5)),
        ((2,), (0, 1, 2, 3)),
        ((2,), (6, 7)),
        ((0, 1), tuple(range(8))),
    )


def test_slices_that_are_no_powers_of_two_are_packed():
    submeshes = [(1, 4), (1, 3), (1, 4), (1, 6), (1, 4), (1, 3), (1, 12)]
    check_placement(submeshes, place(submeshes, 3, 12), 3, 12)


@pytest.mark.parametrize("submeshes", [[(1, 8)] * 3, [(2, 12), (1, 1)], [(2, 6)], [(1, 24)]])
def test_what_does_not_fit_is_refused(submeshes):
    hosts, devices = submeshes[0]
    text = rf"submeshes of {hosts}x{devices}.* out of 2 hosts of 12 .*\(cluster.hosts=2\); set"
    with pytest.raises(InfeasiblePlanError, match=text):
        place(submeshes, 2, 12)
