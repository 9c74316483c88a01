"""What lies on a device while it works through its instructions: buffers, from making to freeing.

The same walk serves twice: with the bytes that the planner predicts, and with those of the compiled
programs. Between instructions a submesh holds what docs/schedules.md lists; while a program runs it also
holds what the program makes, and its temporary buffers. Two instructions that are launched as one program
leave nothing in between.

Left out: what an allocator loses to fragmentation, copies on their way between submeshes, scalars, and
batches that wait for their step.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.autopar.instructions import Instruction, Op
from launcher.autopar.launches import Launch

Parts = Mapping[str, float]

PROGRAM_OF = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward_input",
    Op.BACKWARD_WEIGHT: "backward_weight",
    Op.SYNCHRONIZE: "synchronize",
    Op.UPDATE: "update",
    Op.SEND_TIED_GRADIENT: "reduce_tied",
}
FUSED = "forward_backward"

# What an instruction makes and leaves behind, and what it ends, by the names of `StageBuffers`.
_LEAVES = {
    Op.FORWARD: ("kept", "exports"),
    Op.BACKWARD: ("returns",),
    Op.BACKWARD_INPUT: ("returns", "kept for weights"),
    Op.SYNCHRONIZE: ("gradients",),
}
_ENDS = {
    Op.FREE_ACTIVATION: ("exports",),
    Op.FREE_COTANGENT: ("returns",),
    Op.FREE_STASH: ("imports", "kept", "kept for weights"),
    Op.BACKWARD: ("cotangents",),
    Op.BACKWARD_INPUT: ("cotangents", "let go of"),
    Op.SYNCHRONIZE: ("accumulators", "tied gradients"),
    Op.UPDATE: ("gradients",),
}
_ARRIVES_AS = {
    Op.RECEIVE_ACTIVATION: "imports",
    Op.RECEIVE_COTANGENT: "cotangents",
    Op.RECEIVE_TIED_GRADIENT: "tied gradients",
    Op.RECEIVE_TIED_PARAMETER: "new tied parameters",
}


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a program adds while it runs, in bytes per device.

    Attributes:
        result_bytes: its results, but for those that take the place of an argument.
        temporary_bytes: what it needs in between.
    """

    result_bytes: float
    temporary_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBuffers:
    """What one stage holds, in bytes per device.

    Attributes:
        lasting: what is always there, by what it is.
        passing: what comes and goes: of a microbatch "kept", "kept for weights", "exports", "returns",
            and "let go of" (what of the stash ends with the first half of a split backward pass); of a
            step "accumulators" and "gradients".
        received: (receiving operation, stage it comes from) -> what a message brings.
        programs: the stage's programs, by their names.
    """

    lasting: Parts
    passing: Parts
    received: Mapping[tuple[Op, int], float] = field(default_factory=dict)
    programs: Mapping[str, Footprint]


def peak(launches: Sequence[Launch], stages: Mapping[int, StageBuffers]) -> tuple[Launch, Parts]:
    """When a submesh holds most, and of what that consists.

    Args:
        launches: of the submesh, in order.
        stages: those that lie on it.
    """
    return max(held(launches, stages), key=lambda moment: sum(moment[1].values()))


def held(
    launches: Sequence[Launch], stages: Mapping[int, StageBuffers]
) -> Iterator[tuple[Launch, Parts]]:
    """What a submesh holds while each launch runs."""
    live: dict[tuple, float] = {}  # (what, stage, microbatch or None, ...) -> bytes
    for index, stage in stages.items():
        live |= {(name, index, None): size for name, size in stage.lasting.items()}
        live["accumulators", index, None] = stage.passing["accumulators"]
    for launch in launches:
        first, stage = launch.first, stages[launch.first.stage]
        name = FUSED if launch.is_fused else PROGRAM_OF.get(first.op)
        live |= _arriving(first, stage)
        yield launch, _by_name(live, stage.programs.get(name))
        for instruction in launch.instructions:
            _finish(live, instruction, stage, is_fused=launch.is_fused)


def _arriving(instruction: Instruction, stage: StageBuffers) -> dict[tuple, float]:
    """What a message brings is there as soon as it is received."""
    size = stage.received.get((instruction.op, instruction.peer), 0)
    if not size:
        return {}
    name = _ARRIVES_AS[instruction.op]
    return {(name, instruction.stage, instruction.microbatch, instruction.peer): size}


def _finish(
    live: dict[tuple, float], instruction: Instruction, stage: StageBuffers, *, is_fused: bool
) -> None:
    """Leave what an instruction makes, and end what it ends."""
    stage_index, k = instruction.stage, instruction.microbatch
    for name in _ENDS.get(instruction.op, ()):
        if name == "let go of":
            live["kept", stage_index, k] -= stage.passing.get(name, 0)
        for key in [key for key in live if key[:3] == (name, stage_index, k)]:
            del live[key]
    live.pop(("new tied parameters", stage_index, None, instruction.peer), None)
    for name in _LEAVES.get(instruction.op, ()):
        if not (is_fused and name == "kept"):
            live[name, stage_index, k] = stage.passing.get(name, 0)


def _by_name(live: Mapping[tuple, float], running: Footprint | None) -> Parts:
    found: Counter = Counter()
    for (name, *_), size in live.items():
        found[name] += size
    if running is not None:
        found["results"] = running.result_bytes
        found["temporary"] = running.temporary_bytes
    return {name: size for name, size in found.items() if size}
