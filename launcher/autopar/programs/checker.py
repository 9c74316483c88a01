"""The proof that a program is right for a wiring, made without looking at how it was built.

Proven, in this order, each resting on the ones before:

1. Each list holds only instructions of its submesh's stages, and exactly those that the wiring calls
   for, each once: every microbatch has one forward and one backward (or both of its halves) per
   stage, every receive its send, and everything that is kept for a while one instruction that frees it.
2. In each list, what makes a value stands before what reads it, and both before what frees it (the
   table `_BEFORE`, and `_handed_over` for values that stay on the submesh); forwards and sums of
   gradients take the microbatches in order. With 1, nothing leaks, and nothing is read that is gone.
3. Between two submeshes, each direction's sends and receives are in the same order. (5 would find it
   too, and say less.)
4. Where a stage overlaps, its `S` stands directly behind its last backward: both are one launch.
5. Nothing deadlocks even if a send waits for its receive: the lists are played so. Who does not
   wait can only be earlier, so executors whose sends return at once do not deadlock either.

A list is a total order, so the hosts of a submesh, which play the same list, start the same
collectives in the same order.

A failure raises `ScheduleError`: one line, then the lists around the place, which is marked.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

from launcher.autopar.programs.instructions import LAST_BACKWARDS, Instruction, Op
from launcher.autopar.programs.program import Program, Wiring
from launcher.errors import ScheduleError

_MARK = " <-- ERROR HERE"
_ROWS_AROUND = 4

_Place = tuple[int, int]  # submesh, index in its list
_Before = Mapping[tuple[Op, int], Sequence[tuple[Op, int]]]

_CROSSING = (
    Op.SEND_ACTIVATION,
    Op.RECEIVE_ACTIVATION,
    Op.SEND_COTANGENT,
    Op.RECEIVE_COTANGENT,
)

_BEFORE = {
    Op.FORWARD: (Op.RECEIVE_ACTIVATION,),
    Op.SEND_ACTIVATION: (Op.FORWARD,),
    Op.FREE_ACTIVATION: (Op.FORWARD, Op.SEND_ACTIVATION),
    Op.BACKWARD: (Op.FORWARD, Op.RECEIVE_COTANGENT),
    Op.BACKWARD_INPUT: (Op.FORWARD, Op.RECEIVE_COTANGENT),
    Op.BACKWARD_WEIGHT: (Op.BACKWARD_INPUT,),
    Op.SEND_COTANGENT: (Op.BACKWARD, Op.BACKWARD_INPUT),
    Op.FREE_COTANGENT: (Op.BACKWARD, Op.BACKWARD_INPUT, Op.SEND_COTANGENT),
    Op.FREE_STASH: (Op.BACKWARD, Op.BACKWARD_WEIGHT),
    Op.SEND_TIED_GRADIENT: (Op.BACKWARD, Op.BACKWARD_WEIGHT),
    Op.SYNCHRONIZE: (
        Op.BACKWARD,
        Op.BACKWARD_WEIGHT,
        Op.SEND_TIED_GRADIENT,
        Op.RECEIVE_TIED_GRADIENT,
    ),
    Op.SEND_NORM: (Op.SYNCHRONIZE,),
    Op.NORM: (Op.SYNCHRONIZE, Op.RECEIVE_NORM),
    Op.UPDATE: (Op.SYNCHRONIZE, Op.NORM),
    Op.SEND_TIED_PARAMETER: (Op.UPDATE,),
    Op.RECEIVE_TIED_PARAMETER: (Op.UPDATE,),
}
"""What an operation comes after in its stage: those of its microbatch, or all if it has none.

`S` may reuse the memory of the gradients, so what is sent of them goes before. A stage changes its
parameters in one place, behind its own update: no backward may see those of the next step.
"""

_IN_ORDER = frozenset((Op.FORWARD, Op.BACKWARD, Op.BACKWARD_WEIGHT))
"""Batch statistics and sums of gradients pass from each microbatch to the next."""


def check(program: Program, wiring: Wiring) -> None:
    """Raise `ScheduleError` unless the program is complete and matched, cannot hang or leak."""
    homes = wiring.homes(program.num_submeshes)
    if len(homes) < wiring.num_stages:
        what = f"it has {len(homes)} stages, {wiring.num_stages} are wired"
        raise _error(program, what, ())
    if len(set(homes)) != program.num_submeshes:
        what = f"it has {program.num_submeshes} submeshes, {len(set(homes))} are wired"
        raise _error(program, what, ())
    backward = (Op.BACKWARD,)
    if program.splits_backward:
        backward = (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    for submesh in range(program.num_submeshes):
        own = [stage for stage, home in enumerate(homes) if home == submesh]
        expected = {
            entry
            for stage in own
            for entry in _expected(stage, program.num_microbatches, backward, wiring, homes)
        }
        _check_complete(program, homes, submesh, expected)
    before = _before(wiring, homes)
    for submesh in range(program.num_submeshes):
        _check_order(program, before, submesh)
    _check_channels(program, homes)
    _check_overlaps(program, wiring)
    _check_no_deadlock(program, homes)


def _check_complete(
    program: Program, homes: Sequence[int], submesh: int, expected: set[Instruction]
) -> None:
    entries = program.lists[submesh]
    for index, entry in enumerate(entries):
        if entry not in expected:
            what = f"{entry} stands in the list of submesh {submesh}, which has no use for it"
            raise _error(program, what, ((submesh, index),))
    counts = Counter(entries)
    if len(counts) == len(expected) == len(entries):
        return
    for entry in sorted(expected, key=str):
        if counts[entry] == 0:
            what = f"{entry} is there 0 times, 1 is needed{_consequence(entry)}"
            raise _error(program, what, _where_missing(program, homes, entry))
        if counts[entry] > 1:
            places = tuple((submesh, i) for i, other in enumerate(entries) if other == entry)
            raise _error(program, f"{entry} is there {counts[entry]} times, 1 is needed", places)


def _expected(
    stage: int,
    num_microbatches: int,
    backward: tuple[Op, ...],
    wiring: Wiring,
    homes: Sequence[int],
) -> Iterator[Instruction]:
    """Yield each instruction that the wiring calls for on this stage."""
    peers = {
        op: sorted(peer for peer in found if homes[peer] != homes[stage])
        for op in Op
        for found in [_peers(op, stage, len(homes), wiring)]
    }
    once = [Op.FORWARD, *backward, Op.FREE_STASH]
    if any(source == stage for source, _ in wiring.edges):
        once.append(Op.FREE_ACTIVATION)
    if any(reader == stage for _, reader in wiring.differentiable):
        once.append(Op.FREE_COTANGENT)
    for k in range(num_microbatches):
        for op in once:
            yield Instruction(op=op, stage=stage, microbatch=k)
        for op in _CROSSING:
            for peer in peers[op]:
                yield Instruction(op=op, stage=stage, microbatch=k, peer=peer)
    yield Instruction(op=Op.SYNCHRONIZE, stage=stage)
    yield Instruction(op=Op.UPDATE, stage=stage)
    if wiring.with_norm:
        yield Instruction(op=Op.NORM, stage=stage)
    for op in (op for op in Op if op not in _CROSSING):
        for peer in peers[op]:
            yield Instruction(op=op, stage=stage, peer=peer)


def _peers(op: Op, stage: int, num_stages: int, wiring: Wiring) -> set[int]:
    """Return the stages that this one exchanges such a message with."""
    match op:
        case Op.SEND_ACTIVATION:
            return {dst for src, dst in wiring.edges if src == stage}
        case Op.RECEIVE_ACTIVATION:
            return {src for src, dst in wiring.edges if dst == stage}
        case Op.SEND_COTANGENT:
            return {src for src, dst in wiring.differentiable if dst == stage}
        case Op.RECEIVE_COTANGENT:
            return {dst for src, dst in wiring.differentiable if src == stage}
        case Op.SEND_TIED_GRADIENT | Op.RECEIVE_TIED_PARAMETER:
            return {owner for owner, user in wiring.tied if user == stage}
        case Op.RECEIVE_TIED_GRADIENT | Op.SEND_TIED_PARAMETER:
            return {user for owner, user in wiring.tied if owner == stage}
        case Op.SEND_NORM | Op.RECEIVE_NORM:
            return set(range(num_stages)) - {stage} if wiring.with_norm else set()
        case _:
            return set()


def _where_missing(
    program: Program, homes: Sequence[int], entry: Instruction
) -> tuple[_Place, ...]:
    """Point at the missing one's partner, or behind the microbatch before it, or at the end."""
    submesh = homes[entry.stage]
    entries = program.lists[submesh]
    if entry.peer is not None and entry.partner in program.lists[homes[entry.peer]]:
        peer = homes[entry.peer]
        return ((peer, program.lists[peer].index(entry.partner)),)
    before = [
        index
        for index, other in enumerate(entries)
        if (other.op, other.stage, other.peer) == (entry.op, entry.stage, entry.peer)
        and other.microbatch is not None
        and other.microbatch < entry.microbatch
    ]
    return ((submesh, max(before) + 1 if before else len(entries)),)


def _consequence(entry: Instruction) -> str:
    match entry.op:
        case Op.FORWARD:
            return ": what was received for it leaks"
        case Op.BACKWARD | Op.BACKWARD_WEIGHT:
            return f": the stash of microbatch {entry.microbatch} leaks"
        case Op.FREE_ACTIVATION | Op.FREE_COTANGENT | Op.FREE_STASH:
            return f": what it frees of microbatch {entry.microbatch} leaks"
        case _:
            return ""


def _before(wiring: Wiring, homes: Sequence[int]) -> _Before:
    """Return what each operation of each stage comes after in its list."""
    before = defaultdict(list)
    for stage in range(len(homes)):
        for op, earlier in _BEFORE.items():
            before[op, stage] += [(other, stage) for other in earlier]
        if stage in wiring.overlapping:  # which leaves the gradients alone that it lends
            before[Op.SYNCHRONIZE, stage].remove((Op.SEND_TIED_GRADIENT, stage))
    for later, earlier in _handed_over(wiring, homes):
        if homes[later[1]] == homes[earlier[1]]:
            before[later].append(earlier)
    return before


def _handed_over(
    wiring: Wiring, homes: Sequence[int]
) -> Iterator[tuple[tuple[Op, int], tuple[Op, int]]]:
    """Yield (reader, maker) of what is no message where both lie on one submesh."""
    backwards = (Op.BACKWARD, Op.BACKWARD_INPUT)
    for source, reader in wiring.edges:
        yield (Op.FORWARD, reader), (Op.FORWARD, source)
    for source, reader in wiring.differentiable:
        for op in backwards:
            yield (op, source), (op, reader)
    for owner, user in wiring.tied:  # whose parameters change behind the owner's `S`, too
        for op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            yield (Op.SYNCHRONIZE, owner), (op, user)
    for source, reader in permutations(range(len(homes)), 2):
        yield (Op.NORM, reader), (Op.SYNCHRONIZE, source)


def _check_order(program: Program, before: _Before, submesh: int) -> None:
    entries = program.lists[submesh]
    last_at: dict[tuple[Op, int, int | None], int] = {}  # with None: of any microbatch
    for index, entry in enumerate(entries):
        op, stage, microbatch = entry.op, entry.stage, entry.microbatch
        last_at[op, stage, microbatch] = last_at[op, stage, None] = index
    for index, entry in enumerate(entries):
        op, stage, microbatch = entry.op, entry.stage, entry.microbatch
        others = [last_at.get((*maker, microbatch), -1) for maker in before.get((op, stage), ())]
        if microbatch and op in _IN_ORDER:
            others.append(last_at.get((op, stage, microbatch - 1), -1))
        if others and max(others) > index:
            other = next(other for other in others if other > index)
            what = f"{entry} is number {index} of its list, before number {other}, "
            what += f"{entries[other]}, which it must come after"
            raise _error(program, what, ((submesh, index), (submesh, other)))


def _check_channels(program: Program, homes: Sequence[int]) -> None:
    sends: dict[tuple[int, int], list[_Place]] = defaultdict(list)
    receives: dict[tuple[int, int], list[_Place]] = defaultdict(list)
    for submesh, entries in enumerate(program.lists):
        for index, entry in enumerate(entries):
            if entry.is_send:
                sends[submesh, homes[entry.peer]].append((submesh, index))
            elif entry.is_receive:
                receives[homes[entry.peer], submesh].append((submesh, index))
    for channel, sent in sends.items():
        for place, other in zip(sent, receives[channel], strict=True):
            # Equal numbers: both sides hold all that the wiring calls for.
            send, receive = _at(program, place), _at(program, other)
            if not receive.is_partner_of(send):
                what = f"{send} is sent where {receive} is received"
                raise _error(program, what, (place, other))


def _check_overlaps(program: Program, wiring: Wiring) -> None:
    """With 2, no message stands between the two, and they are those of the last microbatch."""
    for submesh, entries in enumerate(program.lists):
        for index, entry in enumerate(entries):
            if entry.op is not Op.SYNCHRONIZE or entry.stage not in wiring.overlapping:
                continue
            other = entries[index - 1]
            if other.stage != entry.stage or other.op not in LAST_BACKWARDS:
                what = f"{entry} stands behind {other}, and is launched with its last backward"
                raise _error(program, what, ((submesh, index - 1), (submesh, index)))


def _is_next(
    entry: Instruction, program: Program, peer: int | None, position: Sequence[int]
) -> bool:
    """Whether a message finds its partner next in the peer's list; others need none."""
    if peer is None:
        return True
    entries, index = program.lists[peer], position[peer]
    return index < len(entries) and entries[index].is_partner_of(entry)


def _check_no_deadlock(program: Program, homes: Sequence[int]) -> None:
    """Play the lists: an instruction takes one step, a send and its receive one for both."""
    position = [0] * program.num_submeshes
    waiting_for_turn = list(range(program.num_submeshes))
    while waiting_for_turn:
        submesh = waiting_for_turn.pop()
        entries = program.lists[submesh]
        while position[submesh] < len(entries):
            entry = entries[position[submesh]]
            peer = None if entry.peer is None else homes[entry.peer]
            if not _is_next(entry, program, peer, position):
                break
            if peer is not None:
                position[peer] += 1
                waiting_for_turn.append(peer)
            position[submesh] += 1
    stuck = tuple(
        (submesh, index)
        for submesh, index in enumerate(position)
        if index < len(program.lists[submesh])
    )
    if stuck:
        waits = ", ".join(str(_at(program, place)) for place in stuck)
        what = f"{len(stuck)} of {program.num_submeshes} submeshes wait for ever, at {waits}"
        raise _error(program, what, stuck)


def _at(program: Program, place: _Place) -> Instruction:
    submesh, index = place
    return program.lists[submesh][index]


def _error(program: Program, what: str, places: tuple[_Place, ...]) -> ScheduleError:
    return ScheduleError(
        f"wrong program: {what} (parallel.schedule): a bug in a schedule or in the communication "
        f"pass, report it with the grid\n{_grid(program, frozenset(places))}"
    )


def _grid(program: Program, places: frozenset[_Place]) -> str:
    """Draw the lists side by side, a column per submesh, only the rows near a marked place."""
    rows = {
        row
        for _, index in places
        for row in range(max(0, index - _ROWS_AROUND), index + _ROWS_AROUND + 1)
    }
    last = max(map(len, program.lists), default=0)
    cells = [
        [f"{row}:", *(_cell(program, (i, row), places) for i in range(program.num_submeshes))]
        for row in sorted(rows)
        if row < last or any(index == row for _, index in places)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(program: Program, place: _Place, places: frozenset[_Place]) -> str:
    submesh, index = place
    entries = program.lists[submesh]
    text = str(entries[index]) if index < len(entries) else "(end)" if place in places else ""
    return text + _MARK if place in places else text
