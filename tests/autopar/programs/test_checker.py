"""What the checker demands, one by one, and what it says. Random mutations are in test_mutations."""

from dataclasses import replace

import pytest
from wirings import ALONE, SKIPPING, VIRTUAL

from launcher.autopar.programs.checker import check
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.program import Wiring, parse_program
from launcher.autopar.programs.schedules import Interleaved, OneForwardOneBackward, ZbH1
from launcher.errors import ScheduleError

ORDERED = [  # in its list, the first must come after the second
    ("F", "RECV_F"),
    ("FREE_F", "F"),
    ("FREE_F", "SEND_F"),
    ("FREE_B", "B"),
    ("FREE_B", "SEND_B"),
    ("FREE_K", "B"),
    ("F", "F"),
    ("SEND_F", "F"),
    ("B", "F"),
    ("B", "RECV_B"),
    ("B", "B"),
    ("SEND_B", "B"),
    ("SEND_G", "B"),
    ("S", "B"),
    ("S", "SEND_G"),
    ("S", "RECV_G"),
    ("SEND_N", "S"),
    ("N", "S"),
    ("N", "RECV_N"),
    ("U", "N"),
    ("SEND_P", "U"),
    ("RECV_P", "U"),
]


@pytest.mark.parametrize(("later", "earlier"), ORDERED)
def test_each_order_inside_a_list_is_demanded(later, earlier):
    """Move the last of the later ones to before the last of the earlier ones that it needs."""
    program = add_communication(OneForwardOneBackward().build(4, 3), SKIPPING)
    num_tried = 0
    for stage, entries in enumerate(program.lists):
        laters = [entry for entry in entries if entry.op == later]
        microbatch = laters[-1].microbatch if laters else None
        if later == earlier:
            microbatch -= 1
        earliers = [
            entry
            for entry in entries
            if entry.op == earlier and (microbatch is None or entry.microbatch == microbatch)
        ]
        if not laters or not earliers:
            continue
        moved = [entry for entry in entries if entry != laters[-1]]
        moved.insert(moved.index(earliers[-1]), laters[-1])
        lists = (*program.lists[:stage], tuple(moved), *program.lists[stage + 1 :])
        with pytest.raises(ScheduleError, match=f"{laters[-1]} is number .* must come after"):
            check(replace(program, lists=lists), SKIPPING)
        num_tried += 1
    assert num_tried > 0


@pytest.mark.parametrize(
    ("schedule", "wiring", "later", "earlier"),
    [
        (Interleaved(virtual_stages=2), ALONE, "1F1", "0F1"),
        (Interleaved(virtual_stages=2), ALONE, "0B1", "1B1"),
        (Interleaved(virtual_stages=2), ALONE, "0N", "1S"),
        (Interleaved(virtual_stages=2), VIRTUAL, "2S", "0B3"),  # stage 2 owns what 0 reads, too
        (ZbH1(), SKIPPING, "1I1", "1F1"),
        (ZbH1(), SKIPPING, "1I1", "1RECV_B1<2"),
        (ZbH1(), SKIPPING, "1W1", "1I1"),
        (ZbH1(), SKIPPING, "2W2", "2W1"),
        (ZbH1(), SKIPPING, "1SEND_B2>0", "1I2"),
        (ZbH1(), SKIPPING, "1FREE_B2", "1I2"),
        (ZbH1(), SKIPPING, "1FREE_K2", "1W2"),
        (ZbH1(), SKIPPING, "3SEND_G>0", "3W2"),
        (ZbH1(), SKIPPING, "2S", "2W2"),
    ],
)
def test_handed_over_and_split_values_are_made_before_they_are_read(
    schedule, wiring, later, earlier
):
    num_microbatches = 4 if schedule.virtual_stages > 1 else 3
    program = add_communication(schedule.build(wiring.num_stages, num_microbatches), wiring)
    submesh = program.submesh_of[int(later[0])]
    entries = list(program.lists[submesh])
    moved = next(entry for entry in entries if str(entry) == later)
    entries.remove(moved)
    entries.insert([str(entry) for entry in entries].index(earlier), moved)
    lists = (*program.lists[:submesh], tuple(entries), *program.lists[submesh + 1 :])
    with pytest.raises(ScheduleError, match=f"{later} is number .*{earlier}, which it must come"):
        check(replace(program, lists=lists), wiring)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("0FREE_F1", "0FREE_F1 is there 0 times, .* it frees of microbatch 1 leaks"),
        ("2FREE_B0", "2FREE_B0 is there 0 times, .* it frees of microbatch 0 leaks"),
        ("1FREE_K3", "1FREE_K3 is there 0 times, .* it frees of microbatch 3 leaks"),
    ],
)
def test_what_is_never_freed_leaks(dropped, message):
    program = add_communication(Interleaved(virtual_stages=2).build(4, 4), VIRTUAL)
    lists = tuple(
        tuple(entry for entry in entries if str(entry) != dropped) for entries in program.lists
    )
    with pytest.raises(ScheduleError, match=message):
        check(replace(program, lists=lists), VIRTUAL)


def test_a_program_on_other_submeshes_is_refused():
    program = add_communication(Interleaved(virtual_stages=2).build(4, 4), VIRTUAL)
    with pytest.raises(ScheduleError, match="it has 2 submeshes, 4 are wired"):
        check(program, replace(VIRTUAL, submesh_of=(0, 1, 2, 3)))
    with pytest.raises(ScheduleError, match="0F0 stands in the list of submesh 0, which has no"):
        check(program, replace(VIRTUAL, submesh_of=(1, 0, 1, 0)))


SMALL = Wiring.chain(2, with_norm=True)


def small(*replacements):
    """Return the 1F1B program of 2 stages and 2 microbatches, which frees late, with words replaced
    in its text."""
    text = (
        "0F0,0SEND_F0>1,0F1,0SEND_F1>1,0RECV_B0<1,0B0,0RECV_B1<1,0B1,0S,"
        "0SEND_N>1,0RECV_N<1,0N,0U,0FREE_F0,0FREE_F1,0FREE_K0,0FREE_K1\n"
        "1RECV_F0<0,1F0,1B0,1RECV_F1<0,1SEND_B0>0,1F1,1B1,1SEND_B1>0,1S,"
        "1RECV_N<0,1SEND_N>0,1N,1U,1FREE_B0,1FREE_B1,1FREE_K0,1FREE_K1\n"
    )
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return parse_program(text)


def test_the_small_program_is_right():
    check(small(), SMALL)


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        ([("1B1,", "")], "1B1 is there 0 times, 1 is needed: the stash of microbatch 1 leaks"),
        ([("1F1,", "")], "1F1 is there 0 times, 1 is needed: what was received for it leaks"),
        ([("0S,", "")], "0S is there 0 times, 1 is needed"),
        ([("0SEND_F0>1,", "")], "0SEND_F0>1 is there 0 times"),
        ([("1RECV_N<0,", "")], "1RECV_N<0 is there 0 times"),
        ([("0B1,0S", "0B1,0B1,0S")], "0B1 is there 2 times, 1 is needed"),
        ([("0S,", "1S,")], "1S stands in the list of submesh 0, which has no use for it"),
        ([("0U", "0U,0SEND_P>1")], "0SEND_P>1 stands in the list of submesh 0, which has no use"),
        ([("0F0,0SEND_F0>1", "0SEND_F0>1,0F0")], "0SEND_F0>1 is number 0 .* number 1, 0F0, which"),
        ([("1RECV_F0<0,1F0", "1F0,1RECV_F0<0")], "1F0 is number 0 .* number 1, 1RECV_F0<0, which"),
        ([("0B1,0S", "0S,0B1")], "0S is number 7 .* number 8, 0B1, which it must come after"),
        ([("0N,0U", "0U,0N")], "0U is number 11 .* number 12, 0N, which it must come after"),
        ([("0S,0SEND_N>1", "0SEND_N>1,0S")], "0SEND_N>1 is number 8 .* number 9, 0S, which"),
        (
            [("1F0,1B0,", ""), ("1F1,1B1", "1F1,1F0,1B0,1B1"), ("1SEND_B0>0,", "")]
            + [("1SEND_B1>0", "1SEND_B0>0,1SEND_B1>0")],
            "1F1 is number 2 of its list, before number 3, 1F0, which it must come after",
        ),
        (
            [("0RECV_B0<1,0B0,0RECV_B1<1,0B1", "0RECV_B1<1,0RECV_B0<1,0B0,0B1")],
            "1SEND_B0>0 is sent where 0RECV_B1<1 is received",
        ),
        (
            [("1B0,1RECV_F1<0,1SEND_B0>0,", "1B0,1SEND_B0>0,1RECV_F1<0,")],
            "2 of 2 submeshes wait for ever, at 0SEND_F1>1, 1SEND_B0>0",
        ),
        (
            [("1RECV_N<0,1SEND_N>0", "1SEND_N>0,1RECV_N<0")],
            "2 of 2 submeshes wait for ever, at 0SEND_N>1, 1SEND_N>0",
        ),
    ],
)
def test_each_failure_says_what_is_wrong(replacements, message):
    with pytest.raises(ScheduleError, match=rf"wrong program: {message}.*\(parallel\.schedule\)"):
        check(small(*replacements), SMALL)


def test_the_grid_marks_the_place():
    program = small(("1B0,1RECV_F1<0,1SEND_B0>0,", "1B0,1SEND_B0>0,1RECV_F1<0,"))
    with pytest.raises(ScheduleError) as raised:
        check(program, SMALL)
    line, *grid = str(raised.value).splitlines()
    assert line.endswith("report it with the grid")
    assert grid == [
        "0:  0F0                        1RECV_F0<0",
        "1:  0SEND_F0>1                 1F0",
        "2:  0F1                        1B0",
        "3:  0SEND_F1>1 <-- ERROR HERE  1SEND_B0>0 <-- ERROR HERE",
        "4:  0RECV_B0<1                 1RECV_F1<0",
        "5:  0B0                        1F1",
        "6:  0RECV_B1<1                 1B1",
        "7:  0B1                        1SEND_B1>0",
    ]


@pytest.mark.parametrize(
    ("dropped", "marked"),
    [
        ("1B1,", "1RECV_F1<0 <-- ERROR HERE"),  # behind 1B0
        ("1SEND_B1>0,", "0RECV_B1<1 <-- ERROR HERE"),  # the partner of what is missing
        (",0U", "(end) <-- ERROR HERE"),
    ],
)
def test_the_grid_marks_where_something_is_missing(dropped, marked):
    with pytest.raises(ScheduleError) as raised:
        check(small((dropped, "")), SMALL)
    assert str(raised.value).count("<-- ERROR HERE") == 1
    assert marked in str(raised.value)


def test_the_grid_of_a_long_program_is_short():
    wiring = Wiring.chain(2)
    program = add_communication(OneForwardOneBackward().build(2, 200), wiring)
    lost = Instruction(op=Op.FORWARD, stage=0, microbatch=100)
    lists = (tuple(entry for entry in program.lists[0] if entry != lost), program.lists[1])
    with pytest.raises(ScheduleError, match="0F100 is there 0 times") as raised:
        check(replace(program, lists=lists), wiring)
    assert len(str(raised.value).splitlines()) == 10


def test_more_stages_wired_than_programmed_is_refused():
    with pytest.raises(ScheduleError, match="it has 2 stages, 3 are wired"):
        check(small(), Wiring.chain(3))


def test_a_program_of_another_wiring_is_refused():
    with pytest.raises(ScheduleError, match="0N stands in the list of submesh 0"):
        check(small((",0SEND_N>1,0RECV_N<1", ""), (",1RECV_N<0,1SEND_N>0", "")), Wiring.chain(2))
