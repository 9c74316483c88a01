"""Layers on one mesh -> a strategy for every op: the intra-operator pass (Alpa, section 4).

The objective is the time of one microbatch, forward and backward, plus a `num_microbatches`-th of what
happens once a step. The problem is over the classes of layers in the stage, so a stage of forty equal
blocks costs as much to plan as one of two.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.intra_op.stage_problem import (
    BACKWARD_INPUT,
    FORWARD,
    ONCE,
    ONCE_IN_STAGE,
    ClassFragment,
    EdgeCost,
    Group,
    Key,
    NodeCost,
    OpChoices,
    Part,
    StageProblem,
    StageSettings,
    borrowed_group,
    owned_group,
)
from launcher.autopar.intra_op.wiring import Place, StageWiring, wire
from launcher.autopar.sharding.restrictions import ClassTags, tag_classes
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import Spec
from launcher.autopar.solver import Relaxations, solve
from launcher.errors import InfeasiblePlanError

Picks = Mapping[Key, Spec | Strategy]
Pins = Mapping[Key, Sequence[Spec | Strategy]]
_PENALTY_S = 1e6  # for a choice that a pin forbids: more than any stage takes


@dataclass(frozen=True, slots=True)
class Seconds:
    """Costs by when they fall due: forward and backward per microbatch, the others per step."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    synchronize: float = 0.0
    update: float = 0.0

    @property
    def backward(self) -> float:
        """Both halves."""
        return self.backward_input + self.backward_weight

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.synchronize + other.synchronize,
            self.update + other.update,
        )

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(
            self.forward * times,
            self.backward_input * times,
            self.backward_weight * times,
            self.synchronize * times,
            self.update * times,
        )


@dataclass(frozen=True, slots=True, eq=False)
class StageSharding:
    """The solved stage: what every node of the stage problem chose, and what it costs."""

    settings: StageSettings
    picks: Picks
    group_seconds: Mapping[Group, Seconds]
    seconds: Seconds
    gap_fraction: float

    @property
    def forward_s(self) -> float:
        """Per microbatch, one program."""
        return self._launch_s + self.seconds.forward

    @property
    def backward_s(self) -> float:
        """Per microbatch: both halves in one program."""
        return self.backward_input_s + self.seconds.backward_weight

    @property
    def backward_input_s(self) -> float:
        """Per microbatch, with the forward pass again where it is recomputed."""
        again = self.seconds.forward if self.settings.recompute else 0.0
        return self._launch_s + self.seconds.backward_input + again

    @property
    def backward_weight_s(self) -> float:
        """Per microbatch: what only the gradients of parameters need, in a program of its own."""
        return self._launch_s + self.seconds.backward_weight

    @property
    def synchronize_s(self) -> float:
        """Per step."""
        return self._launch_s + self.seconds.synchronize

    @property
    def update_s(self) -> float:
        """Per step."""
        return self._launch_s + self.seconds.update

    @property
    def once_s(self) -> float:
        """Per step: synchronisation and update."""
        return self.synchronize_s + self.update_s

    @property
    def _launch_s(self) -> float:
        """What starting a program takes."""
        return self.settings.compute.device.program_launch_s

    @property
    def microbatch_s(self) -> float:
        """The objective: a microbatch's time, with its share of what happens once a step."""
        return self.forward_s + self.backward_s + self.once_s / self.settings.num_microbatches

    def for_counts(self, counts: Mapping[Group, int], settings: StageSettings) -> "StageSharding":
        """The same picks for another stage of these classes: costs are linear in the counts.

        What only that stage has, such as values that leave it, counts nothing.
        """
        total = Seconds()
        for group, count in counts.items():
            if group in self.group_seconds:
                total += self.group_seconds[group] * count
        return replace(self, settings=settings, seconds=total)


class IntraOpPlanner:
    """Plans ranges of layers on meshes, remembering the parts of the problems that recur.

    Args:
        relaxations: those of other planners, whose problems may be like this one's.

    Attributes:
        num_solved: counts the problems that were solved.
    """

    def __init__(
        self, model: LayeredModel, *, time_limit_s: float = 60.0,
        relaxations: Relaxations | None = None,
    ):  # fmt: skip
        self.model = model
        self.tags: dict[str, ClassTags] = tag_classes(model)
        self.classes = {cls.name: cls for cls in model.classes}
        self.time_limit_s = time_limit_s
        self.num_solved = 0
        self._relaxations = relaxations or Relaxations()
        self._producer = model.producer()
        self.param_owners = model.param_owners()
        self.workspaces: dict[Hashable, object] = {}  # of `layer_workspace`
        self._fragments: dict[tuple, ClassFragment] = {}
        self._op_choices: dict[tuple, dict[int, OpChoices]] = {}
        self._solutions: dict[Hashable, tuple[Picks, float]] = {}
        self.wiring = lru_cache(maxsize=None)(self._wiring)

    def solve(
        self, first: int, last: int, settings: StageSettings, pins: Pins | None = None
    ) -> StageSharding:
        """Plan layers [first, last).

        Args:
            pins: node -> the choices that a plan holds it to.
        """
        problem = self.problem(first, last, settings)
        _check_feasible(problem, settings)
        if pins and all(len(pins.get(key, ())) == 1 for key in problem.choices):
            return _priced(problem, {key: pins[key][0] for key in problem.choices}, 0.0)
        picks, gap_fraction = self._picked(problem, pins or {})
        return _priced(problem, picks, gap_fraction)

    def _picked(self, problem: StageProblem, pins: Pins) -> tuple[Picks, float]:
        """Solve a problem, or remember what was picked for its equal: the stages in the middle of a
        pipeline are alike."""
        key = _identity(problem, pins)
        if key not in self._solutions:
            pairwise, keys = _pinned(problem, pins).pairwise()
            # What pins forbid costs so much that a relaxation's tolerance would swallow the rest.
            relaxations = None if pins else self._relaxations
            solution = solve(pairwise, time_limit_s=self.time_limit_s, relaxations=relaxations)
            self.num_solved += 1
            picks = {k: problem.choices[k][p] for k, p in zip(keys, solution.choice, strict=True)}
            self._solutions[key] = picks, solution.gap_fraction
        return self._solutions[key]

    def reprice(
        self, first: int, last: int, settings: StageSettings, picks: Picks
    ) -> StageSharding:
        """Price known picks for other settings, or another range of the same family."""
        return _priced(self.problem(first, last, settings), picks, 0.0)

    def reprice_if_possible(
        self, first: int, last: int, settings: StageSettings, picks: Picks
    ) -> StageSharding | None:
        """The same for picks of another model or other settings; None where they cannot be taken."""
        problem = self.problem(first, last, settings)
        if any(picks.get(key) not in choices for key, choices in problem.choices.items()):
            return None
        return _priced(problem, picks, 0.0)

    def problem(self, first: int, last: int, settings: StageSettings) -> StageProblem:
        """The stage problem of layers [first, last)."""
        wiring = self.wiring(first, last)
        problem = StageProblem(settings, wiring.counts)
        for name in wiring.classes:
            self._add_class(problem, name, wiring)
        for group in wiring.internal:
            self._connect_layers(problem, group)
        for group in wiring.states:
            source, output, target, slot = group
            self._connect(problem, source, output, ("slot", target, slot), FORWARD, group)
        for name, output in wiring.exports:
            self._add_boundary(problem, ("export", name, output), FORWARD)
        for name, slot in wiring.imports:
            self._add_boundary(problem, ("return", name, slot), BACKWARD_INPUT)
        return problem

    def reduce_s(self, first: int, last: int, sharding: StageSharding) -> dict[Place, float]:
        """Seconds to bring a parameter's gradients together, by (class, slot), in layers [first, last)."""
        wiring, found = self.wiring(first, last), {}
        for name in wiring.classes:
            for slot in self._fragment(name, sharding.settings).param_slots:
                of, at = wiring.aliases.get((name, slot), (name, slot))
                fragment = self._fragment(of, sharding.settings)
                keys = fragment.key("accumulator", at), fragment.key("slot", at)
                if keys[0] in fragment.choices:
                    where = tuple(fragment.choices[key].index(sharding.picks[key]) for key in keys)
                    costs = fragment.param_costs(sharding.settings.zero)[at]
                    found[name, slot] = float(costs.reduce_s[where])
        return found

    def _fragment(self, name: str, settings: StageSettings) -> ClassFragment:
        of_ops = (name, settings.mesh, settings.restrictions, settings.compute.key)
        key = (*of_ops, settings.zero == 3, settings.optimizer)
        if key not in self._fragments:
            known = self._op_choices.setdefault(of_ops, {})
            cls, tags = self.classes[name], self.tags[name]
            self._fragments[key] = ClassFragment(cls, tags, settings, known)
        return self._fragments[key]

    def _add_class(self, problem: StageProblem, name: str, wiring: StageWiring) -> None:
        """Add a class; a parameter it shares with another class has its nodes there."""
        fragment = self._fragment(name, problem.settings)
        stand_in = {
            (kind, *own): (kind, *other)
            for own, other in wiring.aliases.items()
            for kind in ("slot", "accumulator")
        }
        problem.choices.update(
            (key, choices) for key, choices in fragment.choices.items() if key not in stand_in
        )
        problem.nodes += [node for node in fragment.nodes if node.key not in stand_in]
        for slot in fragment.param_slots:
            self._add_param(problem, (name, slot), wiring.aliases)
        for edge in fragment.edges:
            if edge.source in stand_in or edge.target in stand_in:
                source = stand_in.get(edge.source, edge.source)
                edge = replace(edge, source=source, target=stand_in.get(edge.target, edge.target))
            problem.edges.append(edge)

    def _add_param(self, problem: StageProblem, place: Place, aliases: Mapping[Place, Place]):
        """What the parameters at a slot cost, which another slot may stand for."""
        settings = problem.settings
        name, slot = aliases.get(place, place)
        costs = self._fragment(name, settings).param_costs(settings.zero)[slot]
        home, accumulator = ("slot", name, slot), ("accumulator", name, slot)
        owned, borrowed = owned_group(place), borrowed_group(place)
        once, price = ONCE, settings.memory_s_per_byte
        problem.nodes.append(NodeCost(home, costs.update_s, once, owned))
        held = [
            (home, costs.weight_bytes + costs.state_bytes, owned),
            (home, costs.weight_bytes, borrowed),
        ]
        if ("accumulator", name, slot) in self._fragment(name, settings).choices:
            problem.edges.append(EdgeCost(accumulator, home, costs.synchronize_s, once, owned))
            held.append((accumulator, costs.accumulator_bytes, owned))
            if self.classes[place[0]].has_gradient(place[1]):
                problem.edges.append(EdgeCost(accumulator, home, costs.hand_on_s, once, borrowed))
                held.append((accumulator, costs.accumulator_bytes, borrowed))
        if price:
            problem.penalties += [
                NodeCost(key, price * num_bytes, FORWARD, group) for key, num_bytes, group in held
            ]

    def _connect_layers(self, problem: StageProblem, group: tuple[str, int, str, int]) -> None:
        """A value from layer to layer, and its gradient back."""
        source, output, target, slot = group
        self._connect(problem, source, output, ("slot", target, slot), FORWARD, group)
        cotangent = ("cotangent", source, output)
        if cotangent in problem.choices:
            gradient = self.classes[target].gradients.get(slot)
            self._edge(problem, target, gradient, cotangent, BACKWARD_INPUT, group)

    def _connect(self, problem, source: str, output: int, key: Key, part: Part, group) -> None:
        self._edge(problem, source, self.classes[source].outputs[output], key, part, group)

    def _add_boundary(self, problem: StageProblem, key: Key, part: Part) -> None:
        """A node for a value that leaves the stage: an output forward, a gradient backward."""
        kind, name, index = key
        cls = self.classes[name]
        value = cls.outputs[index] if kind == "export" else cls.gradients.get(index)
        fragment = self._fragment(name, problem.settings)
        if value in fragment.source:
            problem.choices[key] = fragment.boundary_specs(value)
            self._edge(problem, name, value, key, part, ONCE_IN_STAGE)

    def _edge(self, problem, name: str, value: Value, key: Key, part: Part, group: Group) -> None:
        fragment = self._fragment(name, problem.settings)
        if value in fragment.source:
            source = fragment.exit(value, backward=part.backward)
            matrix = fragment.matrix(value, source, problem.choices[key])
            problem.edges.append(EdgeCost(source.key, key, matrix, part, group))

    def _wiring(self, first: int, last: int) -> StageWiring:
        return wire(self.model, self._producer, self.param_owners, first, last)


def _identity(problem: StageProblem, pins: Pins) -> Hashable:
    """Equal for problems of one planner with the same nodes, choices and costs."""
    settings = problem.settings
    return (
        settings.mesh, settings.compute.key, settings.restrictions, settings.num_microbatches,
        settings.zero, settings.recompute, settings.memory_s_per_byte, settings.optimizer,
        frozenset(problem.counts.items()), tuple(problem.choices),
        frozenset((key, tuple(choices)) for key, choices in pins.items()),
    )  # fmt: skip


def _pinned(problem: StageProblem, pins: Pins) -> StageProblem:
    """Hold nodes to some of their choices by making the others dear."""
    penalties = [
        NodeCost(
            key,
            np.array([0.0 if choice in pins[key] else _PENALTY_S for choice in choices]),
            FORWARD,
            ONCE_IN_STAGE,
        )
        for key, choices in problem.choices.items()
        if key in pins
    ]
    return replace(problem, penalties=[*problem.penalties, *penalties])


def _check_feasible(problem: StageProblem, settings: StageSettings) -> None:
    empty = [key for key, choices in problem.choices.items() if not choices]
    if empty:
        raise InfeasiblePlanError(
            f"mesh {settings.mesh.shape} leaves no sharding for {empty[0]}: a dim that must be split is "
            f"not divisible; choose other parallel.dp, parallel.tp or parallel.num_microbatches"
        )


def _priced(problem: StageProblem, picks: Picks, gap_fraction: float) -> StageSharding:
    """Add up the cost of picks, by group and by when it falls due."""
    at = {key: choices.index(picks[key]) for key, choices in problem.choices.items()}
    totals: dict[Group, list[float]] = {}  # in the order of the fields of `Seconds`

    def book(group: Group, part: Part, cost: float, *, is_update: bool) -> None:
        row = totals.setdefault(group, [0.0] * 5)
        row[0] += cost * part.forward
        row[1] += cost * part.backward_input
        row[2] += cost * part.backward_weight
        row[4 if is_update else 3] += cost * part.once

    for node in problem.nodes:
        book(node.group, node.part, float(node.costs[at[node.key]]), is_update=True)
    for edge in problem.edges:
        cost = float(edge.costs[at[edge.source], at[edge.target]])
        book(edge.group, edge.part, cost, is_update=False)
    groups = {group: Seconds(*row) for group, row in totals.items()}
    sharding = StageSharding(problem.settings, dict(picks), groups, Seconds(), gap_fraction)
    return sharding.for_counts(problem.counts, problem.settings)
