"""The program of a step, and the pass that adds to a schedule everything it leaves out.

A program is data: one list of instructions per submesh, executed in order. The pass appends what
ends a step (`S`, `N`, `U`) and inserts every send and receive. Every message comes from one place,
`_dependencies`: an instruction that reads what an instruction of another stage made.

The order of messages. Let every compute instruction take one round and every message none (that is
the picture `format_grid` prints). Messages are put in one order for all stages, by the round in
which they are made; in each list, messages stand in that order. The first of those that are left
can always proceed, so the lists cannot hang even where a send waits for its receive. Sliding a
message along the compute instructions of its list does not touch that order. So sends stand
directly behind the instruction that makes their value, and receives directly before the one that
reads it, or before the send that follows them in the order, whichever comes first.

There is no instruction that frees. Every value dies at an instruction that is there already (the
table in docs/schedules.md), so a list of frees would only repeat the lists, and could disagree.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from launcher.autopar.instructions import RECEIVE_OF_SEND, Instruction, Op
from launcher.autopar.schedules import ComputeLists
from launcher.errors import ScheduleError

_FORWARD, _BACKWARD = Op.FORWARD, Op.BACKWARD  # an Enum's attributes are slow to look up


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Which stages exchange what.

    Attributes:
        edges: (source, destination) of activations, source < destination; may skip stages.
        differentiable: The edges whose cotangents come back.
        tied: (owner, user) of parameters that two stages read and the owner updates.
        with_norm: Whether the update needs the norm of all gradients (clipping, loss scaling).
    """

    edges: tuple[tuple[int, int], ...]
    differentiable: tuple[tuple[int, int], ...]
    tied: tuple[tuple[int, int], ...] = ()
    with_norm: bool = False

    def __post_init__(self) -> None:
        for name, pairs in (("edges", self.edges), ("tied", self.tied)):
            if len(set(pairs)) != len(pairs):
                raise _wiring_error(f"{len(pairs)} {name}, {len(set(pairs))} distinct ones")
        for source, destination in self.edges:
            if not 0 <= source < destination:
                raise _wiring_error(f"edge {source} to {destination} does not go to a later stage")
        for owner, user in self.tied:
            if owner == user:
                raise _wiring_error(f"stage {owner} is tied to stage {user}, itself")
        strange = set(self.differentiable) - set(self.edges)
        if strange or len(set(self.differentiable)) != len(self.differentiable):
            raise _wiring_error(
                f"{len(self.differentiable)} differentiable edges are not distinct ones of "
                f"the {len(self.edges)} edges"
            )

    @classmethod
    def chain(
        cls, num_stages: int, *, tied: tuple[tuple[int, int], ...] = (), with_norm: bool = False
    ) -> "Wiring":
        """Wire each stage to the next, differentiably."""
        edges = tuple((stage, stage + 1) for stage in range(num_stages - 1))
        return cls(edges=edges, differentiable=edges, tied=tied, with_norm=with_norm)

    @property
    def num_stages(self) -> int:
        """Count the stages that are wired: one more than the last one named."""
        return 1 + max((max(pair) for pair in self.edges + self.tied), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The instruction lists of one step, one per submesh, each to be executed in order.

    Attributes:
        lists: `lists[submesh]`. One stage per submesh for now, so the index is the stage as well.
        num_microbatches: How many microbatches every stage sees.
    """

    lists: tuple[tuple[Instruction, ...], ...]
    num_microbatches: int

    @property
    def num_stages(self) -> int:
        return len(self.lists)


class _Message(NamedTuple):
    """A value made by the instruction at `made_at` of one list and read at `read_at` of another."""

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
    lists = tuple(_with_step_end(instructions, wiring) for instructions in compute_lists)
    messages = tuple(_dependencies(lists, wiring))
    rounds = _rounds(lists, messages)
    placed: list[list[_Placed]] = [[] for _ in lists]
    for _, message in sorted(
        (_order(message, rounds), message) for message in (*messages, *_parameters(lists, wiring))
    ):
        send, microbatch, source, made_at, destination, read_at = message
        sent = Instruction(op=send, stage=source, microbatch=microbatch, peer=destination)
        received = Instruction(
            op=RECEIVE_OF_SEND[send], stage=destination, microbatch=microbatch, peer=source
        )
        placed[source].append(_Placed(sent, made_at + 1))
        placed[destination].append(_Placed(received, read_at))
    return Program(
        lists=tuple(_merge(lists[stage], placed[stage]) for stage in range(len(lists))),
        num_microbatches=_num_microbatches(lists),
    )


def dispatch_order(program: Program) -> tuple[Instruction, ...]:
    """Return one order for a single thread that drives all submeshes.

    Each list keeps its order, every send comes before its receive, and the submeshes take turns of
    one compute instruction, so that none runs far ahead of the others.
    """
    order: list[Instruction] = []
    position = [0] * program.num_stages
    num_under_way: dict[tuple[int, int], int] = defaultdict(int)
    num_total = sum(map(len, program.lists))
    while len(order) < num_total:
        num_before = len(order)
        for submesh, instructions in enumerate(program.lists):
            turn = _turn(instructions, position[submesh], num_under_way)
            position[submesh] += len(turn)
            order += turn
        if len(order) == num_before:
            raise ScheduleError(
                f"only {num_before} of {num_total} instructions can be dispatched "
                "(parallel.schedule): check the program with checker.check"
            )
    return tuple(order)


def format_program(program: Program) -> str:
    """Write the lists as CSV, one line per submesh; `parse_program` reads it back."""
    return _to_csv([[str(entry) for entry in entries] for entries in program.lists])


def parse_program(text: str) -> Program:
    """Read what `format_program` wrote."""
    rows = csv.reader(io.StringIO(text))
    lists = tuple(tuple(Instruction.parse(cell) for cell in row if cell.strip()) for row in rows)
    return Program(lists=lists, num_microbatches=_num_microbatches(lists))


def format_grid(program: Program) -> str:
    """Draw a checked program's compute as CSV: a line per submesh, a column per round."""
    lists = tuple(
        tuple(entry for entry in entries if entry.is_compute) for entries in program.lists
    )
    rounds = _rounds(lists, tuple(_dependencies(lists, _wiring_of(program))))
    num_rounds = 1 + max((max(row, default=-1) for row in rounds), default=-1)
    width = max((len(str(entry)) for entries in lists for entry in entries), default=0)
    grid = [[" " * width] * num_rounds for _ in lists]
    for row, entries, columns in zip(grid, lists, rounds, strict=True):
        for entry, column in zip(entries, columns, strict=True):
            row[column] = str(entry).ljust(width)
    return _to_csv(grid)


def _with_step_end(compute: tuple[Instruction, ...], wiring: Wiring) -> tuple[Instruction, ...]:
    stage = compute[0].stage
    ops = (Op.SYNCHRONIZE, Op.NORM, Op.UPDATE) if wiring.with_norm else (Op.SYNCHRONIZE, Op.UPDATE)
    return (*compute, *(Instruction(op=op, stage=stage) for op in ops))


def _dependencies(lists: ComputeLists, wiring: Wiring) -> Iterator[_Message]:
    """Yield every message but those of `_parameters`: what one list makes and another reads."""
    at = [
        {(entry.op, entry.microbatch): index for index, entry in enumerate(entries)}
        for entries in lists
    ]
    num_microbatches = _num_microbatches(lists)
    for pairs, op, send in (
        (wiring.edges, _FORWARD, Op.SEND_ACTIVATION),
        ([(dst, src) for src, dst in wiring.differentiable], _BACKWARD, Op.SEND_COTANGENT),
    ):
        for source, destination in pairs:
            made, read = at[source], at[destination]
            for k in range(num_microbatches):
                yield _Message(send, k, source, made[op, k], destination, read[op, k])
    for owner, user in wiring.tied:
        synchronize = at[owner][Op.SYNCHRONIZE, None]
        before_own = at[user][Op.SYNCHRONIZE, None] - 1  # the user's last backward
        yield _Message(Op.SEND_TIED_GRADIENT, None, user, before_own, owner, synchronize)
    for source, destination in permutations(range(len(lists)), 2) if wiring.with_norm else ():
        made, read = at[source][Op.SYNCHRONIZE, None], at[destination][Op.NORM, None]
        yield _Message(Op.SEND_NORM, None, source, made, destination, read)


def _parameters(lists: ComputeLists, wiring: Wiring) -> Iterator[_Message]:
    """Yield the messages that the next step reads: updated tied parameters, at the lists' ends."""
    for owner, user in wiring.tied:
        made_at, read_at = len(lists[owner]) - 1, len(lists[user])
        yield _Message(Op.SEND_TIED_PARAMETER, None, owner, made_at, user, read_at)


def _rounds(lists: ComputeLists, messages: tuple[_Message, ...]) -> list[list[int]]:
    """Return the round of every instruction when each takes one round and messages take none."""
    reads: list[dict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in lists]
    for message in messages:
        reads[message.destination][message.read_at].append((message.source, message.made_at))
    rounds: list[list[int]] = [[] for _ in lists]
    num_left, now = sum(map(len, lists)), 0
    while num_left:
        num_done = [len(row) for row in rounds]  # before this round
        ready = [
            stage
            for stage, done in enumerate(num_done)
            if done < len(lists[stage])
            and all(made_at < num_done[source] for source, made_at in reads[stage].get(done, ()))
        ]
        if not ready:
            stuck = [str(lists[i][done]) for i, done in enumerate(num_done) if done < len(lists[i])]
            raise ScheduleError(
                f"{len(stuck)} of {len(lists)} stages wait for ever, at {', '.join(stuck)} "
                "(parallel.schedule): order the compute instructions so that no two wait in a ring"
            )
        for stage in ready:
            rounds[stage].append(now)
        num_left -= len(ready)
        now += 1
    return rounds


def _order(message: _Message, rounds: list[list[int]]) -> tuple[int, int]:
    """Order a microbatch's message by the round that makes it, others by when they are read.

    Of one round, the oldest microbatch goes first: where sends block, no stage then holds back a
    value that it has for one that it still waits for.
    """
    if message.microbatch is not None:
        return rounds[message.source][message.made_at], message.microbatch
    reader = rounds[message.destination]
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


def _turn(
    instructions: tuple[Instruction, ...], start: int, num_under_way: dict[tuple[int, int], int]
) -> list[Instruction]:
    """Return what can be dispatched from `start` on, up to a second compute instruction."""
    turn: list[Instruction] = []
    num_computed = 0
    for index in range(start, len(instructions)):
        instruction = instructions[index]
        if instruction.is_compute:
            num_computed += 1
            if num_computed == 2:
                break
        elif instruction.is_send:
            num_under_way[instruction.stage, instruction.peer] += 1
        else:
            channel = (instruction.peer, instruction.stage)
            if num_under_way[channel] == 0:
                break
            num_under_way[channel] -= 1
        turn.append(instruction)
    return turn


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
    )


def _num_microbatches(lists: ComputeLists) -> int:
    forwards = (entry.microbatch for row in lists for entry in row if entry.op is _FORWARD)
    return 1 + max(forwards, default=-1)


def _require_complete(compute_lists: ComputeLists, wiring: Wiring) -> None:
    """Raise unless each list has its own stage's F and B of every microbatch once."""
    if len(compute_lists) < wiring.num_stages:
        raise _wiring_error(
            f"{wiring.num_stages} stages are wired, {len(compute_lists)} are scheduled"
        )
    microbatches = range(_num_microbatches(compute_lists))
    for stage, entries in enumerate(compute_lists):
        expected = {(op, stage, k) for op in (_FORWARD, _BACKWARD) for k in microbatches}
        found = {(entry.op, entry.stage, entry.microbatch) for entry in entries}
        if found != expected or len(entries) != len(expected) or not entries:
            raise ScheduleError(
                f"the compute list {stage} has {len(entries)} instructions, {len(expected)} are "
                "needed: F and B of each microbatch once (parallel.schedule): correct its builder"
            )


def _wiring_error(what: str) -> ScheduleError:
    return ScheduleError(f"wrong wiring: {what} (parallel.schedule): correct the caller's edges")


def _to_csv(rows: list[list[str]]) -> str:
    return "".join(",".join(row).rstrip() + "\n" for row in rows)
