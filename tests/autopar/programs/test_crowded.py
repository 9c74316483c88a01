"""The simulator of crowded machines: as the other one where nobody is slowed, and by hand where they are."""

import random

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.crowded import Crowd, simulate_crowded
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.program import Program, Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.errors import ScheduleError


def program_of(schedule, num_stages, num_microbatches, virtual_stages=1):
    wiring = Wiring.chain(num_stages, with_norm=True, virtual_stages=virtual_stages)
    built = schedule_by_name(schedule, virtual_stages).build(num_stages, num_microbatches)
    return add_communication(built, wiring), wiring


def random_durations(rng, wiring, num_stages):
    def draw():
        return tuple(rng.randint(1, 20) for _ in range(num_stages))

    return Durations(
        forward_s=draw(), backward_s=draw(), synchronize_s=draw(), update_s=draw(),
        backward_input_s=draw(), backward_weight_s=draw(),
        activation_s={edge: rng.randint(0, 25) for edge in wiring.edges},
        cotangent_s={edge[::-1]: rng.randint(0, 25) for edge in wiring.differentiable},
        tied_s={}, norm_s=rng.randint(0, 9),
    )  # fmt: skip


def crowd(num_submeshes, slowdown, priced=1.0, machines=None):
    machines = machines or [0] * num_submeshes
    return Crowd(
        devices=tuple({machine: 1} for machine in machines),
        slowdown=(slowdown,) * num_submeshes,
        priced=(priced,) * num_submeshes,
    )


@pytest.mark.parametrize("seed", range(20))
def test_without_slowing_down_it_is_the_other_simulator(seed):
    rng = random.Random(seed)
    schedule = rng.choice(["gpipe", "1f1b", "zb_h1", "interleaved"])
    submeshes, virtual = rng.randint(2, 4), 2 if schedule == "interleaved" else 1
    program, wiring = program_of(schedule, submeshes * virtual, submeshes * 2, virtual)
    durations = random_durations(rng, wiring, submeshes * virtual)
    free, crowded = (
        simulate(program, durations),
        simulate_crowded(program, durations, crowd(submeshes, lambda at_once: 1.0)),
    )
    assert crowded.step_s == pytest.approx(free.step_s)
    assert crowded.bubble_fraction == pytest.approx(free.bubble_fraction)
    assert crowded.exposed_s == pytest.approx(free.exposed_s)
    assert crowded.stash_peak == free.stash_peak
    ends = [{str(e.instruction): e.end_s for e in t.events} for t in (free, crowded)]
    assert ends[1] == pytest.approx(ends[0])


def durations_of(forward_s, backward_s, update_s=0.0):
    count = len(forward_s)
    return Durations(
        forward_s=forward_s, backward_s=backward_s, synchronize_s=(0.0,) * count,
        update_s=(update_s,) * count,
    )  # fmt: skip


def test_on_one_core_a_pipeline_takes_as_long_as_all_its_work():
    program, _ = program_of("1f1b", 4, 8)
    timeline = simulate_crowded(
        program, durations_of((1.0,) * 4, (2.0,) * 4, 3.0), crowd(4, lambda at_once: at_once)
    )
    assert timeline.step_s == pytest.approx(4 * 8 * 3.0 + 4 * 3.0)


def test_durations_for_a_full_machine_shrink_where_it_is_not_full():
    """Two stages, one microbatch: never do both compute, but for their updates."""
    program, _ = program_of("1f1b", 2, 1)
    timeline = simulate_crowded(
        program, durations_of((4.0, 4.0), (8.0, 8.0), 6.0),
        crowd(2, lambda at_once: at_once, priced=2.0),
    )  # fmt: skip
    assert timeline.step_s == pytest.approx((4 + 4 + 8 + 8) / 2 + 6)


def test_machines_do_not_slow_one_another_down():
    program, _ = program_of("1f1b", 2, 4)
    durations = durations_of((1.0, 1.0), (2.0, 2.0))
    apart = simulate_crowded(program, durations, crowd(2, lambda n: n, machines=[0, 1]))
    assert apart.step_s == pytest.approx(simulate(program, durations).step_s)


def test_what_spans_machines_goes_at_the_pace_of_the_fullest():
    alike = (lambda n: n,) * 2
    wide = Crowd(devices=({0: 1, 1: 1}, {1: 2}), slowdown=alike, priced=(1.0, 1.0))
    assert wide.speeds([0, 1]) == {0: 1 / 3, 1: 1 / 3}
    assert wide.speeds([0]) == {0: 1.0}


def test_a_program_that_waits_for_ever_is_refused():
    program, _ = program_of("1f1b", 2, 1)
    without_sends = tuple(e for e in program.lists[0] if e.op is not Op.SEND_ACTIVATION)
    stuck = Program(lists=(without_sends, program.lists[1]), num_microbatches=1)
    with pytest.raises(ScheduleError, match="2 of 2 submeshes wait for ever"):
        simulate_crowded(stuck, durations_of((1.0, 1.0), (1.0, 1.0)), crowd(2, lambda n: 1.0))
