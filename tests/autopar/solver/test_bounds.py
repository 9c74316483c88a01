"""Bounds, prices and the search: never above the optimum, never a choice that does not fit."""

import time

import numpy as np
import pytest

from launcher.autopar.solver import PairwiseProblem, solve
from launcher.autopar.solver.flat import FlatProblem
from launcher.autopar.solver.messages import Messages
from launcher.autopar.solver.neighbourhoods import Search
from launcher.autopar.solver.prices import ascend
from launcher.autopar.solver.problem import brute_force


@pytest.mark.parametrize("seed", range(30))
def test_sweeps_raise_a_bound_that_stays_below_the_optimum(random_problem, seed):
    problem = random_problem(seed, density=0.8)
    flat = FlatProblem(problem)
    messages = Messages(flat)
    bounds = [messages.sweep(flat.costs) for _ in range(20)]
    best = brute_force(problem)
    assert bounds == pytest.approx(sorted(bounds), abs=1e-9)
    assert bounds[-1] <= best.cost + 1e-9
    excess = messages.excess(flat.costs)
    needed = excess[flat.offsets[:-1] + np.array(best.choice)]
    assert (bounds[-1] + needed <= best.cost + 1e-9).all()


def test_on_a_tree_the_bound_is_the_optimum():
    rng = np.random.default_rng(1)
    edges = {(int(rng.integers(i)), i): rng.random((3, 3)) for i in range(1, 40)}
    problem = PairwiseProblem(tuple(rng.random(3) for _ in range(40)), edges)
    messages = Messages(flat := FlatProblem(problem))
    for _ in range(60):
        bound = messages.sweep(flat.costs)
    assert bound == pytest.approx(solve(problem).cost, rel=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_prices_give_a_bound_and_choices_that_fit(random_problem, seed):
    problem = random_problem(seed, memory=True)
    best = brute_force(problem)
    if best is None:
        return
    flat = FlatProblem(problem)
    end_s = time.monotonic() + 0.2
    bound = ascend(flat, Messages(flat), lambda: time.monotonic() > end_s, lambda: False)
    assert bound.value <= best.cost + 1e-9
    if bound.choice is not None:
        assert problem.fits(bound.choice)
        assert bound.cost == pytest.approx(problem.cost(bound.choice))
        assert bound.cost >= best.cost - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_search_only_improves_and_always_fits(random_problem, seed):
    problem = random_problem(seed, nodes=40, strategies=5, density=0.15, memory=True)
    flat = FlatProblem(problem)
    messages = Messages(flat)
    bound = ascend(flat, messages, lambda: True, lambda: True)
    assert bound.choice is not None
    search = Search(flat, bound.choice, bound.costs, messages.excess(bound.costs), bound.value)
    search.run(time.monotonic() + 1.0)
    assert search.cost <= bound.cost
    assert search.cost == pytest.approx(problem.cost(search.choice))
    assert problem.fits(search.choice)


@pytest.mark.parametrize("seed", range(20))
def test_the_flat_layout_prices_as_the_problem_does(random_problem, seed):
    problem = random_problem(seed, memory=True)
    flat = FlatProblem(problem)
    rng = np.random.default_rng(seed)
    old = np.array([rng.integers(len(costs)) for costs in problem.node_costs])
    new = np.array([rng.integers(len(costs)) for costs in problem.node_costs])
    picks = {node: int(new[node]) for node in (0, 2, 3)}
    moved = old.copy()
    moved[list(picks)] = list(picks.values())
    change = problem.cost(moved) - problem.cost(old)
    assert flat.change_of_cost(old, picks) == pytest.approx(change)
    np.testing.assert_allclose(flat.used(old), problem.memory.used(old))
    prices = rng.random(len(flat.room))
    priced = flat.with_prices(prices)[flat.offsets[:-1] + old].sum()
    plain = flat.costs[flat.offsets[:-1] + old].sum()
    assert priced - plain == pytest.approx(prices @ problem.memory.used(old))
