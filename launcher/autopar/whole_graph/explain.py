"""What one node of a step could have chosen instead, and what the whole step would then cost.

Each alternative is priced by solving the step again with the node held to it: the others adapt.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.rules.registry import source_of
from launcher.autopar.sharding.spec import to_text
from launcher.autopar.whole_graph.graph_problem import Key
from launcher.autopar.whole_graph.intra_op_options import IntraOpOptions
from launcher.autopar.whole_graph.sharded_graph import collectives
from launcher.autopar.whole_graph.solve_step import SolvedStep, solve_step
from launcher.autopar.whole_graph.step_problem import StepProblem
from launcher.errors import ConfigError, InfeasiblePlanError


@dataclass(frozen=True, slots=True)
class Alternative:
    """One choice: `cost` is that of the whole step, infinite where nothing goes with it."""

    choice: str
    cost: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """The choices of a node, the cheapest first; `str()` is a table."""

    name: str
    place: str
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        width = max(len(a.choice) for a in self.alternatives)
        rows = [
            f"  {'>' if a.chosen else ' '} {a.choice:<{width}}  {a.cost:.6g}"
            for a in self.alternatives
        ]
        return "\n".join([f"{self.name} ({self.place})", *rows])


def explain_step(
    step: StepProblem, options: IntraOpOptions, solved: SolvedStep, names: Sequence[str], name: str
) -> Explanation:
    """Price the alternatives of an argument or an op."""
    key, place = _find(step, names, name)
    found = []
    for choice in step.problem.choices[key]:
        chosen = choice == solved.picks[key]
        cost = _cost(step, options, {key: choice}) if not chosen else _total(solved)
        found.append(Alternative(_text(step, choice), cost, chosen))
    found.sort(key=lambda a: (a.cost, not a.chosen))
    return Explanation(name, place, tuple(found))


def _cost(step: StepProblem, options: IntraOpOptions, pins) -> float:
    try:
        return _total(solve_step(step, options, pins))
    except InfeasiblePlanError:
        return math.inf


def _total(solved: SolvedStep) -> float:
    return math.fsum(c.times * c.cost for c in collectives(solved.sharded))


def _find(step: StepProblem, names: Sequence[str], name: str) -> tuple[Key, str]:
    if name in names:
        return step.inputs[names.index(name)].key, "argument"
    kind, _, number = name.partition(":")
    positions = [
        position for position, op in enumerate(step.region.graph.ops) if str(op.primitive) == kind
    ]
    wanted = int(number) if number.isdigit() else 0
    if wanted < len(positions):
        position = step.region.leader(positions[wanted])
        key = ("op", (), position)
        if key in step.problem.choices:
            return key, source_of(step.region.graph.ops[positions[wanted]])
    primitives = {str(op.primitive) for op in step.region.graph.ops}
    near = difflib.get_close_matches(name, [*names, *primitives], n=3, cutoff=0.3)
    raise ConfigError(
        f"there is no argument and no op called '{name}'; near it: {', '.join(near) or 'nothing'}; ops are "
        f"called by their primitive, with a number from 0 among their like: 'dot_general:2'"
    )


def _text(step: StepProblem, choice) -> str:
    axes = step.mesh.axis_names
    if not isinstance(choice, Strategy):
        return to_text(choice, axes)
    operands = range(len(choice.axes[0].operands))
    results = range(len(choice.axes[0].results))
    reads = ", ".join(to_text(choice.operand_spec(i), axes) for i in operands)
    yields = ", ".join(to_text(choice.result_spec(i), axes) for i in results)
    return f"({reads}) -> ({yields})"
