"""How the layers of a stage hang together, with classes of layers standing for layers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.layers import LayerClass, LayeredModel
from launcher.autopar.graphs.trace import Role
from launcher.autopar.intra_op.stage_problem import (
    ONCE_IN_STAGE,
    Group,
    borrowed_group,
    owned_group,
)

Place = tuple[str, int]  # (class name, slot or output)


@dataclass(frozen=True, slots=True)
class Holding:
    """How many parameters lie at a slot, each counted once however many layers read it.

    Attributes:
        owned: those that the stage updates.
        borrowed: those that another stage updates; this one has a copy, and hands on its gradients.
    """

    owned: int
    borrowed: int


@dataclass(frozen=True, slots=True)
class StageWiring:
    """The connections of a stage.

    Attributes:
        classes: class name -> how many layers of it.
        internal: (producer class, output, consumer class, slot) -> how many pairs of layers.
        states: the same for a new state and the slot it replaces in the next microbatch.
        exports: outputs read by a later stage or returned by the model.
        imports: slots computed by an earlier stage.
        aliases: slot -> the slot that stands for the same parameter; one with a gradient if any has.
        holdings: slot that stands for itself -> the parameters that lie there.
        borrowed: the parameters that another stage updates.
        unread: the parameters that no layer reads; the last stage has them.
    """

    classes: Mapping[str, int]
    internal: Mapping[tuple[str, int, str, int], int]
    states: Mapping[tuple[str, int, str, int], int]
    exports: frozenset[Place]
    imports: frozenset[Place]
    aliases: Mapping[Place, Place]
    holdings: Mapping[Place, Holding]
    borrowed: frozenset[Value]
    unread: tuple[Value, ...]

    @property
    def counts(self) -> dict[Group, int]:
        """How often each group of costs occurs."""
        owned = {owned_group(place): held.owned for place, held in self.holdings.items()}
        borrowed = {borrowed_group(place): held.borrowed for place, held in self.holdings.items()}
        layers = {**self.classes, **self.internal, **self.states}
        return {**layers, **owned, **borrowed, ONCE_IN_STAGE: 1}


def wire(
    model: LayeredModel, producer: Mapping[Value, tuple[int, int]], owners: Mapping[Value, int],
    first: int, last: int,
) -> StageWiring:  # fmt: skip
    """The wiring of layers [first, last).

    Args:
        producer: as `LayeredModel.producer` gives it.
        owners: as `LayeredModel.param_owners` gives them.
    """
    traced, layers = model.traced, model.layers[first:last]
    internal: Counter = Counter()
    imports: set[Place] = set()
    homes: dict[Value, list[Place]] = defaultdict(list)
    state_slots: dict[str, Place] = {}
    for layer in layers:
        for slot, value in enumerate(layer.inputs):
            place = (layer.cls.name, slot)
            match layer.cls.slots[slot].role:
                case Role.PARAM:
                    homes[value].append(place)
                case Role.STATE:
                    state_slots[traced.inputs[value].path] = place
                case None if producer[value][0] >= first:
                    index, output = producer[value]
                    internal[(model.layers[index].cls.name, output, *place)] += 1
                case None:
                    imports.add(place)
    exports, states = _outputs(model, state_slots, first, last)
    aliases = _aliases(homes.values(), {layer.cls.name: layer.cls for layer in layers})
    borrowed = frozenset(value for value in homes if not first <= owners[value] < last)
    return StageWiring(
        classes=Counter(layer.cls.name for layer in layers),
        internal=internal,
        states=states,
        exports=frozenset(exports),
        imports=frozenset(imports),
        aliases=aliases,
        holdings=_holdings(homes, borrowed, aliases),
        borrowed=borrowed,
        unread=model.unread_params() if last == len(model.layers) else (),
    )


def _holdings(homes: Mapping[Value, list[Place]], borrowed: frozenset[Value], aliases):
    owned: Counter = Counter()
    lent: Counter = Counter()
    for value, (place, *_) in homes.items():
        (lent if value in borrowed else owned)[aliases.get(place, place)] += 1
    return {place: Holding(owned[place], lent[place]) for place in {**owned, **lent}}


def _outputs(model: LayeredModel, state_slots: Mapping[str, Place], first: int, last: int):
    traced = model.traced
    finals = {traced.loss, *traced.state.values(), *traced.metrics.values()}
    later = {value for layer in model.layers[last:] for value in layer.inputs}
    path_of = {value: path for path, value in traced.state.items()}
    exports: set[Place] = set()
    states: Counter = Counter()
    for layer in model.layers[first:last]:
        for output, value in enumerate(layer.outputs):
            path = path_of.get(value)
            if path in state_slots:
                states[(layer.cls.name, output, *state_slots[path])] += 1
            elif value in later or value in finals:
                exports.add((layer.cls.name, output))
    return exports, states


def _aliases(
    groups: Iterable[list[Place]], classes: Mapping[str, LayerClass]
) -> dict[Place, Place]:
    """Which place stands for each other one that holds the same parameter (union-find)."""
    leader: dict[Place, Place] = {}

    def trained(place: Place) -> bool:
        name, slot = place
        return classes[name].has_gradient(slot)

    def find(place: Place) -> Place:
        while leader.get(place, place) != place:
            place = leader[place]
        return place

    for first, *others in groups:
        root = find(first)
        for place in others:
            other = find(place)
            if other != root and trained(other) and not trained(root):
                leader[root], root = other, other
            elif other != root:
                leader[other] = root
    return {place: find(place) for place in leader}
