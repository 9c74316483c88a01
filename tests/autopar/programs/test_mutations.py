"""The checker against an interpreter of its own, on random mutations of programs.

The interpreter plays a program on symbols, with sends that block, and says what every stage's
parameters are in the end. A mutation changes the meaning if they differ, if the play hangs, reads
what is gone, or leaves something behind; the checker must refuse exactly those mutations.
"""

import random
from dataclasses import replace

import pytest
from wirings import ALONE, SKIPPING, VIRTUAL

from launcher.autopar.programs.checker import check
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.instructions import Op
from launcher.autopar.programs.program import Wiring
from launcher.autopar.programs.schedules import GPipe, Interleaved, OneForwardOneBackward, ZbH1
from launcher.errors import ScheduleError

CHAIN = Wiring.chain(3, tied=((0, 2),), with_norm=True)
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
