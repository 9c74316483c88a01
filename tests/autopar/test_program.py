"""The communication pass: golden files, placement, and the programs of random wirings.

`python -m pytest --update-golden tests/autopar/test_program.py` writes the golden files anew.
"""

import random
from pathlib import Path

import pytest

from launcher.autopar.checker import check
from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.program import (
    Program,
    Wiring,
    add_communication,
    dispatch_order,
    format_grid,
    format_program,
    parse_program,
)
from launcher.autopar.schedules import GPipe, OneForwardOneBackward, schedule_by_name
from launcher.errors import ScheduleError

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"
SKIPPING = Wiring(
    edges=((0, 1), (1, 2), (0, 2), (2, 3), (0, 3)),
    differentiable=((0, 1), (1, 2), (2, 3), (0, 3)),
    tied=((0, 3), (2, 1)),
    with_norm=True,
)


def random_wiring(rng, num_stages):
    pairs = [(i, j) for i in range(num_stages) for j in range(i + 1, num_stages)]
    edges = [pair for pair in pairs if pair[1] == pair[0] + 1 or rng.random() < 0.3]
    return Wiring(
        edges=tuple(edges),
        differentiable=tuple(edge for edge in edges if rng.random() < 0.8),
        tied=tuple(pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(pairs, k=1)),
        with_norm=rng.random() < 0.5,
    )


def random_compute_lists(rng, num_stages, num_microbatches):
    """Merge F and B at random, each in order and no B before its F."""
    lists = []
    for stage in range(num_stages):
        done = {Op.FORWARD: 0, Op.BACKWARD: 0}
        entries = []
        while done[Op.BACKWARD] < num_microbatches:
            choices = [Op.FORWARD] if done[Op.FORWARD] < num_microbatches else []
            choices += [Op.BACKWARD] if done[Op.BACKWARD] < done[Op.FORWARD] else []
            op = rng.choice(choices)
            entries.append(Instruction(op=op, stage=stage, microbatch=done[op]))
            done[op] += 1
        lists.append(tuple(entries))
    return tuple(lists)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("what", ["grid", "program"])
def test_golden_files(name, what, golden):
    wiring = Wiring.chain(4, tied=((0, 3),), with_norm=True)
    program = add_communication(schedule_by_name(name).build(4, 8), wiring)
    text = format_grid(program) if what == "grid" else format_program(program)
    golden(f"schedules/{name}_4x8_{what}.csv", text)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_golden_program_is_read_back(name):
    program = parse_program((GOLDEN / f"{name}_4x8_program.csv").read_text())
    assert program.num_stages == 4
    assert program.num_microbatches == 8
    check(program, Wiring.chain(4, tied=((0, 3),), with_norm=True))
    assert parse_program(format_program(program)) == program


def test_empty_text_is_an_empty_program():
    assert parse_program("") == Program(lists=(), num_microbatches=0)
    assert format_grid(parse_program("")) == ""


def test_one_stage_needs_no_messages():
    program = add_communication(OneForwardOneBackward().build(1, 2), Wiring.chain(1))
    assert format_program(program) == "0F0,0B0,0F1,0B1,0S,0U\n"
    program = add_communication(GPipe().build(1, 1), Wiring.chain(1, with_norm=True))
    assert format_program(program) == "0F0,0B0,0S,0N,0U\n"


def test_a_skip_is_sent_from_where_it_is_made():
    wiring = Wiring(edges=((0, 1), (1, 2), (0, 2)), differentiable=((0, 1), (1, 2)))
    program = add_communication(GPipe().build(3, 1), wiring)
    assert format_program(program) == (
        "0F0,0SEND_F0>1,0SEND_F0>2,0RECV_B0<1,0B0,0S,0U\n"
        "1RECV_F0<0,1F0,1SEND_F0>2,1RECV_B0<2,1B0,1SEND_B0>0,1S,1U\n"
        "2RECV_F0<0,2RECV_F0<1,2F0,2B0,2SEND_B0>1,2S,2U\n"
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_sends_stand_behind_what_they_send(name):
    program = add_communication(schedule_by_name(name).build(4, 6), SKIPPING)
    makers = {Op.SEND_ACTIVATION: Op.FORWARD, Op.SEND_COTANGENT: Op.BACKWARD}
    for entries in program.lists:
        computed = None
        for entry in entries:
            computed = entry if entry.is_compute else computed
            if entry.op in makers:
                assert (computed.op, computed.microbatch) == (makers[entry.op], entry.microbatch)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_receives_stand_before_their_reader_or_a_send(name):
    program = add_communication(schedule_by_name(name).build(4, 6), SKIPPING)
    readers = {Op.RECEIVE_ACTIVATION: Op.FORWARD, Op.RECEIVE_COTANGENT: Op.BACKWARD}
    for entries in program.lists:
        for entry, following in zip(entries, entries[1:], strict=False):
            if entry.op in readers and following.is_compute:
                expected = (readers[entry.op], entry.microbatch)
                assert (following.op, following.microbatch) == expected


@pytest.mark.parametrize("seed", range(30))
def test_programs_of_random_wirings_are_proven(seed):
    rng = random.Random(seed)
    num_stages, num_microbatches = rng.randint(2, 6), rng.randint(1, 9)
    wiring = random_wiring(rng, num_stages)
    for schedule in (GPipe(), OneForwardOneBackward()):
        program = add_communication(schedule.build(num_stages, num_microbatches), wiring)
        check(program, wiring)
        assert parse_program(format_program(program)) == program


def test_programs_of_random_orders_are_proven_or_refused():
    rng = random.Random(0)
    num_refused = 0
    for _ in range(150):
        num_stages, num_microbatches = rng.randint(2, 4), rng.randint(1, 4)
        wiring = random_wiring(rng, num_stages)
        compute_lists = random_compute_lists(rng, num_stages, num_microbatches)
        try:
            program = add_communication(compute_lists, wiring)
        except ScheduleError:  # of a ring, tested below
            num_refused += 1
        else:
            check(program, wiring)
    assert 10 < num_refused < 140


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_dispatch_order_sends_before_it_receives(name):
    program = add_communication(schedule_by_name(name).build(4, 6), SKIPPING)
    order = dispatch_order(program)
    for stage, entries in enumerate(program.lists):
        assert tuple(entry for entry in order if entry.stage == stage) == entries
    for index, entry in enumerate(order):
        if entry.is_receive:
            assert entry.partner in order[:index]


def test_dispatch_order_takes_turns():
    program = add_communication(GPipe().build(2, 3), Wiring.chain(2))
    computed = [str(entry) for entry in dispatch_order(program) if entry.is_compute]
    assert computed[:6] == ["0F0", "1F0", "0F1", "1F1", "0F2", "1F2"]


def test_dispatch_order_of_a_hanging_program_raises():
    program = parse_program("0RECV_B0<1,0F0,0SEND_F0>1\n1RECV_F0<0,1F0,1SEND_B0>0\n")
    with pytest.raises(ScheduleError, match="only 0 of 6 instructions can be dispatched"):
        dispatch_order(program)


def test_orders_that_wait_in_a_ring_raise():
    one, other = GPipe().build(2, 2)[0], OneForwardOneBackward().build(2, 2)[1]
    # stage 0 wants B0 before F1, stage 1 wants F1 before B0
    lists = (
        tuple(one[i] for i in (0, 2, 1, 3)),
        tuple(other[i] for i in (0, 2, 1, 3)),
    )
    with pytest.raises(ScheduleError, match="2 of 2 stages wait for ever, at 0B0, 1F1"):
        add_communication(lists, Wiring.chain(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": ((1, 0),)}, "edge 1 to 0 does not go to a later stage"),
        ({"edges": ((-1, 0),)}, "edge -1 to 0 does not go to a later stage"),
        ({"edges": ((0, 1), (0, 1))}, "2 edges, 1 distinct ones"),
        ({"tied": ((0, 1), (0, 1))}, "2 tied, 1 distinct ones"),
        ({"tied": ((1, 1),)}, "stage 1 is tied to stage 1, itself"),
        ({"differentiable": ((0, 1),)}, "1 differentiable edges are not distinct ones of the 0"),
    ],
)
def test_wrong_wirings_raise(changes, message):
    with pytest.raises(ScheduleError, match=message):
        Wiring(**{"edges": (), "differentiable": ()} | changes)


def test_a_wiring_of_more_stages_than_scheduled_raises():
    with pytest.raises(ScheduleError, match="3 stages are wired, 2 are scheduled"):
        add_communication(GPipe().build(2, 2), Wiring.chain(3))


@pytest.mark.parametrize("drop", [0, 1])
def test_incomplete_compute_lists_raise(drop):
    first, second = GPipe().build(2, 2)
    lists = (first[1:], second) if drop == 0 else (first, second[1:])
    with pytest.raises(ScheduleError, match=f"list {drop} has 3 instructions, 4 are needed"):
        add_communication(lists, Wiring.chain(2))
