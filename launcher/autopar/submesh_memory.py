"""What the stages of a submesh need together, at the worst moment of a step.

Stages on one submesh take turns, and each holds what its own microbatches in flight keep: so their peaks do
not just add up. The program says how many there are when; what one keeps is counted by `memory`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.memory import StageMemory


@dataclass(frozen=True, slots=True)
class Moment:
    """A backward, or a half of it, and what is there while it runs.

    Attributes:
        stage: that runs it.
        kept: stage -> its microbatches between forward and the end of backward.
        waiting: stage -> those of them whose first half has begun.
    """

    stage: int
    kept: tuple[tuple[int, int], ...]
    waiting: tuple[tuple[int, int], ...]


def submesh_peak_bytes(
    instructions: Sequence[Instruction],
    memories: Mapping[int, StageMemory],
    weight_stash_bytes: Mapping[int, float],
) -> float:
    """Return the most bytes that a device of a submesh needs at any time.

    Args:
        instructions: The submesh's list.
        memories: Of its stages.
        weight_stash_bytes: What the first half of a backward leaves for the second, by stage.
    """
    peak_bytes = sum(memory.state_bytes + memory.gradient_bytes for memory in memories.values())
    for moment in moments(instructions, sorted(memories)):
        kept = dict(moment.kept)
        held_bytes = sum(weight_stash_bytes[stage] * number for stage, number in moment.waiting)
        held_bytes += memories[moment.stage].peak_bytes(kept[moment.stage])
        for stage, memory in memories.items():
            if stage != moment.stage:
                held_bytes += memory.state_bytes + kept[stage] * memory.stash_bytes
        peak_bytes = max(peak_bytes, held_bytes)
    return peak_bytes


def moments(instructions: Sequence[Instruction], stages: Sequence[int]) -> set[Moment]:
    """Return the moments of a list that differ."""
    kept, waiting = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    found = set()
    for entry in instructions:
        match entry.op:
            case Op.FORWARD:
                kept[entry.stage] += 1
            case Op.BACKWARD:
                found.add(Moment(entry.stage, tuple(kept.items()), tuple(waiting.items())))
                kept[entry.stage] -= 1
            case Op.BACKWARD_INPUT:
                waiting[entry.stage] += 1
                found.add(Moment(entry.stage, tuple(kept.items()), tuple(waiting.items())))
            case Op.BACKWARD_WEIGHT:
                found.add(Moment(entry.stage, tuple(kept.items()), tuple(waiting.items())))
                kept[entry.stage] -= 1
                waiting[entry.stage] -= 1
    return found
