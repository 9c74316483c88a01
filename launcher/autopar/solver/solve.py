"""The solvers of a pairwise problem: exact elimination where it is cheap, an ILP in its tight form elsewhere.

The ILP runs over what the exact reductions leave.

Node choices x are binary; for each edge, variables e(p, q) >= 0 are tied to them by marginals,

    sum_q e(p, q) = x_i(p)        sum_p e(p, q) = x_j(q)

so that e needs no integrality, and the relaxation is that of the local polytope. Alpa's form (e binary,
inequalities) has the same optimum with a weaker relaxation.
"""

import logging

import numpy as np
import pulp

from launcher.autopar.solver.eliminate import plan_order, solve_by_elimination
from launcher.autopar.solver.problem import PairwiseProblem, Solution
from launcher.autopar.solver.reduce import Reduced, reduce

log = logging.getLogger(__name__)

_GAP_FRACTION = 1e-6


def solve(problem: PairwiseProblem, *, time_limit_s: float = 60.0) -> Solution:
    """Return a choice of least cost, with a bound; proven optimal unless time ran out.

    Elimination as it is, else elimination of what the reductions leave, else the ILP.
    """
    order = plan_order(problem)
    if order is not None:
        return solve_by_elimination(problem, order)
    reduced = reduce(problem)
    rest, _ = reduced.rest()
    order = plan_order(rest)
    if order is not None:
        return _completed(problem, reduced, solve_by_elimination(rest, order))
    return _completed(problem, reduced, solve_by_ilp(rest, time_limit_s=time_limit_s))


def _completed(problem: PairwiseProblem, reduced: Reduced, solution: Solution) -> Solution:
    """Extend a solution of what was left to the whole problem."""
    _, nodes = reduced.rest()
    picks = {
        node: int(reduced.kept[node][pick])
        for node, pick in zip(nodes, solution.choice, strict=True)
    }
    choice = reduced.choice(picks, len(problem.node_costs))
    cost = problem.cost(choice)
    return Solution(choice, cost, cost - (solution.cost - solution.lower_bound))


def solve_by_ilp(problem: PairwiseProblem, *, time_limit_s: float = 60.0) -> Solution:
    """Return a choice of least cost by the ILP, with the solver's dual bound."""
    scale = _scale(problem)
    ilp = pulp.LpProblem("sharding", pulp.LpMinimize)
    pick = [
        [ilp.add_variable(f"x_{node}_{p}", cat="Binary") for p in range(len(costs))]
        for node, costs in enumerate(problem.node_costs)
    ]
    objective = [
        (variable, float(cost) * scale)
        for variables, costs in zip(pick, problem.node_costs, strict=True)
        for variable, cost in zip(variables, costs, strict=True)
    ]
    for node, variables in enumerate(pick):
        ilp += pulp.LpAffineExpression([(v, 1) for v in variables]) == 1, f"one_{node}"
    for (i, j), matrix in problem.edge_costs.items():
        objective += _add_edge(ilp, (i, j), matrix * scale, pick[i], pick[j])
    ilp.setObjective(pulp.LpAffineExpression(objective))
    ilp.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=_GAP_FRACTION))
    choice = tuple(int(np.argmax([v.value() or 0.0 for v in variables])) for variables in pick)
    cost = problem.cost(choice)
    return Solution(choice, cost, min(cost, _lower_bound(ilp, scale)))


def _add_edge(ilp: pulp.LpProblem, edge, matrix: np.ndarray, rows, columns):
    i, j = edge
    both = [
        [ilp.add_variable(f"e_{i}_{j}_{p}_{q}", 0) for q in range(len(columns))]
        for p in range(len(rows))
    ]
    for p, variable in enumerate(rows):
        terms = [(v, 1) for v in both[p]] + [(variable, -1)]
        ilp += pulp.LpAffineExpression(terms) == 0, f"row_{i}_{j}_{p}"
    for q, variable in enumerate(columns):
        terms = [(row[q], 1) for row in both] + [(variable, -1)]
        ilp += pulp.LpAffineExpression(terms) == 0, f"column_{i}_{j}_{q}"
    return [
        (both[p][q], float(matrix[p, q]))
        for p in range(len(rows))
        for q in range(len(columns))
        if matrix[p, q] != 0
    ]


def _scale(problem: PairwiseProblem) -> float:
    """Bring the largest cost to 1e4: solvers work with absolute tolerances."""
    arrays = (*problem.node_costs, *problem.edge_costs.values())
    largest = max(float(np.abs(array).max()) for array in arrays)
    return 1e4 / largest if largest > 0 else 1.0


def _lower_bound(ilp: pulp.LpProblem, scale: float) -> float:
    """The solver's dual bound, in unscaled cost."""
    return float(ilp.solverModel.getInfo().mip_dual_bound) / scale
