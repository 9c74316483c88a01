"""The solvers of a pairwise problem, the exact and cheap ones first.

    1. eliminate.py                 dynamic programming, where that is a matter of moments
    2. relaxation.py                for a planner, the relaxation of the ILP, if small and its optimum whole
    3. reduce.py, followers.py      exact reductions, with the memory limit
    4. eliminate.py                 of what they leave, as soon as the graph is thin
    5. ilp.py                       the ILP in its tight form, where it is small
    6. messages.py, eliminate.py    a lower bound, and elimination of what it does not rule out
    7. ilp.py                       the ILP again, where it is not too large
    8. messages.py, prices.py       a lower bound, and a first choice
    9. ilp.py                       on the strategies that the bound leaves possible
   10. neighbourhoods.py            large-neighbourhood search, in turns with 9, until time is up

Problems with a memory limit take 3, 8, 9 and 10. Whatever ends it, there is a choice and a bound on how much
better another could be.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.solver.eliminate import plan_order, solve_by_elimination
from launcher.autopar.solver.flat import FlatProblem
from launcher.autopar.solver.followers import merge_followers
from launcher.autopar.solver.ilp import solve_by_ilp
from launcher.autopar.solver.messages import Messages
from launcher.autopar.solver.neighbourhoods import Search
from launcher.autopar.solver.prices import ascend
from launcher.autopar.solver.problem import PairwiseProblem, Solution, Stage
from launcher.autopar.solver.reduce import reduce
from launcher.autopar.solver.relaxation import Relaxations
from launcher.autopar.solver.restarts import Restarts
from launcher.errors import InfeasiblePlanError

log = logging.getLogger(__name__)

METHODS = ("auto", "ilp_highs", "ilp_cbc", "search")
_MOST_ROUNDS = 6  # of reductions
_ILP_ENTRIES = 150_000  # edge variables that the ILP takes on without a limit on memory
_ILP_ENTRIES_IN_MEMORY = 80_000
_QUICK_ENTRIES = 3_000_000  # of an elimination's tables: some hundredths of a second
_ENTRIES = 30_000_000  # where the reductions have nothing left to do
_BOUND_ROUNDS, _SWEEPS = 20, 15  # of the bound that goes before an elimination
_THIN_ENTRIES = 60_000  # edge entries left by the bound, for an elimination
_WORTH_ANOTHER_LOOK = 0.7  # of the entries at the last look
_SMALL_ILP_ENTRIES = 25_000  # edge variables that the ILP settles sooner than the bound
_RELAXED_ENTRIES = 80_000  # edge variables that the relaxation settles in some tenths of a second
_BOUND_FRACTIONS = (0.3, 0.45)  # of the time left: for the bound, and for first choices as well
_REDUCED_ONCE = 500_000  # edge entries: from here on a second round takes longer than it is worth
_ILP_FRACTION = 0.5  # of the time left, for an ILP between searches
_WORTH_ANOTHER_ILP = 0.7  # of the size of the last one
_SEARCH_S = 10.0  # of search before another look at what is possible


@dataclass(frozen=True, slots=True)
class Simplified:
    """What the exact reductions leave, the way back, and the sizes on the way."""

    problem: PairwiseProblem
    expand: Callable[[Sequence[int]], tuple[int, ...]]
    stages: tuple[Stage, ...]

    def then(self, more: "Simplified") -> "Simplified":
        """This one, simplified further."""

        def expand(choice: Sequence[int]) -> tuple[int, ...]:
            return self.expand(more.expand(choice))

        return Simplified(more.problem, expand, self.stages + more.stages[1:])


def solve(
    problem: PairwiseProblem, *, time_limit_s: float = 60.0, method: str = "auto",
    relaxations: Relaxations | None = None,
) -> Solution:  # fmt: skip
    """Return a choice of least cost, with a bound; proven optimal unless time ran out.

    Args:
        relaxations: those of problems like this one; without any, its own is not tried. For costs of one
            scale: HiGHS has absolute tolerances.

    Raises InfeasiblePlanError where no choice is allowed.
    """
    end_s = time.monotonic() + time_limit_s
    if method == "auto" and problem.memory is None:
        order = plan_order(problem, most_entries=_QUICK_ENTRIES)
        if order is not None:
            return _allowed(replace(solve_by_elimination(problem, order), method="elimination"))
        if relaxations is not None and problem.size().edge_entries <= _RELAXED_ENTRIES:
            solution = relaxations.solve(problem)
            if solution is not None:
                return solution
        simple = _reduce_once(problem)
        if plan_order(simple.problem, most_entries=_ENTRIES) is None:
            simple = simple.then(simplify(simple.problem))
    else:
        simple = simplify(problem)
    solution = _allowed(_solve_rest(simple.problem, end_s, method))
    choice = simple.expand(solution.choice)
    cost = problem.cost(choice)
    assert problem.fits(choice), "a reduction lost bytes"
    bound = cost - (solution.cost - solution.lower_bound)
    return Solution(choice, cost, bound, solution.method, simple.stages + solution.stages)


def _allowed(solution: Solution) -> Solution:
    """The solution, unless its choice is forbidden, as then all choices are."""
    if np.isfinite(solution.cost):
        return solution
    raise InfeasiblePlanError(
        "no choice is allowed: forbidden costs rule out all; allow some pairs"
    )


def simplify(problem: PairwiseProblem) -> Simplified:
    """Apply the exact reductions until none applies."""
    stages = [Stage("as given", problem.size())]
    ways: list[Callable[[Sequence[int]], tuple[int, ...]]] = []
    for _ in range(_MOST_ROUNDS):
        before = problem.size()
        merged = merge_followers(problem)
        stages.append(Stage("followers merged", merged.problem.size()))
        reduced = reduce(merged.problem)
        ways += [merged.expand, _expansion(reduced, len(merged.problem.node_costs))]
        problem, _ = reduced.rest()
        stages.append(Stage("reduced", problem.size()))
        if problem.size() in (before, merged.problem.size()) or not _is_worth_another(problem):
            break

    def expand(choice: Sequence[int]) -> tuple[int, ...]:
        for way in reversed(ways):
            choice = way(choice)
        return tuple(choice)

    return Simplified(problem, expand, tuple(stages))


def _reduce_once(problem: PairwiseProblem) -> Simplified:
    reduced = reduce(problem)
    rest, _ = reduced.rest()
    stages = Stage("as given", problem.size()), Stage("reduced", rest.size())
    return Simplified(rest, _expansion(reduced, len(problem.node_costs)), stages)


def _is_worth_another(problem: PairwiseProblem) -> bool:
    """Whether another round of reductions may find more in little time."""
    return problem.size().edge_entries < _REDUCED_ONCE or not all(
        np.isfinite(matrix).all() for matrix in problem.edge_costs.values()
    )


def _expansion(reduced, num_nodes: int) -> Callable[[Sequence[int]], tuple[int, ...]]:
    return lambda choice: reduced.expand(choice, num_nodes)


def _solve_rest(problem: PairwiseProblem, end_s: float, method: str) -> Solution:
    """Solve what is left of a problem by the first way that suits it."""
    left_s = end_s - time.monotonic()
    if not problem.node_costs:
        return Solution((), 0.0, 0.0, "reductions")
    if method.startswith("ilp_"):
        return _by_ilp(problem, left_s, method.removeprefix("ilp_"))
    if method == "auto" and problem.memory is None:
        order = plan_order(problem, most_entries=_ENTRIES)
        if order is not None:
            return replace(solve_by_elimination(problem, order), method="elimination")
        is_small = problem.size().edge_entries <= _SMALL_ILP_ENTRIES
        solution = None if is_small else _by_bound_and_elimination(problem, end_s)
        if solution is not None:
            return solution
        if problem.size().edge_entries <= _ILP_ENTRIES:
            return _by_ilp(problem, end_s - time.monotonic(), "highs")
    return _by_bound_and_search(problem, end_s)


def _by_bound_and_elimination(problem: PairwiseProblem, end_s: float) -> Solution | None:
    """Bound, drop what the bound rules out, and eliminate the rest, once it is thin enough; exact.

    A sharding problem's bound comes close to its optimum within some dozen sweeps, and then rules out
    nearly everything. None where it does not; out of time, the best choice met, with the bound.
    """
    flat = FlatProblem(problem)
    messages = Messages(flat)
    best, cost, tried = None, np.inf, _THIN_ENTRIES
    for _ in range(_BOUND_ROUNDS):
        for _ in range(_SWEEPS):
            base = messages.sweep(flat.costs)
        choice = tuple(messages.rounded(flat.costs, within_room=False).tolist())
        if problem.cost(choice) < cost:
            best, cost = choice, problem.cost(choice)
        if time.monotonic() > end_s:
            return None if best is None else Solution(best, cost, min(base, cost), "bound")
        mask = messages.excess(flat.costs) <= cost - base + _slack(cost)
        entries = _possible_entries(flat, mask)
        if not np.isfinite(cost) or entries > tried:
            continue
        tried = entries * _WORTH_ANOTHER_LOOK
        possible = simplify(_restricted(problem, mask))
        order = plan_order(possible.problem, most_entries=_QUICK_ENTRIES)
        if order is not None:
            solution = solve_by_elimination(possible.problem, order)
            choice = possible.expand(solution.choice)
            cost = problem.cost(choice)
            stage = Stage("possible by the bound", possible.problem.size())
            return Solution(choice, cost, cost, "bound and elimination", (stage,))
    return None


def _by_ilp(problem: PairwiseProblem, time_limit_s: float, solver: str) -> Solution:
    solution = solve_by_ilp(problem, time_limit_s=time_limit_s, solver=solver)
    if solution is None and problem.memory is None:
        solution = _rounded(problem)
    if solution is None:
        raise InfeasiblePlanError(
            f"no choice was found within {time_limit_s:.0f} s: raise the time limit or the memory limit"
        )
    return replace(solution, method=f"ilp ({solver})")


def _rounded(problem: PairwiseProblem) -> Solution | None:
    """Some choice, with a bound: what is left when time is up."""
    flat = FlatProblem(problem)
    messages = Messages(flat)
    for _ in range(_SWEEPS):
        bound = messages.sweep(flat.costs)
    choice = tuple(messages.rounded(flat.costs, within_room=False).tolist())
    cost = problem.cost(choice)
    return Solution(choice, cost, min(bound, cost)) if np.isfinite(cost) else None


def _by_bound_and_search(problem: PairwiseProblem, end_s: float) -> Solution:
    """Bound first; then, in turns, the ILP on what the bound leaves possible, and the search."""
    flat = FlatProblem(problem)
    messages = Messages(flat)
    now_s = time.monotonic()
    bound_s, settled_s = (now_s + share * (end_s - now_s) for share in _BOUND_FRACTIONS)
    bound = ascend(
        flat, messages, lambda: time.monotonic() > bound_s, lambda: time.monotonic() > settled_s
    )
    if bound.choice is None:
        return _by_ilp(problem, end_s - time.monotonic(), "highs")
    base = messages.sweep(bound.costs) - float(bound.prices @ flat.room)
    excess = messages.excess(bound.costs)
    log.info("bound %.6g, first choice %.6g", bound.value, bound.cost)
    search = Search(flat, bound.choice, bound.costs, excess, bound.value)
    restarts = Restarts(search, messages, bound, excess)
    stages, tried = (), _ILP_ENTRIES_IN_MEMORY
    while time.monotonic() < end_s and not search.is_done:
        mask = excess <= search.cost - base + _slack(search.cost)
        entries = _possible_entries(flat, mask)
        if entries <= tried:
            possible = simplify(_restricted(problem, mask))
            stages = (Stage("possible by the bound", possible.problem.size()),)
            if _ilp_on_possible(possible, search, end_s):
                break
            tried = entries * _WORTH_ANOTHER_ILP
        restarts.improve(min(end_s, time.monotonic() + _SEARCH_S))
        log.info("choice %.6g, %.4f %% above the bound", search.cost, 100 * search.gap_fraction)
    choice = tuple(search.choice.tolist())
    cost = problem.cost(choice)
    return Solution(choice, cost, min(cost, search.bound), "bound and search", stages)


def _possible_entries(flat: FlatProblem, mask: np.ndarray) -> int:
    """The edge variables of an ILP over some strategies, before it is reduced."""
    kept = np.add.reduceat(mask, flat.offsets[:-1]).tolist()
    return sum(kept[i] * kept[j] for i, j in flat.problem.edge_costs)


def _slack(cost: float) -> float:
    """So that rounding never rules out the choice at hand."""
    return 1e-9 * abs(cost)


def _restricted(problem: PairwiseProblem, possible: np.ndarray) -> PairwiseProblem:
    """The problem with impossible strategies forbidden; all strategies in one row."""
    ends = np.cumsum([len(costs) for costs in problem.node_costs])
    masks = np.split(possible, ends[:-1])
    costs = tuple(
        np.where(mask, costs, np.inf) for mask, costs in zip(masks, problem.node_costs, strict=True)
    )
    return replace(problem, node_costs=costs)


def _ilp_on_possible(possible: Simplified, search: Search, end_s: float) -> bool:
    """Improve the choice or the bound by the ILP over what is possible; True if that settled it.

    Every choice cheaper than the present one is among the possible ones.
    """
    if not possible.problem.node_costs:
        search.adopt(possible.expand(()))
        search.bound = search.cost
        return True
    limit_s = _ILP_FRACTION * (end_s - time.monotonic())
    solution = solve_by_ilp(possible.problem, time_limit_s=limit_s)
    if solution is None:
        return False
    search.adopt(choice := possible.expand(solution.choice))
    gap = search.problem.cost(choice) - (solution.cost - solution.lower_bound)
    search.bound = max(search.bound, min(search.cost, gap))
    return solution.is_proven
