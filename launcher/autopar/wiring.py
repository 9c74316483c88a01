"""How the layers of a stage hang together, with classes of layers standing for layers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.autopar.graph import Value
from launcher.autopar.layers import LayeredModel
from launcher.autopar.stage_problem import ONCE_IN_STAGE, Group
from launcher.autopar.trace import Role

Place = tuple[str, int]  # (class name, slot or output)


@dataclass(frozen=True, slots=True)
class StageWiring:
    """The connections of a stage.

    Attributes:
        classes: class name -> how many layers of it.
        internal: (producer class, output, consumer class, slot) -> how many pairs of layers.
        states: the same for a new state and the slot it replaces in the next microbatch.
        exports: outputs read by a later stage or returned by the model.
        imports: slots computed by an earlier stage.
        aliases: slot -> the slot that stands for the same parameter.
    """

    classes: Mapping[str, int]
    internal: Mapping[tuple[str, int, str, int], int]
    states: Mapping[tuple[str, int, str, int], int]
    exports: frozenset[Place]
    imports: frozenset[Place]
    aliases: Mapping[Place, Place]

    @property
    def counts(self) -> dict[Group, int]:
        """How often each group of costs occurs."""
        return {**self.classes, **self.internal, **self.states, ONCE_IN_STAGE: 1}


def wire(model: LayeredModel, producer: Mapping[Value, tuple[int, int]], first: int, last: int):
    """The wiring of layers [first, last); `producer` as `LayeredModel.producer` gives it."""
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
    return StageWiring(
        classes=Counter(layer.cls.name for layer in layers),
        internal=internal,
        states=states,
        exports=frozenset(exports),
        imports=frozenset(imports),
        aliases=_aliases(homes.values()),
    )


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


def _aliases(groups: Iterable[list[Place]]) -> dict[Place, Place]:
    """Which place stands for each other one that holds the same parameter (union-find)."""
    leader: dict[Place, Place] = {}

    def find(place: Place) -> Place:
        while leader.get(place, place) != place:
            place = leader[place]
        return place

    for first, *others in groups:
        root = find(first)
        for place in others:
            if find(place) != root:
                leader[find(place)] = root
    return {place: find(place) for place in leader}
