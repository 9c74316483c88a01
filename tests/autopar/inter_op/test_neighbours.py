"""What stages cost one another on one machine: search, judge and bounds against finished plans."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import optax
import pytest

from launcher import models
from launcher.autopar.clusters.cluster import load_cluster
from launcher.autopar.inter_op.judge import judged_s
from launcher.autopar.inter_op.neighbours import Neighbours
from launcher.autopar.inter_op.pace import pace_of
from launcher.autopar.inter_op.plan_bounds import least_step_s, lines_of
from launcher.autopar.inter_op.space import PlanOptions, make_space
from launcher.autopar.inter_op.stage_table import (
    StageChoice,
    StageOption,
    Starts,
    make_pieces,
    make_rows,
    that_fit,
)
from launcher.autopar.make_plan import make_plan
from launcher.autopar.programs.crowded import Crowd
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.config import GptConfig
from launcher.errors import InfeasiblePlanError

CONCURRENCY = ((1.0, 1.0), (2.0, 1.9), (4.0, 3.0), (8.0, 5.7))
STARTS = {"program_launch_s": 117e-6, "array_launch_s": 11e-6}
SUBMESHES = ((1, 1), (1, 2), (1, 4))


@pytest.fixture(scope="module")
def gpt():
    return models.build(GptConfig(size="tiny", dtype="fp32"))


def machine(**device):
    cpu8 = load_cluster("cpu8")
    return replace(cpu8, device=replace(cpu8.device, **device))


def options(mode="auto", **fields):
    return PlanOptions(mode=mode, global_batch=32, optimizer=optax.adamw(1e-3), **fields)


@pytest.mark.parametrize(
    "device",
    [STARTS, {"concurrency": CONCURRENCY}, {**STARTS, "concurrency": CONCURRENCY}],
    ids=["starts", "crowded", "both"],
)
def test_no_forced_choice_is_faster_than_none(gpt, device):
    cluster = machine(**device)
    chosen = make_plan(gpt, cluster, options())
    least_s = chosen.predicted.step_s * (1 - chosen.search.optimality_gap)
    forced = [
        *({"pp": pp} for pp in (1, 2, 4)),
        *({"num_microbatches": m} for m in (1, 2, 8)),
        *({"schedule": name} for name in ("1f1b", "zb_h1")),
        {"pp": 4, "tp": 2, "schedule": "zb_h1", "num_microbatches": 2},
    ]
    for choice in forced:
        step_s = make_plan(gpt, cluster, options(**choice)).predicted.step_s
        # The judge sends to the next stage what a finished plan sends where it is read.
        assert step_s >= 0.99 * chosen.predicted.step_s
        assert step_s >= 0.99 * least_s


def test_what_is_forced_is_found_among_what_is_less_forced(gpt):
    """The walk over the numbers of microbatches goes by the same times as the finished plans."""
    cluster = machine(**STARTS, concurrency=CONCURRENCY)
    forced = {"pp": 4, "tp": 2, "schedule": "zb_h1"}
    chosen = make_plan(gpt, cluster, options(**forced))
    for m in (1, 2, 4, 8, 16, 32):
        step_s = make_plan(gpt, cluster, options(**forced, num_microbatches=m)).predicted.step_s
        assert step_s >= 0.99 * chosen.predicted.step_s
        assert step_s >= 0.99 * (1 - chosen.search.optimality_gap) * chosen.predicted.step_s


@pytest.mark.parametrize("mode", ["single", "data", "manual"])
def test_no_number_of_microbatches_is_faster_than_that_of_a_mode(gpt, mode):
    cluster = machine(**STARTS, concurrency=CONCURRENCY, op_overhead_s=30e-6)
    degrees = {"pp": 2, "tp": 2} if mode == "manual" else {}
    chosen = make_plan(gpt, cluster, options(mode, **degrees)).predicted.step_s
    for m in (1, 2, 4):
        forced = options(mode, **degrees, num_microbatches=m)
        assert make_plan(gpt, cluster, forced).predicted.step_s >= 0.99 * chosen


def test_several_submeshes_of_a_host_start_in_turn(gpt):
    """The judge knows, and so the search takes as many stages as that is worth."""
    cluster = replace(machine(**STARTS, accelerator=True), num_hosts=2, devices_per_host=4)
    chosen = make_plan(gpt, cluster, options()).predicted.step_s
    for pp in (1, 2, 4):
        assert make_plan(gpt, cluster, options(pp=pp)).predicted.step_s >= 0.99 * chosen


def test_programs_are_started_in_turn():
    starts = Starts(forward_s=1.0, backward_s=2.0, weight_s=0.5, once_s=3.0)
    option = StageOption(
        forward_s=10.0, backward_s=20.0, weight_s=5.0, once_s=30.0, fixed_bytes=0.0,
        stash_bytes=0.0, tag=None, starts=starts,
    )  # fmt: skip
    four = option.among(1).among(4)
    assert (four.forward_s, four.backward_s, four.weight_s, four.once_s) == (14, 28, 7, 42)
    assert four.among(4) is four
    assert four.among(1) == option.among(1)
    without = replace(option, starts=None)
    assert without.among(4) is without


def test_who_shares_a_machine():
    emulated = machine(**STARTS, concurrency=CONCURRENCY)
    space = make_space(options(), emulated)
    both = Neighbours(emulated, space)
    assert both.starts_take_time
    assert both.are_on_one_machine
    assert both.slow_down
    assert both.at_once(0) == 8
    assert both.crowded().speed_up == 1.0
    apart = machine(**STARTS, concurrency=CONCURRENCY, accelerator=True)
    apart = replace(apart, num_hosts=2, devices_per_host=4)
    neighbours = Neighbours(apart, make_space(options(), apart))
    assert not neighbours.are_on_one_machine  # each host has a thread of its own
    starts = Starts(forward_s=1.0, backward_s=0.0, weight_s=0.0, once_s=0.0)
    option = StageOption(
        forward_s=0.0, backward_s=0.0, once_s=0.0, fixed_bytes=0.0, stash_bytes=0.0, tag=None,
        starts=starts,
    )  # fmt: skip
    stages = [StageChoice(first=i, last=i + 1, submesh=0, option=option) for i in range(3)]
    placed = [((0,), (0, 1)), ((0,), (2, 3)), ((1,), (0, 1, 2, 3))]
    assert [it.option.forward_s for it in neighbours.among_all(stages, placed)] == [2, 2, 1]
    assert neighbours.options_among(3, [option]) == [option]
    crowd = neighbours.crowd([0, 0], [((0,), (0, 1)), ((1,), (0, 1, 2, 3))])
    assert crowd.devices == (Counter({0: 2}), Counter({1: 4}))
    assert crowd.priced == (3.0, 3.0)
    assert neighbours.crowded().speed_up == 1.0
    slower = machine(concurrency=((1.0, 1.0), (4.0, 8.0), (8.0, 16.0)))  # one does most of it all
    assert Neighbours(slower, space).crowded().speed_up == pytest.approx(2.0)
    assert not Neighbours(machine(), space).slow_down
    assert Neighbours(machine(), space).crowd([0], [((0,), (0,))]) is None
    assert Neighbours(machine(), space).crowded() is None


def random_options(rng, pieces):
    def one():
        weight_s = rng.random()
        return StageOption(
            forward_s=rng.random(), backward_s=weight_s + rng.random(), weight_s=weight_s,
            once_s=rng.random(), fixed_bytes=0.0, stash_bytes=0.0, tag=None,
        )  # fmt: skip

    return [
        StageChoice(first=first, last=last, submesh=submesh, option=one())
        for first, last, submesh in pieces.ranges()
    ]


def crowd_of(stages, virtual_stages, slowdown):
    homes = stages[: len(stages) // virtual_stages]
    devices = tuple(Counter({0: SUBMESHES[choice.submesh][1]}) for choice in homes)
    return Crowd(
        devices=devices, slowdown=(slowdown,) * len(homes), priced=(slowdown(None),) * len(homes)
    )


@pytest.mark.parametrize(
    ("name", "v"), [("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("interleaved", 2)]
)
def test_no_plan_of_a_crowd_beats_its_bound(name, v):
    rng, schedule, ratios = random.Random(0), schedule_by_name(name, v), []
    cluster = machine(concurrency=((1.0, 1.0), (2.0, 1.6), (4.0, 2.4)), accelerator=True)
    cluster = replace(cluster, num_hosts=1, devices_per_host=4)
    space = replace(make_space(options(), cluster), submeshes=SUBMESHES, kinds=(0, 0, 0))
    crowded = Neighbours(cluster, space).crowded()
    for _ in range(12):
        m = rng.choice((2, 4, 8))
        pieces = make_pieces(
            num_layers=4, submeshes=SUBMESHES, num_devices=4 * v, cuts=range(5), num_stages=None,
            use_all_devices=True,
        )  # fmt: skip
        choices = random_options(rng, pieces)
        rows = make_rows(pieces, choices, lambda cut: 0.1, pace_of(schedule))
        fitting = that_fit(rows, np.zeros((len(rows), pieces.max_stages)), 1.0)
        bound_s = least_step_s(lines_of(pieces, fitting, schedule, m, 1e9, crowded))
        times_s = [
            judged_s(
                plan, schedule, m, lambda cut: 0.1,
                crowd=crowd_of(plan, v, cluster.device.slowdown),
            )
            for plan in all_plans(choices, v, m)
        ]  # fmt: skip
        assert bound_s <= min(times_s) * (1 + 1e-9)
        ratios.append(bound_s / min(times_s))
    assert np.median(ratios) > 0.5


def all_plans(choices, v, m):
    """All that use up four layers and four devices, of equal submeshes if there are virtual stages."""
    for number in range(1, 5):
        for plan in itertools.product(choices, repeat=number):
            ends = [0, *(choice.last for choice in plan)]
            shapes = {choice.submesh for choice in plan}
            devices = sum(SUBMESHES[choice.submesh][1] for choice in plan)
            follows = all(choice.first == end for choice, end in zip(plan, ends, strict=False))
            is_equal = v == 1 or (len(shapes) == 1 and number % v == 0 and m % (number // v) == 0)
            if follows and ends[-1] == 4 and devices == 4 * v and is_equal:
                yield plan


def test_where_nothing_fits_a_crowd_is_told_so(gpt):
    cluster = machine(**STARTS, concurrency=CONCURRENCY)
    small = replace(cluster, device=replace(cluster.device, memory_bytes=2**19))
    with pytest.raises(InfeasiblePlanError, match="too many"):
        make_plan(gpt, small, options())
