"""The solvers against brute force, and against each other."""

import numpy as np
import pytest

from launcher.autopar.solver import eliminate, solve
from launcher.autopar.solver.eliminate import plan_order, solve_by_elimination
from launcher.autopar.solver.problem import PairwiseProblem, brute_force
from launcher.autopar.solver.reduce import reduce
from launcher.autopar.solver.solve import _completed, solve_by_ilp


def random_problem(seed: int, *, nodes: int = 7, strategies: int = 4, density: float = 0.6):
    """A graph with costs of several scales, zeros and ties among them, as sharding problems have."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, strategies + 1, nodes)
    costs = tuple(rng.choice([0.0, 1.0, rng.random()], size) for size in sizes)
    edges = {
        (i, j): rng.random((sizes[i], sizes[j])) * rng.choice([0.0, 1.0, 10.0])
        for i in range(nodes)
        for j in range(i + 1, nodes)
        if rng.random() < density
    }
    return PairwiseProblem(costs, edges)


@pytest.mark.parametrize("seed", range(100))
def test_the_optimum_is_that_of_brute_force(seed):
    problem = random_problem(seed)
    best = brute_force(problem).cost
    for solution in (solve(problem), solve_by_elimination(problem, plan_order(problem))):
        assert solution.cost == pytest.approx(best, abs=1e-9)
        assert problem.cost(solution.choice) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(15))
def test_the_ilp_alone_finds_the_same_optimum_and_proves_it(seed):
    problem = random_problem(seed, nodes=6)
    solution = solve_by_ilp(problem)
    assert solution.cost == pytest.approx(brute_force(problem).cost, abs=1e-6)
    assert solution.gap_fraction <= 1e-4


@pytest.mark.parametrize("seed", range(40))
def test_reductions_keep_the_optimum_and_recover_a_choice(seed):
    problem = random_problem(seed, nodes=9, strategies=3, density=0.5)
    reduced = reduce(problem)
    rest, _ = reduced.rest()
    left = brute_force(rest) if rest.node_costs else brute_force(PairwiseProblem((), {}))
    completed = _completed(problem, reduced, left)
    assert completed.cost == pytest.approx(brute_force(problem).cost, abs=1e-9)
    assert reduced.constant + left.cost == pytest.approx(completed.cost, abs=1e-9)


def test_a_dense_graph_goes_to_the_ilp_and_still_meets_the_elimination(monkeypatch):
    problem = random_problem(3, nodes=8, density=1.0)
    expected = solve(problem).cost
    monkeypatch.setattr(eliminate, "_MOST_ENTRIES", 10)
    assert plan_order(problem) is None
    assert solve(problem).cost == pytest.approx(expected, abs=1e-6)


def test_a_long_chain_needs_tables_of_two_nodes_only():
    rng = np.random.default_rng(0)
    costs = tuple(rng.random(5) for _ in range(2000))
    edges = {(i, i + 1): rng.random((5, 5)) for i in range(1999)}
    problem = PairwiseProblem(costs, edges)
    best = costs[0]
    for i in range(1999):  # the Viterbi recursion, written independently
        best = (best[:, None] + edges[i, i + 1]).min(axis=0) + costs[i + 1]
    assert solve(problem).cost == pytest.approx(best.min())
