"""What the first half of a stage's backward pass leaves for the second.

The first half makes the gradients of activations, the second those of parameters (`layers`). In between lie
the shards that the second half reads and the first one has made, recomputed, received, or brought somewhere
by a collective, under the very specs in which they are read: so no collective runs twice, and the
collectives of the halves are those of the whole.

What is there is found by going through both halves with specs instead of arrays: the emitter's own walk,
so what is foreseen is what is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.layers import Layer, LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.stage_inputs import given_spec
from launcher.autopar.intra_op.stage_layout import Kept, StageLayout
from launcher.autopar.sharding.reshard import reshard
from launcher.autopar.sharding.shards import ShardedValues
from launcher.autopar.sharding.spec import Spec

WeightKept = tuple[
    int, Value, Spec
]  # (index of the layer, value of its joint graph, where it lies)


class Source(Enum):
    """Where the second half has a shard from."""

    KEPT = auto()  # the forward pass kept it
    INPUT = auto()  # it enters the stage
    CONSTANT = auto()  # the layer closed over it
    ZEROS = auto()  # no gradient comes
    FIRST_HALF = auto()  # the first half hands it over


@dataclass(frozen=True, slots=True)
class Start:
    """A shard that the second half of a layer reads and does not make."""

    value: Value
    spec: Spec
    source: Source


@dataclass(frozen=True, slots=True, eq=False)
class SplitLayout:
    """What passes between the halves, and what the second one still reads of the microbatch.

    Attributes:
        weight_kept: what the first half hands to the second.
        kept: of what the forward pass kept; the rest may go after the first half.
        imports: of the received activations.
        batch: of the leaves of the batch.
        starts: layer -> with what its second half begins.
        copied: layer -> the values that the first half has brought to their backward copy.
    """

    weight_kept: dict[WeightKept, Spec]
    kept: frozenset[Kept]
    imports: frozenset[Value]
    batch: frozenset[str]
    starts: Mapping[int, tuple[Start, ...]]
    copied: Mapping[int, frozenset[Value]]


class AnyShard:
    """Stands for a shard where only the specs matter."""

    def __add__(self, other: object) -> "AnyShard":
        return self

    __radd__ = __add__


ANY_SHARD = AnyShard()


class SpecsOnly(ShardedValues):
    """The specs under which the values of a layer are held, without shards.

    Attributes:
        zeroed: the values that are zero.
        read: the shards that were read in this half; `read_before` in the first one.
        held_between: what is held when the second half begins, in the order in which it came.
        copied: the values that have their copy by then.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.zeroed: set[tuple[Value, Spec]] = set()
        self.read: set[tuple[Value, Spec]] = set()
        self.read_before: set[tuple[Value, Spec]] = set()
        self.held_between: dict[Value, tuple[Spec, ...]] = {}
        self.copied: frozenset[Value] = frozenset()

    def begin_second_half(self) -> None:
        """Note how things stand between the halves."""
        self.read_before, self.read = self.read, set()
        self.held_between = self._copies.held()
        held = self.held_between
        self.copied = frozenset(v for v, spec in self.via.items() if spec in held.get(v, ()))

    def read_across(self) -> Iterator[tuple[Value, Spec]]:
        """The shards that were there between the halves, and that the second half has read."""
        for value, specs in self.held_between.items():
            for spec in specs:
                if (value, spec) in self.read:
                    yield value, spec

    def at_hand(self, value: Value, spec: Spec):
        self.read.add((value, spec))
        return ANY_SHARD

    def hold_back(self, values, until: Sequence):
        return list(until)

    def _moved(self, step, shard, place: str):
        return ANY_SHARD

    def _computed(self, op, strategy, operands: Sequence):
        return [ANY_SHARD] * len(op.results)

    def zeros(self, value: Value, spec: Spec):
        self.zeroed.add((value, spec))
        return ANY_SHARD


def split_layout(
    model: LayeredModel, layout: StageLayout, walked: Mapping[int, SpecsOnly]
) -> SplitLayout:
    """Read off what passes between the halves; `walked` are the layers that went through both."""
    starts = {
        index: tuple(
            Start(value, spec, _source(model, layout, index, own, value, spec))
            for value, spec in own.read_across()
        )
        for index, own in walked.items()
    }
    every = [(index, start) for index, own in starts.items() for start in own]
    given = {
        _outer(model.layers[index], start.value)
        for index, start in every
        if start.source is Source.INPUT
    }
    sources = model.traced.inputs
    return SplitLayout(
        weight_kept={
            (index, start.value, start.spec): start.spec
            for index, start in every
            if start.source is Source.FIRST_HALF
        },
        kept=frozenset((i, start.value) for i, start in every if start.source is Source.KEPT),
        imports=frozenset(value for value in given if value in layout.imports),
        batch=frozenset(
            sources[value].path
            for value in given
            if value in sources and sources[value].role is Role.BATCH
        ),
        starts=starts,
        copied={index: own.copied for index, own in walked.items()},
    )


def _outer(layer: Layer, value: Value) -> Value:
    """The value of the traced model that an input of a layer's joint graph is."""
    return layer.inputs[layer.cls.joint.inputs.index(value)]


def _source(
    model: LayeredModel, layout: StageLayout, index: int, own: SpecsOnly, value: Value, spec: Spec
) -> Source:
    """Where the second half has a shard from; it makes again what costs no communication."""
    layer = model.layers[index]
    cls, first_spec = layer.cls, own.held_between[value][0]
    if layout.kept.get((index, value)) == spec:
        return Source.KEPT
    if (value, spec) in own.zeroed:
        return Source.ZEROS
    if spec == first_spec and value in cls.joint.constants:
        return Source.CONSTANT
    enters = value in cls.joint.inputs[: cls.num_slots] and not _is_internal(
        model, layout, _outer(layer, value)
    )
    if not enters or spec != first_spec:
        return Source.FIRST_HALF
    role = cls.slots[cls.joint.inputs.index(value)].role
    given = given_spec(model, layout, role, _outer(layer, value))
    again = (value, spec) in own.read_before
    if again and given is not None and _communicates(own, value, given, spec):
        return Source.FIRST_HALF
    return Source.INPUT


def _is_internal(model: LayeredModel, layout: StageLayout, value: Value) -> bool:
    return any(value in layer.outputs for layer in model.layers[layout.first : layout.last])


def _communicates(own: SpecsOnly, value: Value, source: Spec, target: Spec) -> bool:
    aval = own.avals[value]
    steps = reshard(aval.shape, aval.dtype.itemsize, source, target, own.mesh)
    return any(step.kind.communicates for step in steps)
