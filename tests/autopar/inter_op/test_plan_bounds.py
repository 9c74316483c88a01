"""No plan beats its bound: all plans of small random spaces, played by the simulator."""

import itertools
import math
import random

import numpy as np
import pytest

from launcher.autopar.inter_op.by_period import by_period_s
from launcher.autopar.inter_op.judge import judged_s
from launcher.autopar.inter_op.pace import pace_of
from launcher.autopar.inter_op.paired_stages import paired_stages_s
from launcher.autopar.inter_op.plan_bounds import least_step_s, lines_of
from launcher.autopar.inter_op.stage_table import (
    StageChoice,
    StageOption,
    StageTable,
    make_pieces,
    make_rows,
    needed_bytes,
    shared_bytes,
    that_fit,
)
from launcher.autopar.inter_op.submesh_bound import (
    busiest_submesh_s,
    fastest_options_s,
    least_together,
)
from launcher.autopar.programs.schedules import GPipe, Interleaved, OneForwardOneBackward, ZbH1

SCHEDULES = [GPipe(), OneForwardOneBackward(), ZbH1(), Interleaved(virtual_stages=2)]
NUM_LAYERS = 4
SUBMESHES = ((1, 1), (1, 2))


def random_choices(rng, pieces, *, even):
    """One or two ways for every range on every submesh; `even`: in proportion to the layers."""
    found = []
    for first, last, submesh in pieces.ranges():
        for number in range(rng.randint(1, 2)):
            draw = (lambda: 1.0) if even else (lambda: 0.2 + rng.random())
            scale = (last - first) / (1 + submesh)
            option = StageOption(
                forward_s=scale * draw(),
                backward_s=scale * (1.0 + draw()),
                weight_s=scale,
                once_s=0.0 if even else rng.random(),
                fixed_bytes=(last - first) * rng.random(),
                stash_bytes=rng.random(),
                tag=number,
            )
            found.append(StageChoice(first=first, last=last, submesh=submesh, option=option))
    return found


def all_plans(choices, num_devices, schedule, m):
    """Every chain of choices over all layers that takes up all devices."""

    def chains(start, devices):
        if start == NUM_LAYERS:
            if not devices:
                yield []
            return
        for choice in choices:
            size = (choice.submesh + 1) if choice.first == start else devices + 1
            if size <= devices:
                yield from ([choice, *rest] for rest in chains(choice.last, devices - size))

    v = schedule.virtual_stages
    for plan in chains(0, num_devices * v):
        equal = len({choice.submesh for choice in plan}) == 1
        if v == 1 or (equal and len(plan) % v == 0 and m % (len(plan) // v) == 0):
            yield plan


def fits(plan, schedule, m, memory_bytes):
    return all(
        choice.option.fixed_bytes + schedule.stash_peak(i, len(plan), m) * choice.option.stash_bytes
        <= memory_bytes
        for i, choice in enumerate(plan)
    )


def case(rng, schedule, *, even=False):
    """(bound, a sharper one where there is one, the times of all plans) of a random space."""
    devices = rng.choice((1, 2, 4) if even else (1, 2, 3))
    m = rng.choice((6, 12) if even or schedule.virtual_stages > 1 else (1, 2, 4, 9))
    pieces = make_pieces(
        num_layers=NUM_LAYERS, submeshes=SUBMESHES, num_devices=devices * schedule.virtual_stages,
        cuts=range(NUM_LAYERS + 1), num_stages=None, use_all_devices=True,
    )  # fmt: skip
    choices = random_choices(rng, pieces, even=even)
    received_s = [0.0 if even else rng.choice((0.0, rng.random())) for _ in range(NUM_LAYERS + 1)]
    memory_bytes = 1e9 if even else rng.choice((2.0, 4.0, 1e9))
    rows = make_rows(pieces, choices, received_s.__getitem__, pace_of(schedule))
    # At least so many: where it depends on the number of all stages, that of the last ones.
    held = np.array(
        [
            min(schedule.stash_peak(n - s, n, m) for n in numbers)
            if (numbers := [n for n in range(s, 7) if n % schedule.virtual_stages == 0])
            else 1
            for s in pieces.numbers_of_stages
        ]
    )
    fitting = that_fit(rows, needed_bytes(rows, held), memory_bytes)
    lines = lines_of(pieces, fitting, schedule, m, memory_bytes) if len(fitting) else ()
    bound_s = least_step_s(lines) if lines else math.inf
    plans = all_plans(choices, devices, schedule, m)
    times_s = [
        judged_s(plan, schedule, m, received_s.__getitem__)
        for plan in plans
        if fits(plan, schedule, m, memory_bytes)
    ]
    sharper_s = bound_s
    if times_s and schedule.virtual_stages == 1:
        enough_s = rng.choice((1.0, 1.5)) * max(times_s)
        room_bytes = np.full(len(fitting), memory_bytes)
        sharper_s = by_period_s(pieces, fitting, schedule, m, room_bytes, enough_s)
    return bound_s, sharper_s, times_s


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_plan_beats_the_bounds(schedule):
    rng = random.Random(0)
    ratios, sharper = [], []
    for _ in range(60):
        bound_s, sharper_s, times_s = case(rng, schedule)
        if times_s:
            assert min(times_s) >= max(bound_s, sharper_s) * (1 - 1e-9)
            ratios.append(bound_s / min(times_s))
            sharper.append(sharper_s / min(times_s))
    assert len(ratios) > 30
    is_virtual = isinstance(schedule, Interleaved)
    assert np.median(ratios) > (0.5 if is_virtual else 0.8)  # it says something
    assert np.mean(sharper) > (0.5 if is_virtual else 0.99)


def shared_case(rng, p):
    """Bounds for p submeshes that hold two stages each, in memory that is short, and all plans' times."""
    schedule, m = SCHEDULES[3], rng.choice((1, 2, 4)) * p
    pieces = make_pieces(
        num_layers=2 * p + 1, submeshes=((1, 1),), num_devices=2 * p, cuts=range(2 * p + 2),
        num_stages=2 * p, use_all_devices=True,
    )  # fmt: skip
    choices = [
        StageChoice(
            first=first,
            last=last,
            submesh=0,
            option=StageOption(
                forward_s=(last - first) * (3 - way) * (0.5 + rng.random()),
                backward_s=(last - first) * (3 - way) * (0.5 + rng.random()),
                once_s=rng.random(),
                fixed_bytes=(last - first) * (1 + way) * rng.random(),
                stash_bytes=(1 + way) * rng.random() / m,
                workspace_bytes=rng.random(),
                gradient_bytes=rng.random(),
                tag=None,
            ),
        )
        for first, last, _ in pieces.ranges()
        for way in range(2)
    ]
    most_s, memory_bytes = rng.choice((0.1, 3.0)), 2 + 2 * rng.random()
    received_s = [most_s * rng.random() for _ in range(2 * p + 2)]
    rows = make_rows(pieces, choices, received_s.__getitem__, pace_of(schedule))
    held = np.array([schedule.stash_peak(2 * p - s, 2 * p, m) for s in range(1, 2 * p + 1)])
    fitting = that_fit(rows, needed_bytes(rows, held), memory_bytes)
    bounds_s = (
        least_step_s(lines_of(pieces, fitting, schedule, m, memory_bytes)) if len(fitting) else 0.0,
        busiest_submesh_s(pieces, fitting, schedule, m, memory_bytes),
        paired_stages_s(pieces, fitting, schedule, m, memory_bytes),
    )
    starts = [[c for c in choices if c.first == first] for first in range(2 * p + 1)]

    def chains(first, left):
        if first == 2 * p + 1 and not left:
            yield []
        elif first <= 2 * p and left:
            for choice in starts[first]:
                yield from ([choice, *rest] for rest in chains(choice.last, left - 1))

    def fits_together(plan):
        held = [schedule.stash_peak(i, 2 * p, m) for i in range(2 * p)]
        options = [choice.option for choice in plan]
        needed = (shared_bytes(options[j::p], held[j::p], (0, 0)) for j in range(p))
        return max(needed) <= memory_bytes

    times_s = [
        judged_s(plan, schedule, m, received_s.__getitem__)
        for plan in chains(0, 2 * p)
        if fits_together(plan)
    ]
    return bounds_s, times_s


@pytest.mark.parametrize("p", [1, 2, 3])
def test_no_plan_beats_the_bounds_of_memory_that_stages_share(p):
    rng, ratios = random.Random(p), []
    for _ in range(60):
        bounds_s, times_s = shared_case(rng, p)
        for bound_s in bounds_s:
            assert bound_s <= min(times_s, default=math.inf) * (1 + 1e-9)
        if times_s:
            ratios.append(max(bounds_s) / min(times_s))
    assert len(ratios) > 20
    assert np.median(ratios) > 0.9


def one_layer(first, **seconds):
    """A stage of a layer that takes no memory."""
    option = StageOption(**seconds, fixed_bytes=0.0, stash_bytes=0.0, tag=None)
    return StageChoice(first=first, last=first + 1, submesh=0, option=option)


def fastest_case(rng, num_options, m, *, num_layers=4):
    """The bound of the fastest options of four stages on two submeshes, and the times of all plans."""
    schedule, p = SCHEDULES[3], 2
    pieces = make_pieces(
        num_layers=num_layers, submeshes=((1, 1),), num_devices=2 * p, cuts=range(num_layers + 1),
        num_stages=2 * p, use_all_devices=True,
    )  # fmt: skip
    choices = {}
    for first, last, submesh in pieces.ranges():
        for _ in range(num_options):
            option = StageOption(
                forward_s=(last - first) * (0.5 + rng.random()),
                backward_s=(last - first) * (0.5 + rng.random()),
                once_s=rng.random(), fixed_bytes=0.0, stash_bytes=0.0, tag=None,
            )  # fmt: skip
            choice = StageChoice(first=first, last=last, submesh=submesh, option=option)
            choices.setdefault((first, last), []).append(choice)
    received_s = [0.1 * rng.random() for _ in range(num_layers + 1)]
    every = [choice for ways in choices.values() for choice in ways]
    rows = make_rows(pieces, every, received_s.__getitem__, pace_of(schedule))
    times_s = [
        judged_s(plan, schedule, m, received_s.__getitem__)
        for inner in itertools.combinations(range(1, num_layers), 2 * p - 1)
        for plan in itertools.product(
            *(choices[ends] for ends in itertools.pairwise((0, *inner, num_layers)))
        )
    ]
    table = StageTable(pieces, rows, every)
    return fastest_options_s(table, schedule, m, received_s.__getitem__), times_s


@pytest.mark.parametrize("m", [8, 64])  # played whole, and played in part
@pytest.mark.parametrize("num_layers", [4, 6])  # one way to cut, and ten
def test_no_plan_beats_the_fastest_options(m, num_layers):
    rng, ratios = random.Random(0), []
    for _ in range(15):
        bound_s, times_s = fastest_case(rng, 2, m, num_layers=num_layers)
        assert bound_s <= min(times_s)
        ratios.append(bound_s / min(times_s))
    assert np.median(ratios) > 0.8
    bound_s, times_s = fastest_case(rng, 1, m, num_layers=num_layers)
    assert 0.98 * min(times_s) < bound_s < min(times_s)


def chain_of_layers(num_layers, num_stages):
    """A table of equal layers with free transfers, for the fastest options."""
    pieces = make_pieces(
        num_layers=num_layers, submeshes=((1, 1),), num_devices=num_stages,
        cuts=range(num_layers + 1), num_stages=num_stages, use_all_devices=True,
    )  # fmt: skip
    choices = [
        one_layer(first, forward_s=1.0, backward_s=2.0, once_s=0.0) for first in range(num_layers)
    ]
    rows = make_rows(pieces, choices, lambda cut: 0.0, pace_of(SCHEDULES[3]))
    return StageTable(pieces, rows, choices)


@pytest.mark.parametrize(("num_layers", "is_one_way"), [(80, True), (81, False)])
def test_the_fastest_options_of_many_stages_say_something_where_there_is_one_way(
    num_layers, is_one_way
):
    table, m = chain_of_layers(num_layers, 80), 400
    bound_s = fastest_options_s(table, SCHEDULES[3], m, lambda cut: 0.0)
    assert bound_s > 3.0 * 2 * m if is_one_way else bound_s == 0.0


def test_options_that_share_memory_take_the_least_that_fits():
    rng = random.Random(0)
    for _ in range(40):
        options = [
            [
                StageOption(
                    forward_s=rng.random(),
                    backward_s=rng.random(),
                    once_s=0.0,
                    fixed_bytes=rng.random(),
                    stash_bytes=rng.random(),
                    tag=None,
                )  # fmt: skip
                for _ in range(4)
            ]
            for _ in range(3)
        ]
        held = [3, 2, 1]
        fitting = [
            chosen
            for chosen in itertools.product(*options)
            if shared_bytes(chosen, held, (0,) * 3) <= 5
        ]
        if fitting:
            best_s = min(sum(option.seconds for option in chosen) for chosen in fitting)
            found = least_together(options, held, 5)
            assert shared_bytes(found, held, (0,) * 3) <= 5
            assert sum(option.seconds for option in found) == pytest.approx(best_s)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_equal_layers_with_free_transfers_reach_the_bound(schedule):
    rng = random.Random(1)
    for _ in range(30):
        bound_s, _, times_s = case(rng, schedule, even=True)
        assert min(times_s) == pytest.approx(bound_s, rel=0.1)


def test_many_microbatches_are_judged_by_a_few():
    rng = random.Random(2)
    few = itertools.product(SCHEDULES, (2, 3))
    for schedule, p in (*few, (SCHEDULES[1], 48)):
        stages = [
            one_layer(
                i,
                forward_s=1 + rng.random(),
                backward_s=2 + rng.random(),
                weight_s=1.0,
                once_s=rng.random(),
            )
            for i in range(p * schedule.virtual_stages)
        ]
        m = 20 * p if p < 10 else 6 * p
        transfer_s = [rng.random() for _ in range(100)].__getitem__
        few_s = judged_s(stages, schedule, m, transfer_s)
        all_s = judged_s(stages, schedule, m, transfer_s, warm_up=m)
        assert few_s == pytest.approx(all_s, rel=2e-3)
