"""The simulated step time, and nothing else, of one program under many durations.

In which order the simulator plays a program does not depend on how long things take. So that order is found
once, as moves: each ends its duration after the later of two earlier moves has ended. For one set of
durations after the other only the times are added up. What is simulated is `simulator`'s, without rendezvous.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

from launcher.autopar.programs.instructions import (
    COMPUTES,
    LAST_BACKWARDS,
    RECEIVE_OF_READER,
    RECEIVES,
    SENDS,
    Instruction,
    Op,
)
from launcher.autopar.programs.program import Program
from launcher.autopar.programs.simulator import Durations

_START = 0  # the move that ends at 0
_Duration = tuple[Op, int, int]  # of an op on a stage, and for a message to which


@dataclass(frozen=True, slots=True, eq=False)
class StepClock:
    """The moves of a program.

    Attributes:
        moves: (one move before it, another one, which of the durations).
        durations: What they take.
    """

    moves: tuple[tuple[int, int, int], ...]
    durations: tuple[_Duration | None, ...]

    @classmethod
    def of(cls, program: Program) -> "StepClock":
        """Find the order in which a checked program is played."""
        recorder = _Recorder(program)
        recorder.run()
        return cls(tuple(recorder.moves), tuple(recorder.durations))

    def step_s(self, durations: Durations) -> float:
        """Return when the last move ends."""
        taken_s = [_taken_s(durations, wanted) for wanted in self.durations]
        ends_s = [0.0]
        append = ends_s.append
        for one, other, duration in self.moves:
            first_s, second_s = ends_s[one], ends_s[other]
            append((first_s if first_s > second_s else second_s) + taken_s[duration])
        return max(ends_s)


def _taken_s(durations: Durations, wanted: _Duration | None) -> float:
    if wanted is None:
        return 0.0
    op, stage, peer = wanted
    return durations.transfer_s(op, stage, peer) if op in SENDS else durations.compute_s(op)[stage]


class _Recorder:
    def __init__(self, program: Program) -> None:
        self.lists, self.homes = program.lists, program.submesh_of
        self.moves: list[tuple[int, int, int]] = []
        self.durations: dict[_Duration | None, int] = {}
        self.position = [0] * len(self.lists)
        self.clock = [_START] * len(self.lists)  # by submesh: the move that it has come to
        self.channel: dict[tuple[int, int], int] = defaultdict(lambda: _START)
        self.under_way: dict[tuple[int, int], deque[int]] = defaultdict(deque)
        self.arrived: dict[tuple, int] = {}

    def run(self) -> None:
        moves = True
        while moves:
            moves = False
            for submesh in range(len(self.lists)):
                while self._plays_next(submesh):
                    moves = True

    def _plays_next(self, submesh: int) -> bool:
        """Play the next instruction of a list, unless it waits for a send."""
        entries, position = self.lists[submesh], self.position[submesh]
        if position == len(entries):
            return False
        entry = entries[position]
        if entry.op in COMPUTES:
            read = (RECEIVE_OF_READER.get(entry.op), entry.stage, entry.microbatch)
            arrived = self.arrived.pop(read, _START)
            lent = (Op.RECEIVE_TIED_GRADIENT, entry.stage, None)
            if lent in self.arrived and entry.op in LAST_BACKWARDS:
                arrived = self._move(arrived, self.arrived.pop(lent), None)
            self.clock[submesh] = self._move(
                self.clock[submesh], arrived, (entry.op, entry.stage, 0)
            )
        elif entry.op in RECEIVES:
            under_way = self.under_way[self.homes[entry.peer], submesh]
            if not under_way:
                return False
            self._receive(entry, under_way.popleft())
        elif entry.op in SENDS:
            channel = (submesh, self.homes[entry.peer])
            sent = (entry.op, entry.stage, entry.peer)
            self.channel[channel] = self._move(self.clock[submesh], self.channel[channel], sent)
            self.under_way[channel].append(self.channel[channel])
        self.position[submesh] += 1
        return True

    def _receive(self, entry: Instruction, message: int) -> None:
        key = (entry.op, entry.stage, entry.microbatch)
        if key in self.arrived:  # the reader waits for the later one
            message = self._move(self.arrived[key], message, None)
        self.arrived[key] = message

    def _move(self, one: int, other: int, wanted: _Duration | None) -> int:
        number = self.durations.setdefault(wanted, len(self.durations))
        self.moves.append((one, other, number))
        return len(self.moves)
