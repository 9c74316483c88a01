"""Layers on one mesh -> a strategy for every op: the intra-operator pass (Alpa, section 4).

The objective is the time of one microbatch, forward and backward, plus a `num_microbatches`-th of what
happens once a step. The problem is over the classes of layers in the stage, so a stage of forty equal
blocks costs as much to plan as one of two.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.intra_op.class_fragment import ClassFragment, OpChoices
from launcher.autopar.intra_op.picked_fragment import NotOfferedError, PickedFragment
from launcher.autopar.intra_op.stage_builder import Fragments, StageBuilder, with_stand_ins
from launcher.autopar.intra_op.stage_problem import (
    FORWARD,
    ONCE_IN_STAGE,
    Group,
    Key,
    NodeCost,
    Picks,
    StageProblem,
    StageSettings,
)
from launcher.autopar.intra_op.stage_seconds import Seconds, seconds_of
from launcher.autopar.intra_op.wiring import Place, StageWiring, wire
from launcher.autopar.sharding.restrictions import ClassTags, tag_classes
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import Spec
from launcher.autopar.solver import Relaxations, solve
from launcher.errors import InfeasiblePlanError

Pins = Mapping[Key, Sequence[Spec | Strategy]]
_PENALTY_S = 1e6  # for a choice that a pin forbids: more than any stage takes


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
        return self._launch_s + sum(self.seconds.halves(self.settings.recompute))

    @property
    def backward_input_s(self) -> float:
        """Per microbatch, with what is recomputed for it."""
        first_s, _ = self.seconds.halves(self.settings.recompute)
        return self._launch_s + first_s

    @property
    def backward_weight_s(self) -> float:
        """Per microbatch: what only the gradients of parameters need, in a program of its own."""
        _, second_s = self.seconds.halves(self.settings.recompute)
        return self._launch_s + second_s

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
        """A microbatch's time, with its share of what happens once a step: the objective, which counts what
        recomputation and the backward pass share twice, as it depends on two strategies and a spec."""
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
        self._fragments: dict[tuple, Fragments] = {}
        self._of_picks: dict[tuple, tuple[Picks, Fragments]] = {}
        self._op_choices: dict[tuple, dict[str, dict[Hashable, OpChoices]]] = {}
        self._solutions: dict[Hashable, tuple[Picks, float]] = {}
        self._wirings: dict[tuple[int, int], StageWiring] = {}

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
        return _priced(self._problem_for(first, last, settings, picks), picks, 0.0)

    def reprice_if_possible(
        self, first: int, last: int, settings: StageSettings, picks: Picks
    ) -> StageSharding | None:
        """The same for picks of another model or other settings; None where they cannot be taken."""
        problem = self._problem_for(first, last, settings, picks)
        if any(picks.get(key) not in choices for key, choices in problem.choices.items()):
            return None
        return _priced(problem, picks, 0.0)

    def problem(
        self, first: int, last: int, settings: StageSettings, picks: Picks | None = None
    ) -> StageProblem:
        """The stage problem of layers [first, last).

        Args:
            picks: what nodes are held to, so that the problem has no other choices; raises `NotOfferedError`
                where they may not have it.
        """
        wiring = self.wiring(first, last)
        return StageBuilder(settings, wiring, self._fragments_for(settings, wiring, picks)).build()

    def reduce_s(self, first: int, last: int, sharding: StageSharding) -> dict[Place, float]:
        """Seconds to bring a parameter's gradients together, by (class, slot), in layers [first, last)."""
        wiring, found = self.wiring(first, last), {}
        fragments = self._fragments_for(sharding.settings, wiring, sharding.picks)
        for name in wiring.classes:
            for slot in fragments[name].param_slots:
                of, at = wiring.aliases.get((name, slot), (name, slot))
                fragment = fragments[of]
                keys = fragment.key("accumulator", at), fragment.key("slot", at)
                if keys[0] in fragment.choices:
                    where = tuple(fragment.choices[key].index(sharding.picks[key]) for key in keys)
                    costs = fragment.param_costs(sharding.settings.zero)[at]
                    found[name, slot] = float(costs.reduce_s[where])
        return found

    def could_save(self, first: int, last: int, settings: StageSettings, picks: Picks) -> float:
        """Which part of what the settings charge picks for memory others may save, at most."""
        problem = self.problem(first, last, settings)
        penalty = problem.penalty(picks)
        return 1.0 - problem.least_penalty() / penalty if penalty else 0.0

    def _problem_for(
        self, first: int, last: int, settings: StageSettings, picks: Picks
    ) -> StageProblem:
        """The stage problem, with no more than picks have need of, where that can be."""
        try:
            return self.problem(first, last, settings, picks)
        except NotOfferedError:
            return self.problem(first, last, settings)

    def _fragments_for(
        self, settings: StageSettings, wiring: StageWiring, picks: Picks | None
    ) -> Fragments:
        """The fragments of such settings; where nobody has needed them yet, those of the picks alone."""
        of_ops = (settings.mesh, settings.restrictions, settings.compute.key)
        key = (*of_ops, settings.zero == 3, settings.scatter, settings.optimizer)
        known = self._op_choices.setdefault(of_ops, {name: {} for name in self.classes})
        if picks is not None and key not in self._fragments:
            return self._picked_fragments(key, settings, wiring, picks, known)
        if key not in self._fragments:
            make = partial(_fragment, self.classes, self.tags, settings, known)
            self._fragments[key] = Fragments(make)
        return self._fragments[key]

    def _picked_fragments(
        self, key: tuple, settings: StageSettings, wiring: StageWiring, picks: Picks, known
    ) -> Fragments:
        kept, fragments = self._of_picks.get((key, id(picks)), (None, None))
        if kept is not picks:
            held = with_stand_ins(picks, wiring.aliases)
            make = partial(_picked_fragment, self.classes, self.tags, settings, held, known)
            self._of_picks[key, id(picks)] = picks, (fragments := Fragments(make))
        return fragments

    def wiring(self, first: int, last: int) -> StageWiring:
        """What is connected with what in layers [first, last)."""
        if (first, last) not in self._wirings:
            self._wirings[first, last] = wire(
                self.model, self._producer, self.param_owners, first, last
            )
        return self._wirings[first, last]


def _fragment(classes, tags, settings: StageSettings, known, name: str) -> ClassFragment:
    return ClassFragment(classes[name], tags[name], settings, known[name])


def _picked_fragment(classes, tags, settings: StageSettings, picks: Picks, known, name: str):
    return PickedFragment(classes[name], tags[name], settings, picks, known[name])


def _identity(problem: StageProblem, pins: Pins) -> Hashable:
    """Equal for problems of one planner with the same nodes, choices and costs."""
    settings = problem.settings
    return (
        settings.mesh, settings.compute.key, settings.restrictions, settings.num_microbatches,
        settings.zero, settings.scatter, settings.recompute, settings.memory_s_per_byte, settings.optimizer,
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
    groups = seconds_of(problem, picks)
    sharding = StageSharding(problem.settings, picks, groups, Seconds(), gap_fraction)
    return sharding.for_counts(problem.counts, problem.settings)
