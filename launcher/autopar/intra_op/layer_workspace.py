"""The temporary buffers that one layer of a class needs in its passes, under a stage's picks."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.layers import LayerClass
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.intra_op import StageSharding
from launcher.autopar.intra_op.split_layout import Source, Start
from launcher.autopar.intra_op.stage_layout import produced_spec
from launcher.autopar.intra_op.stage_problem import BACKWARD_COPY, FORWARD_COPY, Picks
from launcher.autopar.intra_op.tape import VIEWS, Buffer, Tape
from launcher.autopar.intra_op.wiring import Place
from launcher.autopar.intra_op.workspace import temporary_bytes
from launcher.autopar.sharding.reshard import Kind
from launcher.autopar.sharding.spec import replicated

_PARTS = VIEWS | {"slice"}  # what these make, XLA reads where it lies in another value


@dataclass(frozen=True, eq=False)
class LayerWorkspace:
    """Bytes per device beside what a layer is given and what it leaves; counted when they are asked for."""

    writer: "_Writer"

    @cached_property
    def forward_bytes(self) -> float:
        """Where the residuals are results, whose buffers hold something else before."""
        return self.writer.forward(keeps=True)

    @cached_property
    def passing_bytes(self) -> float:
        """Of a forward pass that leaves no residuals."""
        return self.writer.forward(keeps=False)

    @cached_property
    def backward_bytes(self) -> float:
        """Where the residuals were kept."""
        return self.writer.backward(again=False)

    @cached_property
    def again_bytes(self) -> float:
        """Where the forward ops run again: all residuals, and gathered weights, are there at the turn,
        whatever of them XLA then computes inside their readers; it copies others for that."""
        return self.writer.backward(again=True)

    @cached_property
    def both_bytes(self) -> float:
        """Of a program that goes forward and back, with the residuals: each is there from when it is
        made until it is read for the last time."""
        return self.writer.both()


def picks_by_class(picks: Picks) -> Mapping[str, Picks]:
    """What was picked for the nodes of each class."""
    found: defaultdict[str, dict] = defaultdict(dict)
    for key, pick in picks.items():
        found[key[1]][key] = pick
    return found


def layer_workspace(
    cls: LayerClass, mesh: LogicalMesh, by_class: Mapping[str, Picks],
    aliases: Mapping[Place, Place], known: dict[Hashable, LayerWorkspace],
) -> LayerWorkspace:  # fmt: skip
    """See what the passes of a layer hold, written down line by line.

    Args:
        by_class: what `picks_by_class` says.
        known: those that were seen, to which this one is added: the same picks hold the same.
    """
    own = _own_picks(cls, by_class, aliases)
    key = (cls.name, mesh, frozenset(own.items()))
    if key not in known:
        known[key] = LayerWorkspace(_Writer(cls, mesh, own, aliases))
    return known[key]


def _own_picks(
    cls: LayerClass, by_class: Mapping[str, Picks], aliases: Mapping[Place, Place]
) -> Picks:
    """What a layer's passes go by: the nodes of its class, and those where its shared parameters lie."""
    places = [other for (name, _), other in aliases.items() if name == cls.name]
    keys = [(kind, *place) for place in places for kind in ("slot", "accumulator")]
    shared = {key: by_class[key[1]][key] for key in keys if key in by_class[key[1]]}
    return {**by_class[cls.name], **shared}


@dataclass(frozen=True, slots=True)
class HalfWorkspaces:
    """Bytes per device for one layer's halves of a split backward pass, beside what they are given.

    Attributes:
        input_bytes: of the first, with what it leaves for the second as far as it is there.
        there_bytes: what of that is there when all of the forward pass has run again.
        left_bytes: what it leaves.
        weight_bytes: of the second.
    """

    input_bytes: float
    there_bytes: float
    left_bytes: float
    weight_bytes: float


def half_workspaces(
    cls: LayerClass, sharding: StageSharding, aliases: Mapping[Place, Place], recompute: str,
    starts: Iterable[Start],
) -> HalfWorkspaces:  # fmt: skip
    """What the halves of a split backward pass need of one layer; `starts` pass between them."""
    own = _own_picks(cls, picks_by_class(sharding.picks), aliases)
    writer, starts = _Writer(cls, sharding.settings.mesh, own, aliases), tuple(starts)
    return HalfWorkspaces(*writer.input_half(starts, recompute), writer.weight_half(starts))


class _Writer:
    def __init__(
        self, cls: LayerClass, mesh: LogicalMesh, picks: Picks, aliases: Mapping[Place, Place]
    ):
        self.cls, self.mesh, self.picks, self.aliases = cls, mesh, picks, aliases
        self._index = {op.results: index for index, op in enumerate(cls.joint.ops)}

    def forward(self, *, keeps: bool) -> float:
        tape, residuals, exports = self._forward()
        if not keeps:
            return temporary_bytes(tape, made=exports)
        results = {*residuals, *exports}
        return max(0.0, temporary_bytes(tape, lasting=results) - sum(map(tape.bytes, results)))

    def both(self) -> float:
        tape, residuals, exports = self._forward()
        grown = temporary_bytes(tape, made=exports, lasting=residuals)
        tape, given, handed_on = self._going_back
        crossing = sum(map(tape.bytes, {*given, *handed_on}))
        return max(
            grown, crossing + temporary_bytes(tape, handed_on, there=residuals, is_call=True)
        )

    def backward(self, *, again: bool) -> float:
        tape, given, handed_on = self._backward(again=True) if again else self._going_back
        crossing = sum(map(tape.bytes, {*given, *handed_on}))
        turn = self._turn(tape) if again else 0.0
        return crossing + max(temporary_bytes(tape, handed_on, is_call=True), turn)

    def input_half(self, starts: Iterable[Start], recompute: str) -> tuple[float, float, float]:
        tape, given, handed_on = self._backward(
            again=recompute != "none", ops=self.cls.input_ops, slots=self._activations(),
            is_there=recompute == "full",
        )  # fmt: skip
        left = {tape.get(s.value, s.spec) for s in starts if s.source is Source.FIRST_HALF}
        made = {buffer for line in tape.lines for buffer in line.makes}
        there = left.union(self._residuals()) - made if recompute == "full" else set()
        crossing = sum(map(tape.bytes, {*given, *handed_on}))
        needed = temporary_bytes(tape, handed_on, there=there, lasting=left, is_call=True)
        return crossing + needed, sum(map(tape.bytes, there)), sum(map(tape.bytes, left))

    def weight_half(self, starts: Iterable[Start]) -> float:
        tape = Tape(self.cls.joint.avals, self.mesh)
        tape.via = self._copies(BACKWARD_COPY)
        for start in starts:
            tape.put(start.value, start.spec)
        tape.run(self._planned(self.cls.weight_ops))
        for slot in self.cls.gradients:
            if self.cls.slots[slot].role is Role.PARAM:
                self._gradient(tape, slot)
        return temporary_bytes(tape, is_call=True)

    def _activations(self) -> list[int]:
        return [slot for slot in self.cls.gradients if self.cls.slots[slot].role is not Role.PARAM]

    def _turn(self, tape: Tape) -> float:
        """What there is at the turn, after the forward ops have run again; parts of others are not."""
        parts = {b for line in tape.lines if line.name in _PARTS for b in line.makes}
        there = (b for b in self._residuals() if b not in parts)
        return sum(map(tape.bytes, (*there, *_gathered(tape, self.cls))))

    def _forward(self) -> tuple[Tape, list[Buffer], list[Buffer]]:
        """The lines of the forward pass, what it keeps, and what leaves the stage."""
        tape, cls, exports = self._tape(FORWARD_COPY), self.cls, []
        tape.run(self._planned(cls.forward_ops))
        residuals = [tape.get(value, spec) for value, spec, _ in self._residuals()]
        for output, value in enumerate(cls.outputs):
            spec = self.picks.get(("export", cls.name, output))
            if spec is not None and isinstance(value, Value):
                exports.append(tape.get(value, spec))
        return tape, residuals, exports

    @cached_property
    def _going_back(self) -> tuple[Tape, list[Buffer], list[Buffer]]:
        return self._backward(again=False)

    def _backward(
        self, *, again: bool, ops: Iterable[Op] | None = None, slots: Iterable[int] | None = None,
        is_there: bool = False,
    ) -> tuple[Tape, list[Buffer], list[Buffer]]:  # fmt: skip
        """The lines of the backward pass, the gradients that come in, and those that are handed on.

        Args:
            again: whether forward ops run again first; `is_there`: before, so that they are no lines of it.
            ops: its ops, if not all.
            slots: whose gradients it makes, if not all.
        """
        tape, cls = self._tape(FORWARD_COPY), self.cls
        if again:
            tape.run(self._planned(cls.recomputed_ops()))
            if is_there:
                tape.lines.clear()
        else:
            for value, spec, _ in self._residuals():
                tape.put(value, spec)
        tape.via = self._copies(BACKWARD_COPY)
        given: list[Buffer] = []
        for output, value in cls.cotangents.items():
            spec = self.picks["cotangent", cls.name, output]
            tape.put(value, spec)
            given.append((value, spec, None))
        tape.run(self._planned(cls.backward_ops if ops is None else ops))
        wanted = cls.gradients if slots is None else slots
        return tape, given, [b for slot in wanted for b in self._gradient(tape, slot)]

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
                tape.accumulate(tape.get(value, spec))
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
