"""What is dispatched at once: one instruction, or a few that can be one program.

Where a backward pass directly follows the forward pass of its microbatch and waits for nobody, on the last
stage of 1F1B, both are one program: what the forward pass keeps never leaves it. Where a stage overlaps, its
last backward pass, or the second half of it, and its `S` are one program, so that a layer's gradients can be
brought together while those of the layers before are computed. A pure function of the checked program, so
that the memory model and the trace know it too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.programs.instructions import LAST_BACKWARDS, Instruction, Op
from launcher.autopar.programs.program import Program, Wiring, dispatch_order


@dataclass(frozen=True, slots=True)
class Launch:
    """Instructions of a submesh, in their order."""

    submesh: int
    instructions: tuple[Instruction, ...]

    @property
    def first(self) -> Instruction:
        return self.instructions[0]

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(entry.op for entry in self.instructions)

    @property
    def is_fused(self) -> bool:
        return len(self.instructions) > 1

    def __str__(self) -> str:
        return "+".join(map(str, self.instructions))


def fused_stages(program: Program, wiring: Wiring) -> frozenset[int]:
    """The stages that hand nothing on, and on which every forward is directly followed by its backward."""
    sources = {source for source, _ in wiring.edges}
    found = set()
    for entries in program.lists:
        computes = [entry for entry in entries if entry.is_compute]
        stages = {entry.stage for entry in computes} - sources
        found |= {stage for stage in stages if _alternates(computes, stage)}
    return frozenset(found)


def launches(program: Program, wiring: Wiring) -> tuple[Launch, ...]:
    """The launches of a step, in an order for a single thread that drives all submeshes."""
    submesh = {entry.stage: i for i, entries in enumerate(program.lists) for entry in entries}
    return tuple(_launched(dispatch_order(program), submesh, _Fusing.of(program, wiring)))


def submesh_launches(program: Program, wiring: Wiring) -> tuple[tuple[Launch, ...], ...]:
    """The launches of each submesh, in its order."""
    fusing = _Fusing.of(program, wiring)
    return tuple(
        tuple(_launched(entries, {entry.stage: index for entry in entries}, fusing))
        for index, entries in enumerate(program.lists)
    )


@dataclass(frozen=True, slots=True)
class _Fusing:
    """Which instructions are launched together.

    Attributes:
        passes: the stages whose backward goes with the forward of its microbatch.
        overlapping: those whose `S` goes with the last backward.
        last: the last microbatch.
    """

    passes: frozenset[int]
    overlapping: frozenset[int]
    last: int

    @classmethod
    def of(cls, program: Program, wiring: Wiring) -> "_Fusing":
        passes = fused_stages(program, wiring)
        return cls(passes, wiring.overlapping, program.num_microbatches - 1)

    def is_led(self, entry: Instruction) -> bool:
        """Whether an instruction is launched with one before it."""
        is_backward = entry.op is Op.BACKWARD and entry.stage in self.passes
        return is_backward or (entry.op is Op.SYNCHRONIZE and entry.stage in self.overlapping)

    def led_by(self, entry: Instruction) -> Iterator[Instruction]:
        """Yield an instruction, and what is launched with it."""
        yield entry
        if entry.op is Op.FORWARD and entry.stage in self.passes:
            entry = Instruction(op=Op.BACKWARD, stage=entry.stage, microbatch=entry.microbatch)
            yield entry
        ends = entry.op in LAST_BACKWARDS and entry.microbatch == self.last
        if ends and entry.stage in self.overlapping:
            yield Instruction(op=Op.SYNCHRONIZE, stage=entry.stage)


def _launched(
    entries: Iterable[Instruction], submesh: Mapping[int, int], fusing: _Fusing
) -> Iterator[Launch]:
    for entry in entries:
        if not fusing.is_led(entry):
            yield Launch(submesh[entry.stage], tuple(fusing.led_by(entry)))


def _alternates(computes: Sequence[Instruction], stage: int) -> bool:
    """Whether each forward of the stage has its backward as the next instruction of the submesh."""
    forwards = [i for i, entry in enumerate(computes) if _is(entry, Op.FORWARD, stage)]
    return all(
        i + 1 < len(computes)
        and _is(computes[i + 1], Op.BACKWARD, stage)
        and computes[i + 1].microbatch == computes[i].microbatch
        for i in forwards
    )


def _is(entry: Instruction, op: Op, stage: int) -> bool:
    return entry.op is op and entry.stage == stage
