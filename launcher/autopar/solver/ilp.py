"""The ILP through PuLP: HiGHS by default, CBC as the alternative; both prove the same optimum.

`improve_by_ilp` is for the many small ILPs of the large-neighbourhood search: HiGHS without PuLP, because
PuLP 3 hands over no known solution to start from and spends longer on building such a model than HiGHS on
solving it.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
import pulp

from launcher.autopar.solver.highs import highs_lp, silent_model, take_banner
from launcher.autopar.solver.problem import PairwiseProblem, Solution
from launcher.autopar.solver.tight_form import Rows, TightForm, tight_form
from launcher.errors import InfeasiblePlanError

_GAP_FRACTION = 1e-6
_FIRST_POINTS = 50
_MOST_ADDED = 100  # memory rows a round
_MOST_ROUNDS = 4
SOLVERS = ("highs", "cbc")


def solve_by_ilp(
    problem: PairwiseProblem, *, time_limit_s: float = 60.0, solver: str = "highs"
) -> Solution | None:
    """Return a choice of least cost, with the solver's dual bound; None if time ran out before any.

    Raises InfeasiblePlanError where the solver proves that there is no choice.
    """
    if not problem.node_costs:
        return Solution((), 0.0, 0.0, solver)
    end = time.monotonic() + time_limit_s
    form = tight_form(problem)
    ilp, variables = _pulp_problem(form)
    num_rows, points = len(form.rows.upper), form.first_points(_FIRST_POINTS)
    limited: set[int] = set()
    choice: tuple[int, ...] = ()
    while True:
        new = [point for point in points.tolist() if point not in limited]
        for point in limited.intersection(points.tolist()):
            num_rows = _add_rows(ilp, variables, form.cover_row(point, choice), num_rows)
        if new:
            num_rows = _add_rows(ilp, variables, form.memory_rows(new), num_rows)
            limited.update(new)
        backend = _backend(solver, max(0.1, end - time.monotonic()))
        ilp.solve(backend)
        if ilp.sol_status == pulp.LpSolutionInfeasible:
            raise InfeasiblePlanError(
                "no choice is allowed: the ILP has no solution; raise the memory limit or allow more"
            )
        if ilp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        choice = form.choice(np.array([variable.value() or 0.0 for variable in variables]))
        points = form.overflowing(choice)[:_MOST_ADDED]
        if not len(points):
            cost = problem.cost(choice)
            return Solution(choice, cost, min(cost, _lower_bound(ilp, solver, form, cost)), solver)
        if time.monotonic() >= end:
            return None


def improve_by_ilp(
    problem: PairwiseProblem, start: Sequence[int], *, time_limit_s: float
) -> tuple[int, ...]:
    """Return the best choice found in a little time; the start, which need not fit, if there is none."""
    form = tight_form(problem)
    model = silent_model()
    model.setOptionValue("threads", 1)
    known = highspy.HighsSolution()
    known.col_value = form.start(start).tolist()
    rows, points, end = form.rows, form.first_points(_MOST_ADDED), time.monotonic() + time_limit_s
    for _ in range(_MOST_ROUNDS):
        if len(points):
            rows = _stacked(rows, form.memory_rows(points))
        model.setOptionValue("time_limit", max(0.05, end - time.monotonic()))
        model.passModel(highs_lp(form, rows))
        model.setSolution(known)
        model.run()
        solution = model.getSolution()
        if not solution.value_valid:
            break
        choice = form.choice(np.array(solution.col_value))
        points = form.overflowing(choice)[:_MOST_ADDED]
        if not len(points):
            return choice
        if time.monotonic() >= end:
            break
    return tuple(start)


@dataclass(frozen=True, slots=True)
class Excess:
    """By how much some choice exceeds the memory limit at its worst point, and whether none is less."""

    excess: float
    is_least: bool


def least_excess(problem: PairwiseProblem, *, time_limit_s: float) -> Excess | None:
    """How far the limit would have to rise, or could fall; None if time ran out before any choice."""
    end = time.monotonic() + time_limit_s
    form = tight_form(replace(problem, edge_costs=_only_forbidding(problem)))
    ilp, variables = _pulp_problem(form)
    scale = max(1.0, abs(problem.memory.limit))
    above = ilp.add_variable("above")
    ilp.setObjective(pulp.LpAffineExpression([(above, 1.0)]))
    num_rows, points = len(form.rows.upper), form.first_points(_FIRST_POINTS)
    while time.monotonic() < end:
        rows = form.memory_rows(points, scale)
        for row in range(len(points)):
            at = rows.row == row
            held = _expression(variables, rows.column[at], rows.value[at])
            ilp += held - above <= float(rows.upper[row]), f"row_{num_rows + row}"
        num_rows += len(points)
        ilp.solve(_backend("highs", max(0.1, end - time.monotonic())))
        if ilp.sol_status == pulp.LpSolutionInfeasible:
            raise InfeasiblePlanError("forbidden costs leave no choice")
        if ilp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        choice = form.choice(np.array([variable.value() or 0.0 for variable in variables]))
        excess = problem.memory.excess(choice)
        if excess <= above.value() * scale + 1e-6 * scale:
            return Excess(excess, ilp.sol_status == pulp.LpSolutionOptimal)
        points = np.array([(problem.memory.used(choice) - problem.memory.room).argmax()])
    return None


def _only_forbidding(problem: PairwiseProblem) -> dict[tuple[int, int], np.ndarray]:
    """Edges that forbid pairs, at no other cost; the others do not matter where only memory does."""
    return {
        edge: np.where(np.isfinite(matrix), 0.0, np.inf)
        for edge, matrix in problem.edge_costs.items()
        if not np.isfinite(matrix).all()
    }


def _pulp_problem(form: TightForm) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    ilp = pulp.LpProblem("sharding", pulp.LpMinimize)
    variables = [ilp.add_variable(f"x_{i}", cat="Binary") for i in range(form.num_binaries)]
    variables += [
        ilp.add_variable(f"e_{i}", 0, None if bound else 0)
        for i, bound in enumerate(form.upper[form.num_binaries :])
    ]
    ilp.setObjective(_expression(variables, np.arange(len(variables)), form.costs))
    _add_rows(ilp, variables, form.rows, 0)
    return ilp, variables


def _add_rows(ilp: pulp.LpProblem, variables, rows: Rows, number: int) -> int:
    """Add rows under names that begin with a number; returns the next number."""
    order = np.argsort(rows.row, kind="stable")
    ends = np.cumsum(np.bincount(rows.row, minlength=len(rows.upper)))
    for row, entries in enumerate(np.split(order, ends[:-1])):
        terms = _expression(variables, rows.column[entries], rows.value[entries])
        is_sum = rows.lower[row] == rows.upper[row]
        bound = float(rows.upper[row])
        ilp += (terms == bound if is_sum else terms <= bound), f"row_{number + row}"
    return number + len(rows.upper)


def _expression(variables, columns: np.ndarray, values: np.ndarray) -> pulp.LpAffineExpression:
    pairs = zip(columns.tolist(), values.tolist(), strict=True)
    return pulp.LpAffineExpression([(variables[c], v) for c, v in pairs if v != 0])


def _backend(solver: str, time_limit_s: float) -> pulp.LpSolver:
    if solver == "highs":
        take_banner()
        return pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=_GAP_FRACTION)
    with warnings.catch_warnings():
        # PuLP 3.3 announces that 4 comes without CBC; this project stays below 4.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, gapRel=_GAP_FRACTION)


def _lower_bound(ilp: pulp.LpProblem, solver: str, form: TightForm, cost: float) -> float:
    """The dual bound in unscaled cost; CBC through PuLP has one only where it is done."""
    if solver == "highs":
        return float(ilp.solverModel.getInfo().mip_dual_bound) / form.scale
    is_done = ilp.sol_status == pulp.LpSolutionOptimal
    return cost - _GAP_FRACTION * abs(cost) if is_done else -np.inf


def _stacked(first: Rows, second: Rows) -> Rows:
    return Rows(
        row=np.concatenate((first.row, second.row + len(first.upper))),
        column=np.concatenate((first.column, second.column)),
        value=np.concatenate((first.value, second.value)),
        lower=np.concatenate((first.lower, second.lower)),
        upper=np.concatenate((first.upper, second.upper)),
    )
