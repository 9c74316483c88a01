"""Relaxations begun where others ended find the optimum, or say nothing."""

from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.solver import PairwiseProblem, Relaxations, solve
from launcher.autopar.solver.problem import brute_force


def at_other_costs(problem, seed: int):
    """A problem of the same shape, in which other strategies and pairs are forbidden."""
    rng = np.random.default_rng(seed)

    def other(costs: np.ndarray) -> np.ndarray:
        costs = np.asarray(costs, float)
        drawn = rng.uniform(0.0, 10.0, costs.shape)
        return np.where(rng.random(costs.shape) < 0.1, np.inf, drawn)

    edges = {edge: other(matrix) for edge, matrix in problem.edge_costs.items()}
    return replace(problem, node_costs=tuple(map(other, problem.node_costs)), edge_costs=edges)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_the_optimum_or_nothing_whatever_was_solved_before(random_problem, density):
    found = []
    for seed in range(20):
        relaxations = Relaxations()
        first = random_problem(seed, density=density)
        for problem in (first, *(at_other_costs(first, 10 * seed + k) for k in range(4)), first):
            solution = relaxations.solve(problem)
            found.append(solution is not None)
            if solution is not None:
                best = brute_force(problem).cost
                assert problem.cost(solution.choice) == pytest.approx(best, abs=1e-6)
                assert solution.lower_bound <= best + 1e-6
    assert sum(found) > 30


def test_a_triangle_that_nobody_can_please_has_no_whole_optimum():
    differ = np.eye(2)  # neighbours want to differ, and there are two colours for three of them
    triangle = PairwiseProblem((np.zeros(2),) * 3, {(0, 1): differ, (0, 2): differ, (1, 2): differ})
    assert Relaxations().solve(triangle) is None
    assert solve(triangle).cost == pytest.approx(1.0)


def test_shapes_that_were_solved_long_ago_are_solved_again(random_problem):
    relaxations = Relaxations()
    problems = [
        random_problem(seed, nodes=4 + seed % 5, strategies=2 + seed % 4) for seed in range(60)
    ]
    for problem in problems + problems:
        solution = relaxations.solve(problem)
        if solution is not None:
            assert solution.cost == pytest.approx(brute_force(problem).cost, abs=1e-6)
