"""The checker against an interpreter of its own: random mutations, and each message by hand.

The interpreter plays a program on symbols, with sends that block, and says what every stage's
parameters are in the end. A mutation changes the meaning if they differ, if the play hangs, reads
what is gone, or leaves something behind; the checker must refuse exactly those mutations.
"""

import random
from dataclasses import replace

import pytest

from launcher.autopar.checker import check
from launcher.autopar.communication import add_communication
from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.program import Wiring, parse_program
from launcher.autopar.schedules import GPipe, Interleaved, OneForwardOneBackward, ZbH1
from launcher.errors import ScheduleError

CHAIN = Wiring.chain(3, tied=((0, 2),), with_norm=True)
SKIPPING = Wiring(
    edges=((0, 1), (1, 2), (0, 2), (2, 3)),
    differentiable=((0, 1), (1, 2), (2, 3)),
    tied=((0, 3), (3, 1)),
    with_norm=True,
)
VIRTUAL = Wiring(
    edges=((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)),
    differentiable=((0, 1), (1, 2), (2, 3), (1, 3)),
    tied=((0, 3), (2, 0)),
    with_norm=True,
    submesh_of=(0, 1, 0, 1),
)
ALONE = Wiring.chain(2, tied=((0, 1),), with_norm=True, virtual_stages=2)
WITHOUT_NORM = Wiring(edges=((0, 1), (0, 2)), differentiable=((0, 1),), tied=((2, 1),))


class BrokenError(Exception):
    """The play cannot go on, or leaves something behind."""


class SymbolicStage:
    """One stage whose values are numbers that stand for expressions."""

    def __init__(self, stage, wiring, homes, intern):
        self.intern = lambda *expression: intern.setdefault(expression, len(intern))
        self.stage, self.wiring = stage, wiring
        self.sources = [src for src, dst in wiring.edges if dst == stage]
        self.sinks = [dst for src, dst in wiring.differentiable if src == stage]
        self.users = [user for owner, user in wiring.tied if owner == stage]
        self.others = [s for s in range(len(homes)) if s != stage] if wiring.with_norm else []
        self.near = {s for s, home in enumerate(homes) if home == homes[stage]}
        self.inbox, self.made, self.stash, self.for_weights, self.tied = {}, {}, {}, {}, {}
        self.params, self.statistics, self.sums, self.total = 0, 0, 0, None

    def take(self, payload, microbatch, peers):
        return tuple(self.inbox.pop((payload, microbatch, peer)) for peer in peers)

    def hand_over(self, stages, payload, microbatch, peers, value):
        """Give a value to those of the peers that lie on the same submesh."""
        for peer in peers:
            if peer in self.near:
                stages[peer].put((payload, microbatch, self.stage), value)

    def put(self, key, value):
        if key in self.inbox:
            raise BrokenError("received twice")
        self.inbox[key] = value

    def compute(self, op, k, stages):
        tied = tuple(sorted(self.tied.items()))
        match op:
            case Op.FORWARD:
                self.forward(k, stages, tied)
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                self.backward(op, k, stages, tied)
            case Op.BACKWARD_WEIGHT:
                value = self.for_weights.pop(k)
                self.accumulate(self.intern("W", self.params, tied, self.stash[k], value))
            case Op.SYNCHRONIZE:
                self.synchronize(stages)
            case Op.NORM:
                received = self.take("N", None, self.others)
                self.total = self.intern("norm", self.made["N", None], received)
            case Op.UPDATE:
                self.update(stages)

    def forward(self, k, stages, tied):
        inputs = self.take("F", k, self.sources)
        state = self.intern(self.stage, "F", k, self.params, tied, self.statistics, inputs)
        if k in self.stash:
            raise BrokenError("stash overwritten")
        self.statistics = self.stash[k] = state
        readers = [dst for src, dst in self.wiring.edges if src == self.stage]
        self.hand_over(stages, "F", k, readers, state)
        if readers:
            self.made["F", k] = state

    def backward(self, op, k, stages, tied):
        inputs = self.take("B", k, self.sinks)
        value = self.intern(self.stage, "B", k, self.params, tied, self.stash[k], inputs)
        readers = [src for src, dst in self.wiring.differentiable if dst == self.stage]
        self.hand_over(stages, "B", k, readers, value)
        if readers:
            self.made["B", k] = value
        if op is Op.BACKWARD:
            self.accumulate(value)
        elif k in self.for_weights:
            raise BrokenError("what it leaves for W is overwritten")
        else:
            self.for_weights[k] = value

    def accumulate(self, value):
        self.sums = self.made["G", None] = self.intern("sum", self.sums, value)

    def synchronize(self, stages):
        if ("N", None) in self.made:
            raise BrokenError("synchronised what is gone")
        near = [user for user in self.users if user in self.near]
        received = self.take("G", None, [user for user in self.users if user not in near])
        handed = tuple(stages[user].sums for user in near)
        gradients = self.intern("synchronized", self.sums, received, handed)
        self.made["G", None] = self.made["N", None] = gradients
        self.hand_over(stages, "N", None, self.others, gradients)

    def update(self, stages):
        if (self.total is not None) != self.wiring.with_norm:
            raise BrokenError("update without the norm")
        self.params = self.intern("updated", self.params, self.made["N", None], self.total)
        self.made["P", None] = self.params
        for user in self.users:
            if user in self.near:
                stages[user].tied[self.stage] = self.params

    def free(self, op, k):
        if op is Op.FREE_STASH:
            self.stash.pop(k)
        else:
            self.made.pop(("F" if op is Op.FREE_ACTIVATION else "B", k))

    def receive(self, instruction, value):
        payload = instruction.op.value.removeprefix("RECV_")
        if payload == "P":
            # The parameter that was updated last wins: an own update after it would change it.
            self.tied[instruction.peer] = self.intern("tied", value, self.params)
            return
        self.put((payload, instruction.microbatch, instruction.peer), value)

    def meaning(self):
        kept = {key for key in self.made if key[1] is not None}
        if self.inbox or self.stash or self.for_weights or kept:
            raise BrokenError("leak")
        tied = tuple(sorted(self.tied.items()))
        return self.params, self.statistics, self.made["N", None], tied


def play(lists, wiring, intern):
    """Return each stage's final state, or None if the program is broken."""
    homes = wiring.homes(len(lists))
    stages = [SymbolicStage(stage, wiring, homes, intern) for stage in range(len(homes))]
    position = [0] * len(lists)
    try:
        while any(step(lists, homes, stages, position, i) for i in range(len(lists))):
            pass
        if position != [len(entries) for entries in lists]:
            return None
        return [stage.meaning() for stage in stages]
    except (BrokenError, KeyError):
        return None


def step(lists, homes, stages, position, submesh):
    """Play one instruction of a list, if it can go."""
    if position[submesh] == len(lists[submesh]):
        return False
    entry = lists[submesh][position[submesh]]
    if not entry.stage < len(homes) or homes[entry.stage] != submesh:
        raise BrokenError("in a stranger's list")
    if entry.is_receive:
        return False  # its sender plays it
    if entry.is_compute:
        stages[entry.stage].compute(entry.op, entry.microbatch, stages)
    elif entry.is_free:
        stages[entry.stage].free(entry.op, entry.microbatch)
    else:
        peer = homes[entry.peer]
        if position[peer] == len(lists[peer]):
            return False
        other = lists[peer][position[peer]]
        if not other.is_receive or (other.stage, other.peer) != (entry.peer, entry.stage):
            return False
        made = stages[entry.stage].made[entry.op.value.removeprefix("SEND_"), entry.microbatch]
        stages[entry.peer].receive(other, made)
        position[peer] += 1
    position[submesh] += 1
    return True


def mutate(rng, lists):
    """Change one thing: drop, duplicate, move, swap, or rename an instruction."""
    changed = [list(entries) for entries in lists]
    entries = rng.choice(changed)
    here, there = rng.randrange(len(entries)), rng.randrange(len(entries))
    kinds = ("drop", "duplicate", "move", "swap", "neighbours", "microbatch", "peer", "stage")
    match rng.choice(kinds):
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
        case field:
            entries[here] = renamed(rng, entries[here], field, lists)
    return tuple(tuple(entries) for entries in changed)


def renamed(rng, entry, field, lists):
    """Give an instruction another microbatch, peer or stage, if it has one."""
    num_stages = 1 + max(entry.stage for own in lists for entry in own)
    if field == "microbatch" and entry.microbatch is not None:
        return replace(entry, microbatch=rng.randrange(4))
    if field == "peer" and entry.peer is not None:
        return replace(entry, peer=rng.randrange(num_stages))
    return replace(entry, stage=rng.randrange(num_stages)) if field == "stage" else entry


def is_accepted(program, wiring):
    try:
        check(program, wiring)
    except ScheduleError:
        return False
    return True


CASES = [
    (schedule, wiring, 3)
    for schedule in (GPipe(), OneForwardOneBackward(), ZbH1())
    for wiring in (CHAIN, SKIPPING, WITHOUT_NORM)
]
CASES += [(Interleaved(virtual_stages=2), wiring, 4) for wiring in (VIRTUAL, ALONE)]


@pytest.mark.parametrize(("schedule", "wiring", "num_microbatches"), CASES)
def test_mutations_are_refused_if_and_only_if_they_change_the_meaning(
    schedule, wiring, num_microbatches
):
    intern = {}
    lists = schedule.build(wiring.num_stages, num_microbatches)
    program = add_communication(lists, wiring)
    meaning = play(program.lists, wiring, intern)
    assert meaning is not None
    rng = random.Random(0)
    num_refused = 0
    for _ in range(500):
        mutant = replace(program, lists=mutate(rng, program.lists))
        is_same = play(mutant.lists, wiring, intern) == meaning
        assert is_accepted(mutant, wiring) == is_same, mutant
        num_refused += not is_same
    assert 200 < num_refused < 500


@pytest.mark.parametrize(("schedule", "wiring", "num_microbatches"), CASES)
def test_two_mutations_do_not_hide_each_other(schedule, wiring, num_microbatches):
    intern = {}
    lists = schedule.build(wiring.num_stages, num_microbatches)
    program = add_communication(lists, wiring)
    meaning = play(program.lists, wiring, intern)
    rng = random.Random(1)
    for _ in range(300):
        mutant = replace(program, lists=mutate(rng, mutate(rng, program.lists)))
        is_same = play(mutant.lists, wiring, intern) == meaning
        assert is_accepted(mutant, wiring) == is_same, mutant


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
