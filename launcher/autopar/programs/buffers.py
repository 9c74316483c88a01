"""What lies on a device while it works through its instructions: buffers, from making to freeing.

The same walk serves twice: with the bytes that the planner predicts, and with those of the compiled
programs. Between instructions a submesh holds what docs/schedules.md lists; while a program runs it also
holds what the program makes, and its temporary buffers. Instructions that are launched as one program leave
nothing in between.

Left out: what an allocator loses to fragmentation, copies on their way between submeshes, scalars, and
batches that wait for their step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from launcher.autopar.programs.instructions import Instruction, Op
from launcher.autopar.programs.launches import Launch

Parts = Mapping[str, float]

REDUCE_TIED = "reduce_tied"
_PROGRAMS = {
    (Op.FORWARD,): "forward",
    (Op.BACKWARD,): "backward",
    (Op.BACKWARD_INPUT,): "backward_input",
    (Op.BACKWARD_WEIGHT,): "backward_weight",
    (Op.FORWARD, Op.BACKWARD): "forward_backward",
    (Op.BACKWARD, Op.SYNCHRONIZE): "backward_synchronize",
    (Op.BACKWARD_WEIGHT, Op.SYNCHRONIZE): "backward_weight_synchronize",
    (Op.FORWARD, Op.BACKWARD, Op.SYNCHRONIZE): "forward_backward_synchronize",
    (Op.SYNCHRONIZE,): "synchronize",
    (Op.UPDATE,): "update",
    (Op.SEND_TIED_GRADIENT,): REDUCE_TIED,
}

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
    Op.RECEIVE_TIED_PARAMETER: ("new tied parameters",),  # it takes the place of the old copy
}
_ARRIVES_AS = {
    Op.RECEIVE_ACTIVATION: "imports",
    Op.RECEIVE_COTANGENT: "cotangents",
    Op.RECEIVE_TIED_GRADIENT: "tied gradients",
    Op.RECEIVE_TIED_PARAMETER: "new tied parameters",
}


def program_of(launch: Launch) -> str | None:
    """The name of a stage's program that a launch runs; None where it runs none."""
    return _PROGRAMS.get(launch.ops)


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


def peak(launches: Iterable[Launch], stages: Mapping[int, StageBuffers]) -> tuple[Launch, Parts]:
    """When a submesh holds most, and of what that consists.

    Args:
        launches: of the submesh, in order.
        stages: those that lie on it.
    """
    most, found = -1.0, None
    for launch, total, parts in _walk(launches, stages):
        if total > most:
            most, found = total, (launch, {name: size for name, size in parts.items() if size})
    assert found is not None, "a submesh launches something"
    return found


def held(
    launches: Iterable[Launch], stages: Mapping[int, StageBuffers]
) -> Iterator[tuple[Launch, float]]:
    """What a submesh holds while each launch runs, in bytes per device."""
    for launch, total, _ in _walk(launches, stages):
        yield launch, total


def _walk(launches: Iterable[Launch], stages: Mapping[int, StageBuffers]):
    """Yield each launch, what is held while it runs, and of what that consists (until the next one)."""
    live = _Live()
    for index, stage in stages.items():
        for name, size in (*stage.lasting.items(), ("accumulators", stage.passing["accumulators"])):
            live.add(name, index, None, size)
    for launch in launches:
        first, stage = launch.first, stages[launch.first.stage]
        if first.is_receive:
            size = stage.received.get((first.op, first.peer), 0.0)
            live.add(_ARRIVES_AS.get(first.op, "norms"), first.stage, first.microbatch, size)
        running = stage.programs.get(program_of(launch), _NOTHING)
        live.parts["results"] = running.result_bytes
        live.parts["temporary"] = running.temporary_bytes
        yield launch, live.total + running.result_bytes + running.temporary_bytes, live.parts
        for instruction in launch.instructions:
            _finish(live, instruction, stage, is_fused=launch.is_fused)


_NOTHING = Footprint(0.0, 0.0)


class _Live:
    """The buffers that are there, by what they are, their stage and their microbatch, and their sums."""

    def __init__(self) -> None:
        self.total = 0.0
        self.parts: dict[str, float] = defaultdict(float)
        self._sizes: dict[tuple[str, int, int | None], float] = defaultdict(float)

    def add(self, name: str, stage: int, microbatch: int | None, size: float) -> None:
        self._sizes[name, stage, microbatch] += size
        self.parts[name] += size
        self.total += size

    def end(self, name: str, stage: int, microbatch: int | None) -> None:
        size = self._sizes.pop((name, stage, microbatch), 0.0)
        self.parts[name] -= size
        self.total -= size


def _finish(live: _Live, instruction: Instruction, stage: StageBuffers, *, is_fused: bool) -> None:
    """Leave what an instruction makes, and end what it ends."""
    where = (instruction.stage, instruction.microbatch)
    for name in _ENDS.get(instruction.op, ()):
        if name == "let go of":
            live.add("kept", *where, -stage.passing.get(name, 0.0))
        live.end(name, *where)
    for name in _LEAVES.get(instruction.op, ()):
        if not (is_fused and name == "kept"):
            live.add(name, *where, stage.passing.get(name, 0.0))
