"""What is dispatched at once: one instruction, or two that can be one program.

Where a backward pass directly follows the forward pass of its microbatch and waits for nobody, on the last
stage of 1F1B, both are one program: what the forward pass keeps never leaves it. A pure function of the
checked program, so that the memory model and the trace know it too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.program import Program, Wiring, dispatch_order


@dataclass(frozen=True, slots=True)
class Launch:
    """One or two instructions of a submesh, in their order."""

    submesh: int
    instructions: tuple[Instruction, ...]

    @property
    def first(self) -> Instruction:
        return self.instructions[0]

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
    return tuple(_launched(dispatch_order(program), submesh, fused_stages(program, wiring)))


def submesh_launches(program: Program, wiring: Wiring) -> tuple[tuple[Launch, ...], ...]:
    """The launches of each submesh, in its order."""
    fused = fused_stages(program, wiring)
    return tuple(
        tuple(_launched(entries, {entry.stage: index for entry in entries}, fused))
        for index, entries in enumerate(program.lists)
    )


def _launched(
    entries: Iterable[Instruction], submesh: Mapping[int, int], fused: frozenset[int]
) -> Iterator[Launch]:
    for entry in entries:
        if entry.stage in fused and entry.op is Op.FORWARD:
            backward = Instruction(op=Op.BACKWARD, stage=entry.stage, microbatch=entry.microbatch)
            yield Launch(submesh[entry.stage], (entry, backward))
        elif entry.stage not in fused or entry.op is not Op.BACKWARD:
            yield Launch(submesh[entry.stage], (entry,))


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
