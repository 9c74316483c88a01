"""Memory over time, by hand and against the stash peak."""

import pytest

from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import (
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
    schedule_by_name,
)
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.autopar.programs.timeline import StageMemory, memory_over_time
from launcher.errors import ScheduleError


def durations(num_stages, transfer_s):
    edges = [(stage, stage + 1) for stage in range(num_stages - 1)]
    return Durations(
        forward_s=(1,) * num_stages,
        backward_s=(2,) * num_stages,
        synchronize_s=(0,) * num_stages,
        update_s=(1,) * num_stages,
        backward_input_s=(1,) * num_stages,
        backward_weight_s=(1,) * num_stages,
        activation_s=dict.fromkeys(edges, transfer_s),
        cotangent_s={(dst, src): transfer_s for src, dst in edges},
    )


def test_memory_of_two_stages_by_hand():
    program = add_communication(OneForwardOneBackward().build(2, 1), Wiring.chain(2))
    timeline = simulate(program, durations(2, transfer_s=1))
    # 0F0 0-1, over the link 1-2, 1F0 2-3, 1B0 3-5, back 5-6, 0B0 6-8, U 1 more
    memory = (
        StageMemory(
            fixed_bytes=1000,
            stash_bytes=100,
            forward_bytes=1,
            backward_bytes=2,
            received_bytes={1: 10},
            sent_bytes={1: 20},
        ),
        StageMemory(
            fixed_bytes=2000,
            stash_bytes=300,
            forward_bytes=3,
            backward_bytes=4,
            received_bytes={0: 30},
            sent_bytes={0: 40},
        ),
    )
    assert memory_over_time(timeline, memory) == (
        ((0, 1101), (1, 1120), (2, 1100), (5, 1110), (6, 1112), (8, 1000)),
        ((0.0, 2000), (1, 2030), (2, 2303), (3, 2304), (5, 2040), (6, 2000)),
    )


def test_what_an_input_gradient_leaves_lives_until_the_weight_gradient():
    program = add_communication(ZbH1().build(2, 2), Wiring.chain(2))
    timeline = simulate(program, durations(2, transfer_s=0))
    # stage 1: F0 1-2, I0 2-3, F1 3-4, I1 4-5, W0 5-6, W1 6-7
    memory = (StageMemory(fixed_bytes=1000, stash_bytes=100, weight_stash_bytes=10),) * 2
    assert memory_over_time(timeline, memory)[1] == (
        (0.0, 1000), (1, 1100), (2, 1110), (3, 1210), (4, 1220), (6, 1110), (7, 1000),
    )  # fmt: skip
    # stage 0: F0 0-1, F1 1-2, I0 3-4, W0 4-5, I1 5-6, W1 6-7
    assert memory_over_time(timeline, memory)[0] == (
        (0.0, 1100), (1, 1200), (3, 1210), (5, 1110), (7, 1000),
    )  # fmt: skip


def test_stages_of_a_submesh_add_up_and_hand_over():
    wiring = Wiring.chain(2, virtual_stages=2)
    program = add_communication(Interleaved(virtual_stages=2).build(2, 1), wiring)
    timeline = simulate(program, durations(2, transfer_s=9))
    # 0F 0-1, 1F 1-2, 1B 2-4, 0B 4-6, U and U
    memory = (
        StageMemory(fixed_bytes=1000, stash_bytes=100, received_bytes={1: 5}, backward_bytes=7),
        StageMemory(fixed_bytes=2000, stash_bytes=300, received_bytes={0: 4}),
    )
    # What 0 made for 1 is there at 1, when 1 starts: it is part of 1's stash from then on. What 1 made
    # for 0 is read from 4 to 6.
    assert memory_over_time(timeline, memory) == (((0.0, 3100), (1, 3400), (4, 3112), (6, 3000)),)


@pytest.mark.parametrize("virtual_stages", [2, 3])
@pytest.mark.parametrize("transfer_s", [0, 1, 5])
def test_the_peak_of_a_submesh_is_that_of_the_closed_form(virtual_stages, transfer_s):
    """Interleaved: the first of p submeshes has p (1 + (p - 1) / (p v)) microbatches under way."""
    p, v = 4, virtual_stages
    schedule, wiring = Interleaved(virtual_stages=v), Wiring.chain(p * v, virtual_stages=v)
    program = add_communication(schedule.build(p * v, 16), wiring)
    timeline = simulate(program, durations(p * v, transfer_s))
    memory = (StageMemory(fixed_bytes=7, stash_bytes=100),) * (p * v)
    traces = memory_over_time(timeline, memory)
    assert len(traces) == p
    assert max(num_bytes for _, num_bytes in traces[0]) == 7 * v + 100 * (p * v + p - 1)
    assert all(trace[-1][1] == 7 * v for trace in traces)  # nothing is left


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
@pytest.mark.parametrize("transfer_s", [0, 1, 5])
def test_the_peak_is_that_of_the_stash(name, transfer_s):
    program = add_communication(schedule_by_name(name).build(4, 6), Wiring.chain(4))
    timeline = simulate(program, durations(4, transfer_s))
    memory = (StageMemory(fixed_bytes=7, stash_bytes=100),) * 4
    traces = memory_over_time(timeline, memory)
    peaks = tuple(max(num_bytes for _, num_bytes in trace) for trace in traces)
    assert peaks == tuple(7 + 100 * num_kept for num_kept in timeline.stash_peak)
    assert all(trace[-1][1] == 7 for trace in traces)  # nothing is left
    assert all(list(trace) == sorted(trace) for trace in map(lambda t: [x[:1] for x in t], traces))


def test_a_timeline_without_events_has_no_memory():
    program = add_communication(OneForwardOneBackward().build(1, 1), Wiring.chain(1))
    timeline = simulate(program, durations(1, 0), with_events=False)
    with pytest.raises(ScheduleError, match="with 0 events .* simulate with with_events=True"):
        memory_over_time(timeline, (StageMemory(fixed_bytes=0, stash_bytes=1),))
