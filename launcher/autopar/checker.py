"""The proof that a program is right for a wiring, made without looking at how it was built.

Proven, in this order, each resting on the ones before:

1. Each list holds only its own stage's instructions, and exactly those that the wiring calls for,
   each once: every microbatch has one forward and one backward per stage, every receive its send.
2. In each list, what makes a value stands before what reads it (the table `_BEFORE`), and the
   microbatches are in order. With 1, nothing leaks: each value's last reader comes after it.
3. Between two stages, each direction's sends and receives are in the same order. (4 would find it
   too, and say less.)
4. Nothing deadlocks even if a send waits for its receive: the lists are played so. Who does not
   wait can only be earlier, so executors whose sends return at once do not deadlock either.

A list is a total order, so the hosts of a submesh, which play the same list, start the same
collectives in the same order.

A failure raises `ScheduleError`: one line, then the lists around the place, which is marked.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.program import Program, Wiring
from launcher.errors import ScheduleError

_MARK = " <-- ERROR HERE"
_ROWS_AROUND = 4

_Place = tuple[int, int]  # submesh, index in its list

_BEFORE = {
    Op.FORWARD: (Op.RECEIVE_ACTIVATION,),
    Op.SEND_ACTIVATION: (Op.FORWARD,),
    Op.BACKWARD: (Op.FORWARD, Op.RECEIVE_COTANGENT),
    Op.SEND_COTANGENT: (Op.BACKWARD,),
    Op.SEND_TIED_GRADIENT: (Op.BACKWARD,),
    Op.SYNCHRONIZE: (Op.BACKWARD, Op.SEND_TIED_GRADIENT, Op.RECEIVE_TIED_GRADIENT),
    Op.SEND_NORM: (Op.SYNCHRONIZE,),
    Op.NORM: (Op.SYNCHRONIZE, Op.RECEIVE_NORM),
    Op.UPDATE: (Op.SYNCHRONIZE, Op.NORM),
    Op.SEND_TIED_PARAMETER: (Op.UPDATE,),
    Op.RECEIVE_TIED_PARAMETER: (Op.UPDATE,),
}
"""What an operation comes after in its list: those of its microbatch, or all if it has none.

`S` may reuse the memory of the gradients, so what is sent of them goes before. A stage changes its
parameters in one place, behind its own update: no backward may see those of the next step.
"""


def check(program: Program, wiring: Wiring) -> None:
    """Raise `ScheduleError` unless the program is complete and matched, cannot hang or leak."""
    if program.num_stages < wiring.num_stages:
        raise _error(
            program, f"it has {program.num_stages} stages, {wiring.num_stages} are wired", ()
        )
    for stage in range(program.num_stages):
        _check_complete(program, wiring, stage)
    for stage in range(program.num_stages):
        _check_order(program, stage)
    _check_channels(program)
    _check_no_deadlock(program)


def _check_complete(program: Program, wiring: Wiring, stage: int) -> None:
    entries = program.lists[stage]
    expected = set(_expected(stage, program, wiring))
    for index, entry in enumerate(entries):
        if entry not in expected:
            what = f"{entry} stands in the list of stage {stage}, which has no use for it"
            raise _error(program, what, ((stage, index),))
    counts = Counter(entries)
    for entry in sorted(expected, key=str):
        if counts[entry] == 0:
            what = f"{entry} is there 0 times, 1 is needed{_consequence(entry)}"
            raise _error(program, what, _where_missing(program, entry))
        if counts[entry] > 1:
            places = tuple((stage, i) for i, other in enumerate(entries) if other == entry)
            raise _error(program, f"{entry} is there {counts[entry]} times, 1 is needed", places)


def _expected(stage: int, program: Program, wiring: Wiring) -> Iterator[Instruction]:
    """Yield each instruction that the wiring calls for on this stage."""
    peers = {op: sorted(_peers(op, stage, program, wiring)) for op in Op}
    per_microbatch = (Op.SEND_ACTIVATION, Op.RECEIVE_ACTIVATION)
    per_microbatch += (Op.SEND_COTANGENT, Op.RECEIVE_COTANGENT)
    for k in range(program.num_microbatches):
        yield Instruction(op=Op.FORWARD, stage=stage, microbatch=k)
        yield Instruction(op=Op.BACKWARD, stage=stage, microbatch=k)
        for op in per_microbatch:
            for peer in peers[op]:
                yield Instruction(op=op, stage=stage, microbatch=k, peer=peer)
    yield Instruction(op=Op.SYNCHRONIZE, stage=stage)
    yield Instruction(op=Op.UPDATE, stage=stage)
    if wiring.with_norm:
        yield Instruction(op=Op.NORM, stage=stage)
    for op in (op for op in Op if op not in per_microbatch):
        for peer in peers[op]:
            yield Instruction(op=op, stage=stage, peer=peer)


def _peers(op: Op, stage: int, program: Program, wiring: Wiring) -> set[int]:
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
            return set(range(program.num_stages)) - {stage} if wiring.with_norm else set()
        case _:
            return set()


def _where_missing(program: Program, entry: Instruction) -> tuple[_Place, ...]:
    """Point at the missing one's partner, or behind the microbatch before it, or at the end."""
    entries = program.lists[entry.stage]
    if entry.peer is not None and entry.partner in program.lists[entry.peer]:
        return ((entry.peer, program.lists[entry.peer].index(entry.partner)),)
    before = [
        index
        for index, other in enumerate(entries)
        if other.op is entry.op and other.peer == entry.peer and other.microbatch is not None
        if other.microbatch < entry.microbatch
    ]
    return ((entry.stage, max(before) + 1 if before else len(entries)),)


def _consequence(entry: Instruction) -> str:
    match entry.op:
        case Op.FORWARD:
            return ": what was received for it leaks"
        case Op.BACKWARD:
            return f": the stash of microbatch {entry.microbatch} leaks"
        case _:
            return ""


def _check_order(program: Program, stage: int) -> None:
    last_at: dict[tuple[Op, int | None], int] = {}  # with None: of any microbatch
    for index, entry in enumerate(program.lists[stage]):
        last_at[entry.op, entry.microbatch] = last_at[entry.op, None] = index
    for index, entry in enumerate(program.lists[stage]):
        needs = [(op, entry.microbatch) for op in _BEFORE.get(entry.op, ())]
        if entry.op in (Op.FORWARD, Op.BACKWARD) and entry.microbatch:
            # Batch statistics and sums of gradients pass from each microbatch to the next.
            needs.append((entry.op, entry.microbatch - 1))
        for need in needs:
            other = last_at.get(need, -1)
            if other > index:
                what = f"{entry} is number {index} of its list, before number {other}, "
                what += f"{program.lists[stage][other]}, which it must come after"
                raise _error(program, what, ((stage, index), (stage, other)))


def _check_channels(program: Program) -> None:
    sends: dict[tuple[int, int], list[_Place]] = {}
    receives: dict[tuple[int, int], list[_Place]] = {}
    for stage, entries in enumerate(program.lists):
        for index, entry in enumerate(entries):
            if entry.is_send:
                sends.setdefault((stage, entry.peer), []).append((stage, index))
            elif entry.is_receive:
                receives.setdefault((entry.peer, stage), []).append((stage, index))
    for channel, sent in sends.items():
        for place, other in zip_longest(sent, receives.get(channel, [])):
            # Equal numbers: both sides hold all that the wiring calls for.
            send, receive = _at(program, place), _at(program, other)
            if send.partner != receive:
                what = f"{send} is sent where {receive} is received"
                raise _error(program, what, (place, other))


def _meets(entry: Instruction, program: Program, position: Sequence[int]) -> bool:
    """Whether a message finds its partner next in the peer's list; compute needs no partner."""
    if entry.peer is None:
        return True
    entries, index = program.lists[entry.peer], position[entry.peer]
    return index < len(entries) and entries[index] == entry.partner


def _check_no_deadlock(program: Program) -> None:
    """Play the lists: a compute instruction takes one step, a send and its receive one for both."""
    position = [0] * program.num_stages
    waiting_for_turn = list(range(program.num_stages))
    while waiting_for_turn:
        stage = waiting_for_turn.pop()
        entries = program.lists[stage]
        while position[stage] < len(entries):
            entry = entries[position[stage]]
            if not _meets(entry, program, position):
                break
            if entry.peer is not None:
                position[entry.peer] += 1
                waiting_for_turn.append(entry.peer)
            position[stage] += 1
    stuck = tuple(
        (stage, index) for stage, index in enumerate(position) if index < len(program.lists[stage])
    )
    if stuck:
        waits = ", ".join(str(_at(program, place)) for place in stuck)
        what = f"{len(stuck)} of {program.num_stages} stages wait for ever, at {waits}"
        raise _error(program, what, stuck)


def _at(program: Program, place: _Place) -> Instruction:
    stage, index = place
    return program.lists[stage][index]


def _error(program: Program, what: str, places: tuple[_Place, ...]) -> ScheduleError:
    return ScheduleError(
        f"wrong program: {what} (parallel.schedule): a bug in a schedule or in the communication "
        f"pass, report it with the grid\n{_grid(program, frozenset(places))}"
    )


def _grid(program: Program, places: frozenset[_Place]) -> str:
    """Draw the lists side by side, a column per stage, only the rows near a marked place."""
    rows = {
        row
        for _, index in places
        for row in range(max(0, index - _ROWS_AROUND), index + _ROWS_AROUND + 1)
    }
    last = max(map(len, program.lists), default=0)
    cells = [
        [f"{row}:", *(_cell(program, (stage, row), places) for stage in range(program.num_stages))]
        for row in sorted(rows)
        if row < last or any(index == row for _, index in places)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(program: Program, place: _Place, places: frozenset[_Place]) -> str:
    stage, index = place
    entries = program.lists[stage]
    text = str(entries[index]) if index < len(entries) else "(end)" if place in places else ""
    return text + _MARK if place in places else text
