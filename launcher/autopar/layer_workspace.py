"""The temporary buffers that one layer of a class needs in its passes, under a stage's picks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.autopar.graph import Op, Value
from launcher.autopar.intra_op import StageSharding
from launcher.autopar.layers import LayerClass
from launcher.autopar.reshard import Kind
from launcher.autopar.spec import replicated
from launcher.autopar.stage_layout import produced_spec
from launcher.autopar.stage_problem import BACKWARD_COPY, FORWARD_COPY
from launcher.autopar.trace import Role
from launcher.autopar.wiring import Place
from launcher.autopar.workspace import Buffer, Tape, temporary_bytes


@dataclass(frozen=True, slots=True)
class LayerWorkspace:
    """Bytes per device beside what the layer is given and what it leaves.

    Attributes:
        backward_bytes: where the residuals were kept.
        again_bytes: where the forward ops run again: all residuals, and gathered weights, are there at the
            turn, whatever of them XLA then computes inside their readers; it copies others for that.
    """

    forward_bytes: float
    backward_bytes: float
    again_bytes: float


def layer_workspace(
    cls: LayerClass, sharding: StageSharding, aliases: Mapping[Place, Place]
) -> LayerWorkspace:
    """Write the passes of a layer down, and see what they hold."""
    writer = _Writer(cls, sharding, aliases)
    return LayerWorkspace(
        writer.forward(), writer.backward(again=False), writer.backward(again=True)
    )


class _Writer:
    def __init__(self, cls: LayerClass, sharding: StageSharding, aliases: Mapping[Place, Place]):
        self.cls, self.picks, self.aliases = cls, sharding.picks, aliases
        self.mesh = sharding.settings.mesh
        self._index = {op.results: index for index, op in enumerate(cls.joint.ops)}

    def forward(self) -> float:
        tape, cls = self._tape(FORWARD_COPY), self.cls
        tape.run(self._planned(cls.forward_ops))
        left = [tape.get(value, spec) for value, spec, _ in self._residuals()]
        for output, value in enumerate(cls.outputs):
            spec = self.picks.get(("export", cls.name, output))
            if spec is not None and isinstance(value, Value):
                left.append(tape.get(value, spec))
        return temporary_bytes(tape, made=left)

    def backward(self, *, again: bool) -> float:
        tape, cls = self._tape(FORWARD_COPY), self.cls
        if again:
            tape.run(self._planned(cls.recomputed_ops()))
        else:
            for value, spec, _ in self._residuals():
                tape.put(value, spec)
        tape.via = self._copies(BACKWARD_COPY)
        given: list[Buffer] = []
        for output, value in cls.cotangents.items():
            spec = self.picks["cotangent", cls.name, output]
            tape.put(value, spec)
            given.append((value, spec, None))
        tape.run(self._planned(cls.backward_ops))
        handed_on = [b for slot in cls.gradients for b in self._gradient(tape, slot)]
        crossing = sum(map(tape.bytes, {*given, *handed_on}))
        turn = sum(map(tape.bytes, (*self._residuals(), *_gathered(tape, cls)))) if again else 0.0
        return crossing + max(temporary_bytes(tape, handed_on), turn)

    def _residuals(self) -> list[Buffer]:
        cls = self.cls
        return [(v, produced_spec(cls, v, self.picks), None) for v in cls.residuals]

    def _gradient(self, tape: Tape, slot: int) -> list[Buffer]:
        """Bring a gradient to where it is summed; [its buffer] if it is an activation's."""
        cls, value = self.cls, self.cls.gradients[slot]
        if not isinstance(value, Value):
            return []
        if cls.slots[slot].role is Role.PARAM:
            spec = self.picks.get(("accumulator", *self._place(slot)))
            if spec is not None:
                tape.get(value, spec)
            return []
        return [tape.get(value, self.picks["slot", *self._place(slot)])]

    def _tape(self, copies: str) -> Tape:
        """A tape with the layer's inputs on it."""
        cls, tape = self.cls, Tape(self.cls.joint.avals, self.mesh)
        tape.via = self._copies(copies)
        for slot, value in enumerate(cls.joint.inputs[: cls.num_slots]):
            tape.put(value, self.picks["slot", *self._place(slot)])
        for value in cls.joint.constants:
            tape.put(value, replicated(self.mesh.num_axes))
        return tape

    def _place(self, slot: int) -> Place:
        return self.aliases.get((self.cls.name, slot), (self.cls.name, slot))

    def _copies(self, kind: str):
        return {
            key[2]: spec
            for key, spec in self.picks.items()
            if key[0] == kind and key[1] == self.cls.name
        }

    def _planned(self, ops: Iterable[Op]):
        """Ops with their strategies, in the order of the joint graph."""
        for op in sorted(ops, key=lambda op: self._index[op.results]):
            yield op, self.picks["op", self.cls.name, self._index[op.results]]


def _gathered(tape: Tape, cls: LayerClass) -> list[Buffer]:
    """The layer's inputs, brought together from several devices."""
    gathers = (line for line in tape.lines if line.name == Kind.ALL_GATHER.value)
    return [b for line in gathers for b in line.makes if b[0] in cls.joint.inputs]
