"""The checker against an interpreter of its own: random mutations, and each message by hand.

The interpreter plays a program on symbols, with sends that block, and says what every stage's
parameters are in the end. A mutation changes the meaning if they differ, if the play hangs, or if
it leaves something behind; the checker must refuse exactly those mutations.
"""

import random
from dataclasses import replace

import pytest

from launcher.autopar.checker import check
from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.program import Wiring, add_communication, parse_program
from launcher.autopar.schedules import GPipe, OneForwardOneBackward
from launcher.errors import ScheduleError

CHAIN = Wiring.chain(3, tied=((0, 2),), with_norm=True)
SKIPPING = Wiring(
    edges=((0, 1), (1, 2), (0, 2), (2, 3)),
    differentiable=((0, 1), (1, 2), (2, 3)),
    tied=((0, 3), (3, 1)),
    with_norm=True,
)
WITHOUT_NORM = Wiring(edges=((0, 1), (0, 2)), differentiable=((0, 1),), tied=((2, 1),))


class BrokenError(Exception):
    """The play cannot go on, or leaves something behind."""


class SymbolicStage:
    """One stage whose values are numbers that stand for expressions."""

    def __init__(self, stage, wiring, num_stages, intern):
        self.intern = lambda *expression: intern.setdefault(expression, len(intern))
        self.sources = [src for src, dst in wiring.edges if dst == stage]
        self.sinks = [dst for src, dst in wiring.differentiable if src == stage]
        self.users = [user for owner, user in wiring.tied if owner == stage]
        self.others = [s for s in range(num_stages) if s != stage] if wiring.with_norm else []
        self.with_norm = wiring.with_norm
        self.stage = stage
        self.inbox, self.made, self.stash, self.tied = {}, {}, {}, {}
        self.params, self.statistics, self.gradients, self.total = 0, 0, 0, None

    def take(self, payload, microbatch, peers):
        return tuple(self.inbox.pop((payload, microbatch, peer)) for peer in peers)

    def compute(self, op, k):
        tied = tuple(sorted(self.tied.items()))
        if op is Op.FORWARD:
            inputs = self.take("F", k, self.sources)
            state = self.intern(self.stage, "F", k, self.params, tied, self.statistics, inputs)
            if k in self.stash:
                raise BrokenError("stash overwritten")
            self.statistics = self.stash[k] = self.made["F", k] = state
        elif op is Op.BACKWARD:
            inputs = self.take("B", k, self.sinks)
            value = self.intern(self.stage, "B", k, self.params, tied, self.stash.pop(k), inputs)
            self.made["B", k] = value
            self.gradients = self.made["G", None] = self.intern("sum", self.gradients, value)
        elif op is Op.SYNCHRONIZE:
            received = self.take("G", None, self.users)
            self.gradients = self.intern("synchronized", self.gradients, received)
            self.made["G", None] = self.made["N", None] = self.gradients
        elif op is Op.NORM:
            received = self.take("N", None, self.others)
            self.total = self.intern("norm", self.made["N", None], received)
        elif op is Op.UPDATE:
            if (self.total is not None) != self.with_norm:
                raise BrokenError("update without the norm")
            self.params = self.intern("updated", self.params, tied, self.gradients, self.total)
            self.made["P", None] = self.params

    def receive(self, instruction, value):
        payload = instruction.op.value.removeprefix("RECV_")
        if payload == "P":
            # The parameter that was updated last wins: an own update after it would change it.
            self.tied[instruction.peer] = self.intern("tied", value, self.params)
            return
        key = (payload, instruction.microbatch, instruction.peer)
        if key in self.inbox:
            raise BrokenError("received twice")
        self.inbox[key] = value

    def meaning(self):
        if self.inbox or self.stash:
            raise BrokenError("leak")
        tied = tuple(sorted(self.tied.items()))
        return self.params, self.statistics, self.gradients, tied


def play(lists, wiring, intern):
    """Return each stage's final state, or None if the program is broken."""
    stages = [SymbolicStage(stage, wiring, len(lists), intern) for stage in range(len(lists))]
    position = [0] * len(lists)
    try:
        while any(step(lists, stages, position, stage) for stage in range(len(lists))):
            pass
        if position != [len(entries) for entries in lists]:
            return None
        return [stage.meaning() for stage in stages]
    except (BrokenError, KeyError):
        return None


def step(lists, stages, position, stage):
    """Play one instruction of a list, if it can go."""
    if position[stage] == len(lists[stage]):
        return False
    entry = lists[stage][position[stage]]
    if entry.stage != stage:
        raise BrokenError("in a stranger's list")
    if entry.is_receive:
        return False  # its sender plays it
    if entry.is_compute:
        stages[stage].compute(entry.op, entry.microbatch)
    else:
        if not 0 <= entry.peer < len(lists) or position[entry.peer] == len(lists[entry.peer]):
            return False
        other = lists[entry.peer][position[entry.peer]]
        if not other.is_receive or other.peer != stage:
            return False
        made = stages[stage].made[entry.op.value.removeprefix("SEND_"), entry.microbatch]
        stages[entry.peer].receive(other, made)
        position[entry.peer] += 1
    position[stage] += 1
    return True


def mutate(rng, lists):
    """Change one thing: drop, duplicate, move, swap, or rename an instruction."""
    changed = [list(entries) for entries in lists]
    entries = rng.choice(changed)
    here, there = rng.randrange(len(entries)), rng.randrange(len(entries))
    match rng.choice(("drop", "duplicate", "move", "swap", "neighbours", "microbatch", "peer")):
        case "drop":
            del entries[here]
        case "duplicate":
            entries.insert(there, entries[here])
        case "move":
            entries.insert(there, entries.pop(here))
        case "swap":
            entries[here], entries[there] = entries[there], entries[here]
        case "neighbours":
            here = max(here, 1)
            entries[here - 1], entries[here] = entries[here], entries[here - 1]
        case "microbatch":
            if entries[here].microbatch is not None:
                entries[here] = replace(entries[here], microbatch=rng.randrange(4))
        case "peer":
            if entries[here].peer is not None:
                entries[here] = replace(entries[here], peer=rng.randrange(len(lists)))
    return tuple(tuple(entries) for entries in changed)


def is_accepted(program, wiring):
    try:
        check(program, wiring)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("schedule", [GPipe(), OneForwardOneBackward()])
@pytest.mark.parametrize("wiring", [CHAIN, SKIPPING, WITHOUT_NORM])
def test_mutations_are_refused_if_and_only_if_they_change_the_meaning(schedule, wiring):
    intern = {}
    program = add_communication(schedule.build(wiring.num_stages, 3), wiring)
    meaning = play(program.lists, wiring, intern)
    assert meaning is not None
    rng = random.Random(0)
    num_refused = 0
    for _ in range(500):
        mutant = replace(program, lists=mutate(rng, program.lists))
        is_same = play(mutant.lists, wiring, intern) == meaning
        assert is_accepted(mutant, wiring) == is_same, mutant
        num_refused += not is_same
    assert 250 < num_refused < 500


@pytest.mark.parametrize("wiring", [CHAIN, SKIPPING])
def test_two_mutations_do_not_hide_each_other(wiring):
    intern = {}
    program = add_communication(OneForwardOneBackward().build(wiring.num_stages, 3), wiring)
    meaning = play(program.lists, wiring, intern)
    rng = random.Random(1)
    for _ in range(500):
        mutant = replace(program, lists=mutate(rng, mutate(rng, program.lists)))
        is_same = play(mutant.lists, wiring, intern) == meaning
        assert is_accepted(mutant, wiring) == is_same, mutant


ORDERED = [  # in its list, the first must come after the second
    ("F", "RECV_F"),
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


SMALL = Wiring.chain(2, with_norm=True)


def small(*replacements):
    """Return the 1F1B program of 2 stages and 2 microbatches with words replaced in its text."""
    text = (
        "0F0,0SEND_F0>1,0F1,0SEND_F1>1,0RECV_B0<1,0B0,0RECV_B1<1,0B1,0S,"
        "0SEND_N>1,0RECV_N<1,0N,0U\n"
        "1RECV_F0<0,1F0,1B0,1RECV_F1<0,1SEND_B0>0,1F1,1B1,1SEND_B1>0,1S,"
        "1RECV_N<0,1SEND_N>0,1N,1U\n"
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
        ([("0S,", "1S,")], "1S stands in the list of stage 0, which has no use for it"),
        ([("0U", "0U,0SEND_P>1")], "0SEND_P>1 stands in the list of stage 0, which has no use"),
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
            "2 of 2 stages wait for ever, at 0SEND_F1>1, 1SEND_B0>0",
        ),
        (
            [("1RECV_N<0,1SEND_N>0", "1SEND_N>0,1RECV_N<0")],
            "2 of 2 stages wait for ever, at 0SEND_N>1, 1SEND_N>0",
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
    with pytest.raises(ScheduleError, match="0N stands in the list of stage 0"):
        check(small((",0SEND_N>1,0RECV_N<1", ""), (",1RECV_N<0,1SEND_N>0", "")), Wiring.chain(2))
