"""The program of a step: one list of instructions per submesh, executed in order.

A program is data. `communication.add_communication` makes it out of a schedule's compute lists and
a `Wiring`, `checker.check` proves it, the simulator prices it, and the executor runs it.
"""

import csv
import io
from collections import defaultdict
from dataclasses import dataclass

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.schedules import ComputeLists
from launcher.errors import ScheduleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Which stages exchange what.

    Attributes:
        edges: (source, destination) of activations, source < destination; may skip stages.
        differentiable: The edges whose cotangents come back.
        tied: (owner, user) of parameters that two stages read and the owner updates.
        with_norm: Whether the update needs the norm of all gradients (clipping, loss scaling).
        submesh_of: The submesh of each stage; None: stage i lies on submesh i, alone.
        overlapping: The stages that bring their gradients together while they go back for the last time:
            their `S` stands directly behind that backward, and is launched with it.
    """

    edges: tuple[tuple[int, int], ...]
    differentiable: tuple[tuple[int, int], ...]
    tied: tuple[tuple[int, int], ...] = ()
    with_norm: bool = False
    submesh_of: tuple[int, ...] | None = None
    overlapping: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, pairs in (("edges", self.edges), ("tied", self.tied)):
            if len(set(pairs)) != len(pairs):
                raise wiring_error(f"{len(pairs)} {name}, {len(set(pairs))} distinct ones")
        for source, destination in self.edges:
            if not 0 <= source < destination:
                raise wiring_error(f"edge {source} to {destination} does not go to a later stage")
        for owner, user in self.tied:
            if owner == user:
                raise wiring_error(f"stage {owner} is tied to stage {user}, itself")
        strange = set(self.differentiable) - set(self.edges)
        if strange or len(set(self.differentiable)) != len(self.differentiable):
            raise wiring_error(
                f"{len(self.differentiable)} differentiable edges are not distinct ones of "
                f"the {len(self.edges)} edges"
            )
        self._check_submeshes()

    def _check_submeshes(self) -> None:
        if self.submesh_of is None:
            return
        named = 1 + max((max(pair) for pair in self.edges + self.tied), default=0)
        if len(self.submesh_of) < named:
            raise wiring_error(f"{named} stages are wired, {len(self.submesh_of)} have a submesh")
        if set(self.submesh_of) != set(range(max(self.submesh_of) + 1)):
            raise wiring_error(f"a submesh without a stage, among those of {self.submesh_of}")

    @classmethod
    def chain(
        cls, num_stages: int, *, tied: tuple[tuple[int, int], ...] = (), with_norm: bool = False,
        virtual_stages: int = 1,
    ) -> "Wiring":  # fmt: skip
        """Wire each stage to the next, differentiably, with so many stages on every submesh."""
        edges = tuple((stage, stage + 1) for stage in range(num_stages - 1))
        homes = round_robin(num_stages, virtual_stages) if virtual_stages > 1 else None
        return cls(
            edges=edges, differentiable=edges, tied=tied, with_norm=with_norm, submesh_of=homes
        )

    @property
    def num_stages(self) -> int:
        """Count the stages: those with a submesh, or one more than the last one wired."""
        if self.submesh_of is not None:
            return len(self.submesh_of)
        return 1 + max((max(pair) for pair in self.edges + self.tied), default=0)

    def homes(self, num_submeshes: int) -> tuple[int, ...]:
        """Return each stage's submesh, out of so many."""
        return tuple(range(num_submeshes)) if self.submesh_of is None else self.submesh_of


def round_robin(num_stages: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the submesh of each stage where the submeshes hold so many stages each."""
    return tuple(stage % (num_stages // virtual_stages) for stage in range(num_stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The instruction lists of one step, one per submesh, each to be executed in order.

    Attributes:
        lists: `lists[submesh]`; each instruction names its stage.
        num_microbatches: How many microbatches every stage sees.
    """

    lists: tuple[tuple[Instruction, ...], ...]
    num_microbatches: int

    @property
    def num_submeshes(self) -> int:
        return len(self.lists)

    @property
    def num_stages(self) -> int:
        return len(self.submesh_of)

    @property
    def submesh_of(self) -> tuple[int, ...]:
        """Return the submesh of each stage, found by looking through the lists."""
        found = {
            entry.stage: submesh for submesh, entries in enumerate(self.lists) for entry in entries
        }
        return tuple(found[stage] for stage in sorted(found))

    @property
    def splits_backward(self) -> bool:
        """Whether the stages run `I` and `W` instead of `B`."""
        return splits_backward_in(self.lists)


def dispatch_order(program: Program) -> tuple[Instruction, ...]:
    """Return one order for a single thread that drives all submeshes.

    Each list keeps its order, every send comes before its receive, and the submeshes take turns of
    one compute instruction, so that none runs far ahead of the others.
    """
    order: list[Instruction] = []
    position = [0] * program.num_submeshes
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
    return to_csv([[str(entry) for entry in entries] for entries in program.lists])


def parse_program(text: str) -> Program:
    """Read what `format_program` wrote."""
    rows = csv.reader(io.StringIO(text))
    lists = tuple(tuple(Instruction.parse(cell) for cell in row if cell.strip()) for row in rows)
    return Program(lists=lists, num_microbatches=num_microbatches_in(lists))


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
        elif instruction.is_receive:
            channel = (instruction.peer, instruction.stage)
            if num_under_way[channel] == 0:
                break
            num_under_way[channel] -= 1
        turn.append(instruction)
    return turn


def splits_backward_in(lists: ComputeLists) -> bool:
    """Whether the lists have `I` and `W` instead of `B`."""
    backward = (Op.BACKWARD, Op.BACKWARD_INPUT)
    first = next((entry.op for row in lists for entry in row if entry.op in backward), None)
    return first is Op.BACKWARD_INPUT


def num_microbatches_in(lists: ComputeLists) -> int:
    """Count the microbatches: one more than the last one that has a forward."""
    forwards = (entry.microbatch for row in lists for entry in row if entry.op is Op.FORWARD)
    return 1 + max(forwards, default=-1)


def wiring_error(what: str) -> ScheduleError:
    """Return the error for a wiring that cannot be, or that does not fit a schedule."""
    return ScheduleError(f"wrong wiring: {what} (parallel.schedule): correct the caller's edges")


def to_csv(rows: list[list[str]]) -> str:
    """Write rows of cells, a line each."""
    return "".join(",".join(row).rstrip() + "\n" for row in rows)
