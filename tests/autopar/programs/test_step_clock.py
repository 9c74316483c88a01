"""The clock of a program against the simulator, to the last bit."""

import random

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.autopar.programs.step_clock import StepClock

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("interleaved", 2), ("interleaved", 3)]


def durations(draw, wiring, stages):
    def each():
        return tuple(draw() for _ in range(stages))

    return Durations(
        forward_s=each(),
        backward_s=each(),
        backward_input_s=each(),
        backward_weight_s=each(),
        synchronize_s=each(),
        update_s=each(),
        activation_s={pair: draw() for pair in wiring.edges},
        cotangent_s={(b, a): draw() for a, b in wiring.differentiable},
        tied_s={pair: draw() for a, b in wiring.tied for pair in ((a, b), (b, a))},
        norm_s=draw(),
    )


@pytest.mark.parametrize(("name", "v"), SCHEDULES)
@pytest.mark.parametrize("submeshes", [1, 2, 3])
def test_the_clock_shows_what_the_simulator_shows(name, v, submeshes):
    rng, stages = random.Random(submeshes), submeshes * v
    wiring = Wiring.chain(
        stages, with_norm=True, virtual_stages=v, tied=((0, stages - 1),) if stages > 1 else ()
    )
    program = add_communication(schedule_by_name(name, v).build(stages, 6), wiring)
    clock = StepClock.of(program)
    for _ in range(20):
        given = durations(rng.random, wiring, stages)
        assert clock.step_s(given) == simulate(program, given, with_events=False).step_s


def test_a_reader_of_two_values_waits_for_the_later_one():
    wiring = Wiring(
        edges=((0, 1), (0, 2), (1, 2)), differentiable=((0, 1), (0, 2), (1, 2)), with_norm=True
    )
    program = add_communication(schedule_by_name("1f1b", 1).build(3, 4), wiring)
    rng = random.Random(0)
    for _ in range(20):
        given = durations(rng.random, wiring, 3)
        assert StepClock.of(program).step_s(given) == simulate(program, given).step_s
