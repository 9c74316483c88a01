"""The communication pass: adds to a schedule everything that it leaves out.

It appends what ends a step (`S`, `N`, `U`) and inserts every send, receive and free. Every message
comes from one place, `_dependencies`: an instruction that reads what an instruction of another stage
made. Where both stages lie on one submesh there is no message: who makes the value hands it over, and
the pass only makes sure that it stands before the reader.

The order of messages. Let every compute instruction take one round and every message none (that is
the picture `format_grid` prints). Messages are put in one order for all submeshes, by the round in
which they are made; in each list, messages stand in that order. The first of those that are left
can always proceed, so the lists cannot hang even where a send waits for its receive. Sliding a
message along the compute instructions of its list does not touch that order. So sends stand
directly behind the instruction that makes their value, and receives directly before the one that
reads it, or before the send that follows them in the order, whichever comes first.

Frees stand directly behind the last reader: of what a forward or backward made for other stages,
the last send; of the stash of a microbatch, the backward, or its second half.

Where a stage overlaps, its `S` is one launch with its last backward, or with the second half of it: it stands
directly behind, what is sent of either and what is freed come after both, and gradients of tied parameters
are received before both.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

from launcher.autopar.programs.instructions import (
    LAST_BACKWARDS,
    RECEIVE_OF_SEND,
    Instruction,
    Op,
)
from launcher.autopar.programs.program import (
    Program,
    Wiring,
    num_microbatches_in,
    splits_backward_in,
    to_csv,
    wiring_error,
)
from launcher.autopar.programs.schedules import ComputeLists
from launcher.errors import ScheduleError

_FORWARD, _BACKWARD = Op.FORWARD, Op.BACKWARD  # an Enum's attributes are slow to look up
_FREED = {
    Op.FORWARD: Op.FREE_ACTIVATION,
    Op.SEND_ACTIVATION: Op.FREE_ACTIVATION,
    Op.BACKWARD: Op.FREE_COTANGENT,
    Op.BACKWARD_INPUT: Op.FREE_COTANGENT,
    Op.SEND_COTANGENT: Op.FREE_COTANGENT,
}
"""What may be free behind an operation, if it was the last that makes or reads it."""


class _Message(NamedTuple):
    """A value that one stage makes and another reads, at these places of their submeshes' lists."""

    send: Op
    microbatch: int | None
    source: int
    made_at: int
    destination: int
    read_at: int


class _Placed(NamedTuple):
    """A send or receive to be inserted before compute instruction `slot` of its list."""

    instruction: Instruction
    slot: int


def add_communication(compute_lists: ComputeLists, wiring: Wiring) -> Program:
    """Complete a schedule's compute lists to the program of a whole step."""
    _require_complete(compute_lists, wiring)
    homes = wiring.homes(len(compute_lists))
    lists = tuple(_with_step_end(instructions, wiring) for instructions in compute_lists)
    messages = tuple(_dependencies(lists, wiring, homes))
    rounds = _rounds(lists, messages, homes)
    placed: list[list[_Placed]] = [[] for _ in lists]
    for _, message in sorted(
        (_order(message, rounds, homes), message)
        for message in (*messages, *_parameters(lists, wiring, homes))
        if homes[message.source] != homes[message.destination]
    ):
        send, microbatch, source, made_at, destination, read_at = message
        sent = Instruction(op=send, stage=source, microbatch=microbatch, peer=destination)
        received = Instruction(
            op=RECEIVE_OF_SEND[send], stage=destination, microbatch=microbatch, peer=source
        )
        placed[homes[source]].append(_Placed(sent, made_at + 1))
        placed[homes[destination]].append(_Placed(received, read_at))
    frees = _Frees(wiring, homes)
    return Program(
        lists=tuple(
            frees.inserted(_merge(entries, here))
            for entries, here in zip(lists, placed, strict=True)
        ),
        num_microbatches=num_microbatches_in(lists),
    )


def format_grid(program: Program) -> str:
    """Draw a checked program's compute as CSV: a line per submesh, a column per round."""
    lists = tuple(
        tuple(entry for entry in entries if entry.is_compute) for entries in program.lists
    )
    wiring = _wiring_of(program)
    rounds = _rounds(
        lists, tuple(_dependencies(lists, wiring, program.submesh_of)), program.submesh_of
    )
    num_rounds = 1 + max((max(row, default=-1) for row in rounds), default=-1)
    width = max((len(str(entry)) for entries in lists for entry in entries), default=0)
    grid = [[" " * width] * num_rounds for _ in lists]
    for row, entries, columns in zip(grid, lists, rounds, strict=True):
        for entry, column in zip(entries, columns, strict=True):
            row[column] = str(entry).ljust(width)
    return to_csv(grid)


def _with_step_end(compute: tuple[Instruction, ...], wiring: Wiring) -> tuple[Instruction, ...]:
    stages = sorted({entry.stage for entry in compute})
    ops = (Op.NORM, Op.UPDATE) if wiring.with_norm else (Op.UPDATE,)
    last = {entry.stage: at for at, entry in enumerate(compute) if entry.op in LAST_BACKWARDS}
    overlapping = {last[stage]: stage for stage in stages if stage in wiring.overlapping}
    passes: list[Instruction] = []
    for at, entry in enumerate(compute):
        passes.append(entry)
        if at in overlapping:
            passes.append(Instruction(op=Op.SYNCHRONIZE, stage=overlapping[at]))
    apart = [stage for stage in stages if stage not in wiring.overlapping]
    passes += [Instruction(op=Op.SYNCHRONIZE, stage=stage) for stage in apart]
    return (*passes, *(Instruction(op=op, stage=stage) for op in ops for stage in stages))


def _dependencies(
    lists: ComputeLists, wiring: Wiring, homes: tuple[int, ...]
) -> Iterator[_Message]:
    """Yield what one stage makes and another reads, but for `_parameters`."""
    at = [
        {(entry.op, entry.stage, entry.microbatch): index for index, entry in enumerate(entries)}
        for entries in lists
    ]
    backward = Op.BACKWARD_INPUT if splits_backward_in(lists) else _BACKWARD
    microbatches = range(num_microbatches_in(lists))
    for pairs, op, send in (
        (wiring.edges, _FORWARD, Op.SEND_ACTIVATION),
        ([(dst, src) for src, dst in wiring.differentiable], backward, Op.SEND_COTANGENT),
    ):
        for source, destination in pairs:
            made, read = at[homes[source]], at[homes[destination]]
            for k in microbatches:
                made_at = _launch_end(lists[homes[source]], made[op, source, k], wiring.overlapping)
                yield _Message(send, k, source, made_at, destination, read[op, destination, k])
    # What a step's end sends stands behind the last instruction of its kind on the submesh: sent in
    # between, it would hold up what the order of messages puts before it.
    for owner, user in wiring.tied:
        own = user if homes[user] == homes[owner] else None
        made_at = _lent_at(lists[homes[user]], own, wiring.overlapping)
        read_at = at[homes[owner]][Op.SYNCHRONIZE, owner, None] - (owner in wiring.overlapping)
        yield _Message(Op.SEND_TIED_GRADIENT, None, user, made_at, owner, read_at)
    if wiring.with_norm:
        made = [max(_places(entries, Op.SYNCHRONIZE)) for entries in lists]
        for source, destination in permutations(range(len(homes)), 2):
            read_at = at[homes[destination]][Op.NORM, destination, None]
            yield _Message(Op.SEND_NORM, None, source, made[homes[source]], destination, read_at)


def _launch_end(entries: tuple[Instruction, ...], pass_at: int, overlapping: frozenset[int]) -> int:
    """Where the launch of a pass ends: with itself, or with the `S` directly behind a backward."""
    stage = entries[pass_at].stage
    if stage not in overlapping:
        return pass_at
    follows = entries[pass_at + 1 : pass_at + 2]
    return pass_at + any(e.op is Op.SYNCHRONIZE and e.stage == stage for e in follows)


def _lent_at(
    entries: tuple[Instruction, ...], stage: int | None, overlapping: frozenset[int]
) -> int:
    """Behind which place the gradients of tied parameters are complete.

    Args:
        stage: whose, where they stay on the submesh; None: they are sent, behind the last backward of all.
    """
    backwards = [
        at
        for at, entry in enumerate(entries)
        if entry.op in LAST_BACKWARDS and stage in (None, entry.stage)
    ]
    return _launch_end(entries, backwards[-1], overlapping)


def _parameters(lists: ComputeLists, wiring: Wiring, homes: tuple[int, ...]) -> Iterator[_Message]:
    """Yield the messages that the next step reads: updated tied parameters, at the lists' ends."""
    for owner, user in wiring.tied:
        made_at, read_at = len(lists[homes[owner]]) - 1, len(lists[homes[user]])
        yield _Message(Op.SEND_TIED_PARAMETER, None, owner, made_at, user, read_at)


def _places(entries: tuple[Instruction, ...], op: Op) -> list[int]:
    return [index for index, entry in enumerate(entries) if entry.op is op]


def _rounds(
    lists: ComputeLists, messages: tuple[_Message, ...], homes: tuple[int, ...]
) -> list[list[int]]:
    """Return the round of every instruction when each takes one round and messages take none."""
    reads: list[dict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in lists]
    for message in messages:
        made = (homes[message.source], message.made_at)
        reads[homes[message.destination]][message.read_at].append(made)
    rounds: list[list[int]] = [[] for _ in lists]
    num_left, now = sum(map(len, lists)), 0
    while num_left:
        num_done = [len(row) for row in rounds]  # before this round
        ready = [
            submesh
            for submesh, done in enumerate(num_done)
            if done < len(lists[submesh])
            and all(made_at < num_done[source] for source, made_at in reads[submesh].get(done, ()))
        ]
        if not ready:
            stuck = [str(lists[i][done]) for i, done in enumerate(num_done) if done < len(lists[i])]
            raise ScheduleError(
                f"{len(stuck)} of {len(lists)} submeshes wait for ever, at {', '.join(stuck)} "
                "(parallel.schedule): order the compute instructions so that no two wait in a ring"
            )
        for submesh in ready:
            rounds[submesh].append(now)
        num_left -= len(ready)
        now += 1
    return rounds


def _order(message: _Message, rounds: list[list[int]], homes: tuple[int, ...]) -> tuple[int, int]:
    """Order a microbatch's message by the round that makes it, others by when they are read.

    Of one round, the oldest microbatch goes first: where sends block, no submesh then holds back a
    value that it has for one that it still waits for.
    """
    if message.microbatch is not None:
        return rounds[homes[message.source]][message.made_at], message.microbatch
    reader = rounds[homes[message.destination]]
    if message.read_at == len(reader):  # the next step reads it
        return max(map(max, rounds)), 0
    return reader[message.read_at] - 1, len(reader)


def _merge(compute: tuple[Instruction, ...], placed: list[_Placed]) -> tuple[Instruction, ...]:
    """Insert the placed ones in their order: sends at their slot, receives as late as they may."""
    latest = len(compute)
    slots: list[list[Instruction]] = [[] for _ in range(len(compute) + 1)]
    for entry in reversed(placed):
        latest = min(latest, entry.slot)
        slots[latest].append(entry.instruction)
    merged: list[Instruction] = []
    for slot, instruction in zip(slots, (*compute, None), strict=True):
        merged += reversed(slot)
        if instruction is not None:
            merged.append(instruction)
    return tuple(merged)


def _wiring_of(program: Program) -> Wiring:
    """Recover the wiring from the sends."""
    pairs: dict[Op, set[tuple[int, int]]] = defaultdict(set)
    for entries in program.lists:
        for entry in entries:
            if entry.is_send:
                pairs[entry.op].add((entry.stage, entry.peer))
    return Wiring(
        edges=tuple(sorted(pairs[Op.SEND_ACTIVATION])),
        differentiable=tuple(sorted((d, s) for s, d in pairs[Op.SEND_COTANGENT])),
        tied=tuple(sorted((owner, user) for user, owner in pairs[Op.SEND_TIED_GRADIENT])),
        with_norm=any(entry.op is Op.NORM for entries in program.lists for entry in entries),
        submesh_of=program.submesh_of or None,
    )


class _Frees:
    """Inserts frees into lists that have everything else."""

    def __init__(self, wiring: Wiring, homes: tuple[int, ...]) -> None:
        self._overlapping = wiring.overlapping
        # Per stage that makes something for others: how many messages it is sent in.
        self._num_sends: dict[Op, dict[int, int]] = {
            Op.FREE_ACTIVATION: defaultdict(int),
            Op.FREE_COTANGENT: defaultdict(int),
        }
        pairs = [(Op.FREE_ACTIVATION, source, reader) for source, reader in wiring.edges]
        pairs += [(Op.FREE_COTANGENT, dst, src) for src, dst in wiring.differentiable]
        for free, maker, reader in pairs:
            self._num_sends[free][maker] += homes[maker] != homes[reader]

    def inserted(self, entries: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        """Add each free behind the last instruction that makes or reads what it frees."""
        left: dict[tuple[Op, int, int], int] = {}
        merged: list[Instruction] = []
        held_back: list[Instruction] = []  # by a launch that has not ended
        for at, entry in enumerate(entries):
            merged.append(entry)
            held_back += self._behind(entry, left)
            if held_back and not self._goes_on(entries, at):
                merged += held_back
                held_back.clear()
        return tuple(merged)

    def _behind(
        self, entry: Instruction, left: dict[tuple[Op, int, int], int]
    ) -> Iterator[Instruction]:
        """Yield what may be freed behind an instruction; `left` counts what still reads the others."""
        op, stage, microbatch = entry.op, entry.stage, entry.microbatch
        if op in LAST_BACKWARDS:
            yield Instruction(op=Op.FREE_STASH, stage=stage, microbatch=microbatch)
        free = _FREED.get(op)
        if free is None or stage not in self._num_sends[free]:
            return
        key = (free, stage, microbatch)
        left[key] = left.get(key, self._num_sends[free][stage] + 1) - 1
        if left[key] == 0:
            yield Instruction(op=free, stage=stage, microbatch=microbatch)

    def _goes_on(self, entries: tuple[Instruction, ...], at: int) -> bool:
        """Whether a backward is launched with what stands behind it."""
        is_backward = entries[at].op in LAST_BACKWARDS
        return is_backward and _launch_end(entries, at, self._overlapping) > at


def _require_complete(compute_lists: ComputeLists, wiring: Wiring) -> None:
    """Raise unless each list has F and B of every microbatch once, for its own stages.

    Where one of them splits its backward, all have I and W instead of B.
    """
    homes = wiring.homes(len(compute_lists))
    if len(homes) < wiring.num_stages:
        raise wiring_error(f"{wiring.num_stages} stages are wired, {len(homes)} are scheduled")
    if len(compute_lists) != len(set(homes)):
        raise wiring_error(
            f"{len(set(homes))} submeshes are wired, {len(compute_lists)} are scheduled"
        )
    ops = (_FORWARD, _BACKWARD)
    if splits_backward_in(compute_lists):
        ops = (_FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    microbatches = range(num_microbatches_in(compute_lists))
    for submesh, entries in enumerate(compute_lists):
        own = [stage for stage, home in enumerate(homes) if home == submesh]
        expected = {(op, stage, k) for op in ops for stage in own for k in microbatches}
        found = {(entry.op, entry.stage, entry.microbatch) for entry in entries}
        if found != expected or len(entries) != len(expected) or not entries:
            raise ScheduleError(
                f"the compute list {submesh} has {len(entries)} instructions, {len(expected)} are "
                f"needed: {' and '.join(ops)} of each microbatch once (parallel.schedule): correct "
                "its builder"
            )
