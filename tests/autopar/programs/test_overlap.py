"""Programs of stages that synchronise while they go back for the last time."""

import dataclasses
import itertools
import random

import pytest

from launcher.autopar.programs.checker import check
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.crowded import Crowd, simulate_crowded
from launcher.autopar.programs.instructions import LAST_BACKWARDS, Instruction, Op
from launcher.autopar.programs.launches import launches, submesh_launches
from launcher.autopar.programs.needed_programs import needed_programs
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.autopar.programs.step_clock import StepClock
from launcher.errors import ScheduleError

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("interleaved", 2), ("interleaved", 3)]
TIED = ((0, 2), (1, 2))


def program_of(name: str, v: int, overlapping, *, num_submeshes=3, m=6, tied=TIED):
    """A chain of so many submeshes; owners of tied parameters come before their users."""
    wiring = Wiring.chain(num_submeshes * v, tied=tied, with_norm=True, virtual_stages=v)
    wiring = dataclasses.replace(wiring, overlapping=frozenset(overlapping))
    lists = schedule_by_name(name, v).build(num_submeshes * v, m)
    return add_communication(lists, wiring), wiring


def some(seed: int, num_stages: int) -> list[int]:
    return [stage for stage in range(num_stages) if random.Random(seed * 99 + stage).random() < 0.6]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "v"), SCHEDULES)
@pytest.mark.parametrize("m", [3, 6])
def test_the_program_is_right_and_the_pair_one_launch(name, v, m, seed):
    overlapping = some(seed, 3 * v)
    program, wiring = program_of(name, v, overlapping, m=m)
    check(program, wiring)
    order = launches(program, wiring)
    for submesh, entries in enumerate(program.lists):
        played = [e for launch in order if launch.submesh == submesh for e in launch.instructions]
        assert played == list(entries)
        own = [
            e for launch in submesh_launches(program, wiring)[submesh] for e in launch.instructions
        ]
        assert own == list(entries)
    ends = {x.first.stage: x.ops[-2] for x in order if x.is_fused and x.ops[-1] is Op.SYNCHRONIZE}
    backward = Op.BACKWARD_WEIGHT if name == "zb_h1" else Op.BACKWARD
    assert ends == dict.fromkeys(overlapping, backward)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "v"), SCHEDULES)
def test_all_simulators_agree(name, v, seed):
    program, _ = program_of(name, v, some(seed, 3 * v))
    rng, stages = random.Random(seed), range(3 * v)

    def drawn():
        return tuple(float(rng.randint(1, 20)) for _ in stages)

    pairs = itertools.permutations(stages, 2)
    durations = Durations(
        forward_s=drawn(), backward_s=drawn(), backward_input_s=drawn(), backward_weight_s=drawn(),
        synchronize_s=drawn(), update_s=drawn(), norm_s=1.0,
        tied_s={pair: float(rng.randint(1, 90)) for pair in pairs},
        activation_s={(k, k + 1): 2.0 for k in stages}, cotangent_s={(k + 1, k): 3.0 for k in stages},
    )  # fmt: skip
    timeline = simulate(program, durations)
    assert StepClock.of(program).step_s(durations) == timeline.step_s
    alone = Crowd(devices=({0: 1},) * 3, slowdown=(lambda count: 1.0,) * 3, priced=(1.0,) * 3)
    crowded = simulate_crowded(program, durations, alone)
    assert crowded.step_s == pytest.approx(timeline.step_s)
    assert crowded.exposed_s == pytest.approx(timeline.exposed_s)


def seconds(**fields) -> Durations:
    given = {"forward_s": (1.0, 1.0), "backward_s": (2.0, 2.0), "update_s": (0.0, 0.0)}
    return Durations(**given, **fields)


def ends_of(program, durations) -> dict[str, float]:
    return {str(event.instruction): event.end_s for event in simulate(program, durations).events}


def test_cotangents_wait_for_what_is_left_of_synchronisation():
    program, _ = program_of("1f1b", 1, {1}, num_submeshes=2, m=1, tied=())
    ends = ends_of(program, seconds(synchronize_s=(0.0, 5.0), cotangent_s={(1, 0): 1.0}))
    assert ends["1B0"] == 4.0
    assert ends["1S"] == 9.0
    assert ends["1SEND_B0>0"] == 10.0
    assert ends["0B0"] == 12.0


def test_the_last_backward_waits_for_gradients_of_tied_parameters():
    tied_s = {(1, 0): 20.0, (0, 1): 0.0}
    apart, _ = program_of("1f1b", 1, (), num_submeshes=2, m=1, tied=((0, 1),))
    ends = ends_of(apart, seconds(synchronize_s=(1.0, 0.0), tied_s=tied_s))
    assert (ends["0B0"], ends["0S"]) == (6.0, 25.0)
    together, _ = program_of("1f1b", 1, {0}, num_submeshes=2, m=1, tied=((0, 1),))
    ends = ends_of(together, seconds(synchronize_s=(1.0, 0.0), tied_s=tied_s))
    assert (ends["0B0"], ends["0S"]) == (26.0, 27.0)


@pytest.mark.parametrize(
    ("name", "m", "needed"),
    [
        ("1f1b", 4, [{"forward": 4, "backward": 3, "backward_synchronize": 1}] * 2
         + [{"forward_backward": 3, "forward_backward_synchronize": 1}]),
        ("gpipe", 1, [{"forward": 1, "backward_synchronize": 1}] * 2
         + [{"forward_backward_synchronize": 1}]),
        ("zb_h1", 4, [{
            "forward": 4, "backward_input": 4, "backward_weight": 3, "backward_weight_synchronize": 1,
        }] * 3),
    ],
)  # fmt: skip
def test_which_programs_that_takes_and_how_often(name, m, needed):
    found = needed_programs(*program_of(name, 1, {0, 1, 2}, m=m))
    assert [dict(times) for times in found] == [times | {"update": 1} for times in needed]


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_what_stands_between_the_two_is_found(name):
    program, wiring = program_of(name, 1, {0})
    first, *others = program.lists
    synchronize = Instruction(op=Op.SYNCHRONIZE, stage=0)
    at = first.index(synchronize)
    assert first[at - 1].op in LAST_BACKWARDS
    later = (*first[:at], first[at + 1], synchronize, *first[at + 2 :])
    with pytest.raises(ScheduleError, match="0S stands behind 0FREE_K5, and is launched with its"):
        check(dataclasses.replace(program, lists=(later, *others)), wiring)


def test_gradients_that_come_after_the_owners_last_backward_hang():
    with pytest.raises(ScheduleError, match="wait for ever"):
        program_of("1f1b", 1, {1}, tied=((1, 0),))
