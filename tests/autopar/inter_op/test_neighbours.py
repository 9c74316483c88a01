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


def options(**fields):
    return PlanOptions(mode="auto", global_batch=32, optimizer=optax.adamw(1e-3), **fields)


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
    assert Neighbours(emulated, space).start_in_turn
    apart = machine(**STARTS, concurrency=CONCURRENCY, accelerator=True)
    apart = replace(apart, num_hosts=2, devices_per_host=4)
    neighbours = Neighbours(apart, make_space(options(), apart))
    assert not neighbours.start_in_turn  # each host has a thread of its own
    crowd = neighbours.crowd([0, 0], [((0,), (0, 1)), ((1,), (0, 1, 2, 3))])
    assert crowd.devices == (Counter({0: 2}), Counter({1: 4}))
    assert crowd.priced == (5.7, 5.7)
    # Four devices of a host do 4 / 3 at most, and are priced at 4 / 5.7.
    assert neighbours.crowded().speed_up == pytest.approx(4 / 3 * 5.7 / 4)
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
