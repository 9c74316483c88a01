"""The communication pass: golden files, placement, and the programs of random wirings.

`python -m pytest --update-golden tests/autopar/test_program.py` writes the golden files anew.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.autopar.programs.checker import check
from launcher.autopar.programs.communication import add_communication, format_grid
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.program import (
    Program,
    Wiring,
    dispatch_order,
    format_program,
    parse_program,
    round_robin,
)
from launcher.autopar.programs.schedules import (
    GPipe,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
    schedule_by_name,
)
from launcher.errors import ScheduleError

GOLDEN = Path(__file__).parents[2] / "golden" / "schedules"
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


def random_ties(rng, num_stages):
    """Also both ways between two stages, and between stages of one submesh."""
    pairs = [(i, j) for i in range(num_stages) for j in range(num_stages) if i != j]
    return tuple(rng.sample(pairs, k=min(4, len(pairs))))


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


# Name of the golden files -> a schedule, and what it is wired to: 4 submeshes, 8 microbatches.
GOLDEN_CASES = {
    "gpipe_4x8": (GPipe(), Wiring.chain(4, tied=((0, 3),), with_norm=True)),
    "1f1b_4x8": (OneForwardOneBackward(), Wiring.chain(4, tied=((0, 3),), with_norm=True)),
    "interleaved_4x8_virtual2": (
        Interleaved(virtual_stages=2),
        Wiring.chain(8, tied=((0, 7),), with_norm=True, virtual_stages=2),
    ),
    "zb_h1_4x8": (ZbH1(), Wiring.chain(4, tied=((0, 3),), with_norm=True)),
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
@pytest.mark.parametrize("what", ["grid", "program"])
def test_golden_files(name, what, golden):
    schedule, wiring = GOLDEN_CASES[name]
    program = add_communication(schedule.build(wiring.num_stages, 8), wiring)
    text = format_grid(program) if what == "grid" else format_program(program)
    golden(f"schedules/{name}_{what}.csv", text)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_program_is_read_back(name):
    schedule, wiring = GOLDEN_CASES[name]
    program = parse_program((GOLDEN / f"{name}_program.csv").read_text())
    assert (program.num_stages, program.num_submeshes) == (wiring.num_stages, 4)
    assert program.submesh_of == wiring.homes(4)
    assert program.splits_backward == schedule.splits_backward
    assert program.num_microbatches == 8
    check(program, wiring)
    assert parse_program(format_program(program)) == program


def test_empty_text_is_an_empty_program():
    assert parse_program("") == Program(lists=(), num_microbatches=0)
    assert format_grid(parse_program("")) == ""


def test_one_stage_needs_no_messages():
    program = add_communication(OneForwardOneBackward().build(1, 2), Wiring.chain(1))
    assert format_program(program) == "0F0,0B0,0FREE_K0,0F1,0B1,0FREE_K1,0S,0U\n"
    program = add_communication(GPipe().build(1, 1), Wiring.chain(1, with_norm=True))
    assert format_program(program) == "0F0,0B0,0FREE_K0,0S,0N,0U\n"
    program = add_communication(ZbH1().build(1, 1), Wiring.chain(1))
    assert format_program(program) == "0F0,0I0,0W0,0FREE_K0,0S,0U\n"


def test_a_skip_is_sent_from_where_it_is_made():
    wiring = Wiring(edges=((0, 1), (1, 2), (0, 2)), differentiable=((0, 1), (1, 2)))
    program = add_communication(GPipe().build(3, 1), wiring)
    assert format_program(program) == (
        "0F0,0SEND_F0>1,0SEND_F0>2,0FREE_F0,0RECV_B0<1,0B0,0FREE_K0,0S,0U\n"
        "1RECV_F0<0,1F0,1SEND_F0>2,1FREE_F0,1RECV_B0<2,1B0,1FREE_K0,1SEND_B0>0,1FREE_B0,1S,1U\n"
        "2RECV_F0<0,2RECV_F0<1,2F0,2B0,2FREE_K0,2SEND_B0>1,2FREE_B0,2S,2U\n"
    )


def test_what_stays_on_a_submesh_is_no_message():
    wiring = Wiring.chain(2, tied=((0, 1),), with_norm=True, virtual_stages=2)
    program = add_communication(Interleaved(virtual_stages=2).build(2, 1), wiring)
    assert format_program(program) == (
        "0F0,0FREE_F0,1F0,1B0,1FREE_K0,1FREE_B0,0B0,0FREE_K0,0S,1S,0N,1N,0U,1U\n"
    )
    # Stage 0 is skipped to by 1 and 2; 2 lies where it lies, 1 does not.
    wiring = Wiring(
        edges=((0, 1), (0, 2), (1, 2), (2, 3)),
        differentiable=((0, 2), (2, 3)),
        submesh_of=(0, 1, 0, 1),
    )
    program = add_communication(Interleaved(virtual_stages=2).build(4, 2), wiring)
    sent = {(entry.stage, entry.peer) for row in program.lists for entry in row if entry.is_send}
    assert sent == {(0, 1), (1, 2), (2, 3), (3, 2)}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
def test_sends_stand_behind_what_they_send(name):
    program = add_communication(schedule_by_name(name).build(4, 6), SKIPPING)
    makers = {Op.SEND_ACTIVATION: Op.FORWARD, Op.SEND_COTANGENT: Op.BACKWARD}
    for entries in program.lists:
        computed = None
        for entry in entries:
            computed = entry if entry.is_compute else computed
            if entry.op in makers:
                made_by = (str(computed.op).replace("I", "B"), computed.microbatch)
                assert made_by == (makers[entry.op], entry.microbatch)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
def test_receives_stand_before_their_reader_or_a_send(name):
    program = add_communication(schedule_by_name(name).build(4, 6), SKIPPING)
    readers = {Op.RECEIVE_ACTIVATION: Op.FORWARD, Op.RECEIVE_COTANGENT: Op.BACKWARD}
    for entries in program.lists:
        for entry, following in zip(entries, entries[1:], strict=False):
            if entry.op in readers and following.is_compute:
                read_by = (str(following.op).replace("I", "B"), following.microbatch)
                assert read_by == (readers[entry.op], entry.microbatch)


@pytest.mark.parametrize("seed", range(30))
def test_programs_of_random_wirings_are_proven(seed):
    rng = random.Random(seed)
    num_stages, num_microbatches = rng.randint(2, 6), rng.randint(1, 9)
    wiring = random_wiring(rng, num_stages)
    for schedule in (GPipe(), OneForwardOneBackward(), ZbH1()):
        program = add_communication(schedule.build(num_stages, num_microbatches), wiring)
        check(program, wiring)
        assert parse_program(format_program(program)) == program


@pytest.mark.parametrize("seed", range(30))
def test_programs_of_random_wirings_of_virtual_stages_are_proven(seed):
    rng = random.Random(seed)
    p, v, num_groups = rng.randint(1, 4), rng.randint(2, 4), rng.randint(1, 3)
    wiring = random_wiring(rng, p * v)
    wiring = replace(wiring, submesh_of=round_robin(p * v, v), tied=random_ties(rng, p * v))
    program = add_communication(Interleaved(virtual_stages=v).build(p * v, p * num_groups), wiring)
    check(program, wiring)
    assert parse_program(format_program(program)) == program
    order = dispatch_order(program)
    for submesh, entries in enumerate(program.lists):
        own = tuple(entry for entry in order if wiring.submesh_of[entry.stage] == submesh)
        assert own == entries


def test_submeshes_may_hold_different_numbers_of_stages():
    """The pass needs no regular shape: 3 stages on 2 submeshes, in an order of its own."""
    wiring = Wiring.chain(3, tied=((0, 2),), with_norm=True)
    wiring = replace(wiring, submesh_of=(0, 1, 0))
    lists = parse_program("0F0,2F0,2B0,0B0\n1F0,1B0\n").lists
    program = add_communication(lists, wiring)
    check(program, wiring)
    assert [str(entry) for entry in program.lists[1] if not entry.is_free] == [
        "1RECV_F0<0", "1F0", "1SEND_F0>2", "1RECV_B0<2", "1B0", "1SEND_B0>0", "1S",
        "1RECV_N<0", "1RECV_N<2", "1SEND_N>0", "1SEND_N>2", "1N", "1U",
    ]  # fmt: skip


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


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
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
    with pytest.raises(ScheduleError, match="2 of 2 submeshes wait for ever, at 0B0, 1F1"):
        add_communication(lists, Wiring.chain(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": ((1, 0),)}, "edge 1 to 0 does not go to a later stage"),
        ({"edges": ((-1, 0),)}, "edge -1 to 0 does not go to a later stage"),
        ({"edges": ((0, 1), (0, 1))}, "2 edges, 1 distinct ones"),
        ({"tied": ((0, 1), (0, 1))}, "2 tied, 1 distinct ones"),
        ({"tied": ((1, 1),)}, "stage 1 is tied to stage 1, itself"),
        ({"edges": ((0, 1),), "submesh_of": (0,)}, "2 stages are wired, 1 have a submesh"),
        ({"submesh_of": (0, 2)}, r"a submesh without a stage, among those of \(0, 2\)"),
        ({"differentiable": ((0, 1),)}, "1 differentiable edges are not distinct ones of the 0"),
    ],
)
def test_wrong_wirings_raise(changes, message):
    with pytest.raises(ScheduleError, match=message):
        Wiring(**{"edges": (), "differentiable": ()} | changes)


def test_a_wiring_of_more_stages_than_scheduled_raises():
    with pytest.raises(ScheduleError, match="3 stages are wired, 2 are scheduled"):
        add_communication(GPipe().build(2, 2), Wiring.chain(3))
    with pytest.raises(ScheduleError, match="4 submeshes are wired, 2 are scheduled"):
        add_communication(
            Interleaved(virtual_stages=2).build(4, 2),
            replace(Wiring.chain(4), submesh_of=(0, 1, 2, 3)),
        )


@pytest.mark.parametrize("drop", [0, 1])
def test_incomplete_compute_lists_raise(drop):
    first, second = GPipe().build(2, 2)
    lists = (first[1:], second) if drop == 0 else (first, second[1:])
    with pytest.raises(ScheduleError, match=f"list {drop} has 3 instructions, 4 are needed"):
        add_communication(lists, Wiring.chain(2))
