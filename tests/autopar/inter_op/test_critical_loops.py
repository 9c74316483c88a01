"""The period of a pipeline against the simulator, and of the best plans against all of a small space."""

import itertools
import random

import numpy as np
import pytest

from launcher.autopar.inter_op.critical_loops import Loops
from launcher.autopar.inter_op.judge import judged_s
from launcher.autopar.inter_op.loop_bounds import least_step_s
from launcher.autopar.inter_op.loop_plans import plans_by_period
from launcher.autopar.inter_op.pace import pace_of
from launcher.autopar.inter_op.stage_table import (
    StageChoice,
    StageOption,
    StageTable,
    make_pieces,
    make_rows,
)
from launcher.autopar.programs.schedules import GPipe, OneForwardOneBackward, ZbH1

SCHEDULES = (OneForwardOneBackward(), ZbH1())
SUBMESHES = ((1, 1), (1, 2))


def option(rng):
    weight_s = rng.uniform(0.3, 2)
    return StageOption(
        forward_s=rng.uniform(0.5, 2),
        backward_s=weight_s + rng.uniform(0.5, 2),
        weight_s=weight_s,
        once_s=rng.uniform(0, 2),
        fixed_bytes=0.0,
        stash_bytes=0.0,
        tag=None,
    )


def stage_table(rng, schedule, *, num_layers, num_devices, transfers):
    """A table of random options with transfers, one for each range and submesh, and who pays for them."""
    pieces = make_pieces(
        num_layers=num_layers, submeshes=SUBMESHES, num_devices=num_devices,
        cuts=range(num_layers + 1), num_stages=None, use_all_devices=True,
    )  # fmt: skip
    choices = [
        StageChoice(first=first, last=last, submesh=submesh, option=option(rng))
        for first, last, submesh in pieces.ranges()
    ]
    rows = make_rows(pieces, choices, transfers.__getitem__, pace_of(schedule))
    return StageTable(pieces, rows, choices)


def random_table(rng, schedule, num_layers=5, num_devices=5):
    transfers = [rng.choice((0.0, rng.uniform(0, 6))) for _ in range(num_layers + 1)]
    table = stage_table(
        rng, schedule, num_layers=num_layers, num_devices=num_devices, transfers=transfers
    )
    return table, transfers


def all_plans(table, num_devices):
    """All plans that use up layers and devices, as the numbers of their rows."""
    rows, axis = table.rows, table.pieces.axis

    def chains(start, devices):
        if start == table.pieces.num_pieces:
            if not devices:
                yield ()
            return
        for row in np.flatnonzero(rows["start"] == start).tolist():
            rest = devices - int(axis.takes[rows["submesh"][row]])
            if rest >= 0:
                yield from ((row, *others) for others in chains(int(rows["end"][row]), rest))

    yield from chains(0, num_devices)


def stages_of(table, plan):
    return tuple(table.choices[number] for number in table.rows["number"][list(plan)])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_period_is_what_further_microbatches_take(schedule):
    rng, faster = random.Random(0), 0
    for _ in range(20):
        table, transfers = random_table(rng, schedule)
        loops = Loops.of(table.pieces, table.rows, schedule)
        for plan in rng.sample(list(all_plans(table, 5)), 3):
            stages = stages_of(table, plan)
            many = 120 * len(stages)  # of which each loop goes through a whole number of rounds
            few_s, many_s = (
                judged_s(stages, schedule, m, transfers.__getitem__, warm_up=500)
                for m in (many, 2 * many)
            )
            period_s = loops.period_s(np.array(plan))
            assert (many_s - few_s) / many == pytest.approx(period_s, rel=2e-3)
            longest_s = max(loops.busy_s[list(plan)].max(), loops.waited_s[list(plan)].max())
            faster += period_s < 0.98 * longest_s
    assert faster > 10  # where the longest wait says less than the loops do


@pytest.mark.parametrize("schedule", [*SCHEDULES, GPipe()], ids=str)
def test_a_period_can_be_had_where_a_plan_has_it_and_nowhere_else(schedule):
    rng = random.Random(1)
    for _ in range(20):
        table, _ = random_table(rng, schedule)
        loops = Loops.of(table.pieces, table.rows, schedule)
        plans = [np.array(plan) for plan in all_plans(table, 5)]
        shortest = {
            number: min(loops.period_s(plan) for plan in own)
            for number, own in itertools.groupby(sorted(plans, key=len), key=len)
        }
        for period_s in rng.sample(sorted(shortest.values()), 2):
            for factor in (0.999, 1.0):
                within = loops.within(factor * period_s)
                expected = {n for n, least_s in shortest.items() if least_s <= factor * period_s}
                assert set(within.numbers().tolist()) == expected
                for plan in within.plans():
                    assert within.loops.period_s(plan) <= within.period_s * (1 + 1e-9)
        low_s, best = loops.shortest(max(shortest.values()))
        assert low_s <= min(shortest.values()) * (1 + 1e-9)
        assert min(shortest.values()) <= best.period_s * (1 + 1e-9)
        assert loops.shortest(0.5 * min(shortest.values())) is None


def uneven_chain(rng, schedule, num_stages):
    """The only plan there is of some stages, of which some do hardly anything, and what they receive."""
    transfers = [0.0, *(rng.choice((0.0, rng.uniform(0, 3))) for _ in range(num_stages))]
    pieces = make_pieces(
        num_layers=num_stages, submeshes=((1, 1),), num_devices=num_stages,
        cuts=range(num_stages + 1), num_stages=num_stages, use_all_devices=True,
    )  # fmt: skip
    choices = []
    for first, last, submesh in pieces.ranges():
        scale = rng.choice((0.01, 0.1, 1.0))
        forward_s, input_s, weight_s = (scale * rng.uniform(0.5, 1.5) for _ in range(3))
        held = StageOption(
            forward_s=forward_s, backward_s=input_s + weight_s, weight_s=weight_s, once_s=0.0,
            fixed_bytes=0.0, stash_bytes=0.0, tag=None,
        )  # fmt: skip
        choices.append(StageChoice(first=first, last=last, submesh=submesh, option=held))
    rows = make_rows(pieces, choices, transfers.__getitem__, pace_of(schedule))
    return StageTable(pieces, rows, choices), transfers


@pytest.mark.parametrize("schedule", [*SCHEDULES, GPipe()], ids=str)
def test_no_step_is_shorter_than_its_period_says(schedule):
    rng, ratios = random.Random(3), []
    for _ in range(300):
        number, m = rng.randint(1, 6), rng.choice((1, 4, 7, 13, 16, 61))
        table, transfers = uneven_chain(rng, schedule, number)
        loops, plan = Loops.of(table.pieces, table.rows, schedule), np.arange(number)
        period_s = loops.period_s(plan)
        bound_s = least_step_s(loops.within(period_s), m, period_s, np.inf)[number]
        stages = stages_of(table, plan)
        step_s = judged_s(stages, schedule, m, transfers.__getitem__, warm_up=500)
        assert bound_s <= step_s * (1 + 1e-9)
        ratios.append(bound_s / step_s)
    assert np.median(ratios) > (0.8 if isinstance(schedule, GPipe) else 0.95)


def test_a_loop_is_not_closed_before_the_last_forwards_have_left():
    """With as many rounds as m - 1 holds, this step would take 183 s."""
    seconds, schedule, m = (1.0, 1.0, 0.01, 0.01, 0.01), OneForwardOneBackward(), 61
    transfers = [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    pieces = make_pieces(
        num_layers=5, submeshes=((1, 1),), num_devices=5, cuts=range(6), num_stages=5,
        use_all_devices=True,
    )  # fmt: skip
    choices = [
        StageChoice(
            first=stage,
            last=stage + 1,
            submesh=0,
            option=StageOption(
                forward_s=s, backward_s=s, once_s=0.0, fixed_bytes=0.0, stash_bytes=0.0, tag=None
            ),
        )
        for stage, s in enumerate(seconds)
    ]
    rows = make_rows(pieces, choices, transfers.__getitem__, pace_of(schedule))
    loops = Loops.of(pieces, rows, schedule)
    period_s = loops.period_s(np.arange(5))
    step_s = judged_s(choices, schedule, m, transfers.__getitem__, warm_up=500)
    assert least_step_s(loops.within(period_s), m, period_s, np.inf)[5] <= step_s < 183


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_plans_of_short_periods_come_near_the_best(schedule):
    rng, m, ratios = random.Random(2), 40, []
    for _ in range(15):
        table, transfers = random_table(rng, schedule)
        room_bytes = np.full(len(table.rows), 1e9)

        def judge(stages, transfers=transfers):
            return judged_s(stages, schedule, m, transfers.__getitem__)

        best_s = min(judge(stages_of(table, plan)) for plan in all_plans(table, 5))
        found = plans_by_period(table, schedule, m, room_bytes, 2 * best_s)
        ratios.append(min(map(judge, found)) / best_s)
    assert max(ratios) < 1.05
    assert np.mean(ratios) < 1.01
