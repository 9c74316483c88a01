"""Balanced stages with free communication take exactly what the papers' formulas say.

The closed forms beside simulated times are a table, tests/golden/schedules/closed_forms.txt, that
`python -m pytest --update-golden tests/autopar/test_closed_forms.py` writes anew.
"""

import time

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import (
    GPipe,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
    schedule_by_name,
)
from launcher.autopar.programs.simulator import lower_bound_s, simulate

NAMES = ("gpipe", "1f1b")
GROUPED = [(p, v, p * groups) for p in (1, 2, 3, 4, 8) for v in (2, 3, 4) for groups in (1, 2, 5)]
SPLITS = [(1, 1, 1), (3, 3, 3), (1, 2, 1), (2, 3, 2), (3, 2, 1), (2, 2, 1), (5, 4, 4), (9, 7, 2)]
SHAPES = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 8), (4, 2), (4, 8), (8, 8), (8, 40), (5, 13)]


def build(name, num_stages, num_microbatches, wiring=None):
    compute_lists = schedule_by_name(name).build(num_stages, num_microbatches)
    return add_communication(compute_lists, wiring or Wiring.chain(num_stages))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
@pytest.mark.parametrize(("forward_s", "backward_s"), [(1, 1), (1, 2), (3, 7), (5, 2)])
@pytest.mark.parametrize("rendezvous", [False, True])
def test_balanced_stages_take_the_closed_form(
    name, num_stages, num_microbatches, forward_s, backward_s, rendezvous, balanced
):
    durations = balanced(num_stages, forward_s, backward_s)
    program = build(name, num_stages, num_microbatches)
    timeline = simulate(program, durations, rendezvous=rendezvous)
    num_rounds = num_microbatches + num_stages - 1
    assert timeline.step_s == num_rounds * (forward_s + backward_s)
    assert timeline.bubble_fraction == pytest.approx((num_stages - 1) / num_rounds, abs=1e-12)
    assert timeline.exposed_s == (0,) * num_stages
    assert timeline.step_s == lower_bound_s(durations, Wiring.chain(num_stages), num_microbatches)


@pytest.mark.parametrize(("p", "v", "m"), GROUPED)
@pytest.mark.parametrize(("forward_s", "backward_s"), [(1, 1), (1, 2), (3, 7), (5, 2)])
def test_interleaved_stages_take_the_closed_form(p, v, m, forward_s, backward_s, balanced):
    """The durations of a stage are a v-th of a submesh's: the bubble is a v-th of 1F1B's."""
    durations, wiring = (
        balanced(p * v, forward_s, backward_s),
        Wiring.chain(p * v, virtual_stages=v),
    )
    program = add_communication(Interleaved(virtual_stages=v).build(p * v, m), wiring)
    timeline = simulate(program, durations)
    assert timeline.step_s == (m * v + p - 1) * (forward_s + backward_s)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * v + p - 1), abs=1e-12)
    assert timeline.exposed_s == (0,) * p
    assert timeline.step_s == lower_bound_s(durations, wiring, m)
    assert timeline.step_s <= simulate(program, durations, rendezvous=True).step_s


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize(("forward_s", "input_s", "weight_s"), SPLITS)
def test_zb_h1_takes_the_closed_form(p, m, forward_s, input_s, weight_s, balanced):
    durations = balanced(p, forward_s, input_s + weight_s, (input_s, weight_s))
    program = add_communication(ZbH1().build(p, m), Wiring.chain(p))
    timeline = simulate(program, durations)
    work_s = m * (forward_s + input_s + weight_s)
    bubble_s = (p - 1) * (forward_s + input_s - weight_s)
    if m < p:  # too few microbatches to fill the last stage's wait with weight gradients
        bubble_s = (p - 1) * (forward_s + input_s) - (m - 1) * weight_s
    assert timeline.step_s == work_s + bubble_s
    bound_s = lower_bound_s(durations, Wiring.chain(p), m, splits_backward=True)
    assert bound_s <= timeline.step_s
    if forward_s == input_s == weight_s:
        assert timeline.step_s == bound_s
        assert m < p or bubble_s == (p - 1) * forward_s  # a third of 1F1B's (p - 1)(f + 2f)


@pytest.mark.parametrize(("forward_s", "input_s", "weight_s"), [(4, 2, 3), (2, 4, 3)])
def test_zb_h1_with_dear_weight_gradients_is_slower_than_its_formula(
    forward_s, input_s, weight_s, balanced
):
    """It holds while w <= f and w <= i: longer ones hold up what other stages wait for."""
    durations = balanced(4, forward_s, 99, (input_s, weight_s))
    program = add_communication(ZbH1().build(4, 8), Wiring.chain(4))
    least_s = 8 * (forward_s + input_s + weight_s) + 3 * (forward_s + input_s - weight_s)
    assert simulate(program, durations).step_s > least_s


def test_the_table_of_closed_forms(golden, balanced):
    """Balanced stages, free communication, forward 1; backward 2, or input 1 and weight 1."""
    lines = [
        f"{'schedule':<14}{'p':>3}{'v':>3}{'m':>4}{'formula':>9}{'simulated':>11}{'bubble':>8}"
    ]
    for p, m in ((2, 8), (4, 8), (4, 32), (8, 32)):
        for name, v in (
            ("gpipe", 1),
            ("1f1b", 1),
            ("interleaved", 2),
            ("interleaved", 4),
            ("zb_h1", 1),
        ):
            schedule = schedule_by_name(name, v)
            program = add_communication(
                schedule.build(p * v, m), Wiring.chain(p * v, virtual_stages=v)
            )
            timeline = simulate(program, balanced(p * v, 1 / v, 2 / v, (1, 1)))
            formula_s = 3 * m + (p - 1) * (1 if name == "zb_h1" else 3 / v)
            assert timeline.step_s == formula_s
            lines.append(
                f"{name:<14}{p:>3}{v:>3}{m:>4}{formula_s:>9g}{timeline.step_s:>11g}"
                f"{timeline.bubble_fraction:>8.1%}"
            )
    golden("schedules/closed_forms.txt", "\n".join([*lines, ""]))


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_stash_peaks_are_those_of_the_formulas(num_stages, num_microbatches, balanced):
    durations = balanced(num_stages, 1, 2)
    gpipe = simulate(build("gpipe", num_stages, num_microbatches), durations)
    assert gpipe.stash_peak == (num_microbatches,) * num_stages
    one_f_one_b = simulate(build("1f1b", num_stages, num_microbatches), durations)
    assert one_f_one_b.stash_peak == tuple(
        min(num_microbatches, num_stages - stage) for stage in range(num_stages)
    )


_SOON_S = 4.0  # twice what it takes on a busy machine
LARGE = {
    GPipe(): (16, (1024 + 15) * 3),
    OneForwardOneBackward(): (16, (1024 + 15) * 3),
    ZbH1(): (16, 1024 * 3 + 15),
    Interleaved(virtual_stages=2): (16, (2 * 1024 + 7) * 1.5),  # on 8 submeshes
}


@pytest.mark.parametrize("schedule", LARGE)
def test_a_large_program_is_built_and_simulated_in_time(schedule, balanced):
    num_stages, step_s = LARGE[schedule]
    v = schedule.virtual_stages
    wiring = Wiring.chain(num_stages, tied=((0, num_stages - 1),), with_norm=True, virtual_stages=v)
    durations = balanced(num_stages, 1 / v, 2 / v, (1, 1))
    took_s = float("inf")
    for _ in range(3):  # other processes may share the core
        start_s = time.process_time()
        program = add_communication(schedule.build(num_stages, 1024), wiring)
        timeline = simulate(program, durations)
        took_s = min(took_s, time.process_time() - start_s)
        if took_s < _SOON_S:
            break
    assert took_s < _SOON_S
    assert timeline.step_s == step_s
