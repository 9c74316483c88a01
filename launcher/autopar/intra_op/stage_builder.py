"""Puts a stage's problem together: fragments of its classes, their parameters, and what connects them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from launcher.autopar.graphs.graph import Value
from launcher.autopar.intra_op.class_fragment import ClassFragment
from launcher.autopar.intra_op.stage_problem import (
    BACKWARD_INPUT,
    FORWARD,
    ONCE,
    ONCE_IN_STAGE,
    EdgeCost,
    Group,
    Key,
    NodeCost,
    Part,
    Picks,
    StageProblem,
    StageSettings,
    borrowed_group,
    owned_group,
)
from launcher.autopar.intra_op.wiring import Place, StageWiring


class Fragments(dict[str, ClassFragment]):
    """The fragments of a model's classes on one mesh, made when they are asked for."""

    def __init__(self, make: Callable[[str], ClassFragment]):
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> ClassFragment:
        self[name] = self._make(name)
        return self[name]


class StageBuilder:
    """Builds one problem."""

    def __init__(self, settings: StageSettings, wiring: StageWiring, fragments: Fragments):
        self.wiring, self.fragments = wiring, fragments
        self.problem = StageProblem(settings, wiring.counts)

    def build(self) -> StageProblem:
        """Return the problem."""
        wiring = self.wiring
        for name in wiring.classes:
            self._add_class(name)
        for group in wiring.internal:
            self._connect_layers(group)
        for group in wiring.states:
            source, output, target, slot = group
            self._connect(source, output, ("slot", target, slot), FORWARD, group)
        for name, output in wiring.exports:
            self._add_boundary(("export", name, output), FORWARD)
        for name, slot in wiring.imports:
            self._add_boundary(("return", name, slot), BACKWARD_INPUT)
        return self.problem

    def _add_class(self, name: str) -> None:
        """Add a class; a parameter it shares with another class has its nodes there."""
        problem, fragment = self.problem, self.fragments[name]
        stand_in = _stand_ins(self.wiring.aliases)
        problem.choices.update(
            (key, choices) for key, choices in fragment.choices.items() if key not in stand_in
        )
        problem.nodes += [node for node in fragment.nodes if node.key not in stand_in]
        for slot in fragment.param_slots:
            self._add_param((name, slot))
        for edge in fragment.edges:
            if edge.source in stand_in or edge.target in stand_in:
                source = stand_in.get(edge.source, edge.source)
                edge = replace(edge, source=source, target=stand_in.get(edge.target, edge.target))
            problem.edges.append(edge)

    def _add_param(self, place: Place) -> None:
        """What the parameters at a slot cost, which another slot may stand for."""
        problem, settings = self.problem, self.problem.settings
        name, slot = self.wiring.aliases.get(place, place)
        costs = self.fragments[name].param_costs(settings.zero)[slot]
        home, accumulator = ("slot", name, slot), ("accumulator", name, slot)
        owned, borrowed = owned_group(place), borrowed_group(place)
        once, price = ONCE, settings.memory_s_per_byte
        problem.nodes.append(NodeCost(home, costs.update_s, once, owned))
        held = [
            (home, costs.weight_bytes + costs.state_bytes, owned),
            (home, costs.weight_bytes, borrowed),
        ]
        if ("accumulator", name, slot) in self.fragments[name].choices:
            problem.edges.append(EdgeCost(accumulator, home, costs.synchronize_s, once, owned))
            held.append((accumulator, costs.accumulator_bytes, owned))
            if self.fragments[place[0]].cls.has_gradient(place[1]):
                problem.edges.append(EdgeCost(accumulator, home, costs.hand_on_s, once, borrowed))
                held.append((accumulator, costs.accumulator_bytes, borrowed))
        if price:
            problem.penalties += [
                NodeCost(key, price * num_bytes, FORWARD, group) for key, num_bytes, group in held
            ]

    def _connect_layers(self, group: tuple[str, int, str, int]) -> None:
        """A value from layer to layer, and its gradient back."""
        source, output, target, slot = group
        self._connect(source, output, ("slot", target, slot), FORWARD, group)
        cotangent = ("cotangent", source, output)
        if cotangent in self.problem.choices:
            gradient = self.fragments[target].cls.gradients.get(slot)
            self._edge(target, gradient, cotangent, BACKWARD_INPUT, group)

    def _connect(self, source: str, output: int, key: Key, part: Part, group) -> None:
        self._edge(source, self.fragments[source].cls.outputs[output], key, part, group)

    def _add_boundary(self, key: Key, part: Part) -> None:
        """A node for a value that leaves the stage: an output forward, a gradient backward."""
        kind, name, index = key
        fragment = self.fragments[name]
        cls = fragment.cls
        value = cls.outputs[index] if kind == "export" else cls.gradients.get(index)
        if value in fragment.source:
            self.problem.choices[key] = fragment.boundary_specs(value)
            self._edge(name, value, key, part, ONCE_IN_STAGE)

    def _edge(self, name: str, value: Value, key: Key, part: Part, group: Group) -> None:
        problem, fragment = self.problem, self.fragments[name]
        if value in fragment.source:
            source = fragment.exit(value, backward=part.backward)
            matrix = fragment.matrix(value, source, problem.choices[key])
            problem.edges.append(EdgeCost(source.key, key, matrix, part, group))


def _stand_ins(aliases: Mapping[Place, Place]) -> dict[Key, Key]:
    """Node of a slot that shares its parameter -> the node that stands for it."""
    return {
        (kind, *own): (kind, *other)
        for own, other in aliases.items()
        for kind in ("slot", "accumulator")
    }


def with_stand_ins(picks: Picks, aliases: Mapping[Place, Place]) -> Picks:
    """Picks, also under the names of the nodes that others stand for."""
    others = {own: picks[of] for own, of in _stand_ins(aliases).items() if of in picks}
    return {**picks, **others}
