"""The solvers against brute force, and against each other."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from launcher.autopar.solver import Memory, PairwiseProblem, simplify, solve
from launcher.autopar.solver.eliminate import plan_order, solve_by_elimination
from launcher.autopar.solver.ilp import solve_by_ilp
from launcher.autopar.solver.problem import brute_force
from launcher.errors import InfeasiblePlanError

NEAR = 1e-6  # the solvers' own tolerance


def assert_no_regret(problem: PairwiseProblem, method: str) -> bool:
    """Compare with brute force; whether there was a choice at all."""
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasiblePlanError):
            solve(problem, time_limit_s=5, method=method)
        return False
    solution = solve(problem, time_limit_s=5, method=method)
    assert problem.fits(solution.choice)
    assert problem.cost(solution.choice) == pytest.approx(best.cost, rel=NEAR, abs=NEAR)
    assert solution.cost == pytest.approx(problem.cost(solution.choice))
    assert solution.lower_bound <= best.cost + NEAR
    assert solution.gap_fraction <= 1e-3 or solution.cost < NEAR
    return True


@pytest.mark.parametrize("seed", range(100))
def test_the_optimum_is_that_of_brute_force(random_problem, seed):
    problem = random_problem(seed)
    best = brute_force(problem).cost
    order = plan_order(problem, most_entries=np.inf)
    for solution in (solve(problem), solve_by_elimination(problem, order)):
        assert solution.cost == pytest.approx(best, abs=1e-9)
        assert problem.cost(solution.choice) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("forbidden", [0.0, 0.4])
def test_no_regret_with_memory_and_forbidden_pairs(random_problem, seed, forbidden):
    problem = random_problem(seed, nodes=6, strategies=3, forbidden=forbidden, memory=True)
    assert_no_regret(problem, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "ilp_highs", "search"])
def test_no_regret_on_many_graphs(random_problem, method):
    allowed = 0
    for seed in range(1000, 2000):
        problem = random_problem(
            seed,
            nodes=5 + seed % 4,
            strategies=2 + seed % 3,
            density=0.4 + 0.1 * (seed % 5),
            forbidden=0.2 * (seed % 3),
            memory=seed % 4 > 0,
        )
        allowed += assert_no_regret(problem, method)
    assert allowed > 500


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", ["ilp_highs", "ilp_cbc", "search"])
def test_every_method_finds_the_same_optimum(random_problem, seed, method):
    assert_no_regret(random_problem(seed, nodes=6, density=0.9, memory=True), method)


@pytest.mark.parametrize("seed", range(15))
def test_the_ilp_alone_finds_the_same_optimum_and_proves_it(random_problem, seed):
    problem = random_problem(seed, nodes=6)
    solution = solve_by_ilp(problem)
    assert solution.cost == pytest.approx(brute_force(problem).cost, abs=1e-6)
    assert solution.gap_fraction <= 1e-4


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_reductions_keep_the_optimum_and_recover_a_choice(random_problem, seed, memory):
    problem = random_problem(seed, nodes=8, strategies=3, density=0.5, forbidden=0.2, memory=memory)
    best = brute_force(problem)
    if best is None:
        return
    simple = simplify(problem)
    left = brute_force(simple.problem)
    choice = simple.expand(left.choice)
    assert problem.fits(choice)
    assert problem.cost(choice) == pytest.approx(best.cost, abs=1e-9)
    sizes = [stage.size.strategies for stage in simple.stages]
    assert sizes == sorted(sizes, reverse=True)


def test_a_follower_is_merged_and_its_memory_goes_with_it():
    follows = np.where(np.eye(2) > 0, 0.0, np.inf)
    memory = Memory.of_intervals(
        [np.array([0, 3])] * 2, np.array([[0, 2], [1, 3]]), limit=5
    )  # both take 3 at point 1 with the cheap strategy: 6
    problem = PairwiseProblem((np.array([9.0, 0.0]),) * 2, {(0, 1): follows}, memory)
    assert solve(problem).choice == (0, 0)
    assert solve(replace(problem, memory=None)).choice == (1, 1)


@pytest.mark.parametrize("method", ["auto", "ilp_highs", "ilp_cbc"])
def test_a_single_byte_too_many_is_too_many(method):
    # Each pair of dear strategies takes 1 byte of 10^9 more than there is: below solvers' tolerance.
    usages = [np.array([0, 500_000_001]), np.array([0, 499_999_999, 500_000_000])]
    memory = Memory.of_intervals(usages, np.array([[0, 2], [1, 3]]), limit=1_000_000_000)
    costs = (np.array([5.0, 0.0]), np.array([5.0, 2.0, 0.0]))
    link = {(0, 1): np.array([[1.0, 2.0, 0.5], [0.25, 0.0, 0.0]])}
    problem = PairwiseProblem(costs, link, memory)
    assert solve(problem, method=method).cost == brute_force(problem).cost == 2.0
    assert solve_by_ilp(problem, solver="highs").choice == (1, 1)


def test_twins_are_folded():
    rng = np.random.default_rng(0)
    hub = {(i, j): rng.random((3, 3)) for i in range(4) for j in range(i + 1, 4)}
    twin = [rng.random((3, 3)) for _ in range(4)]
    for copy in range(5):
        hub.update({(i, 4 + copy): twin[i] for i in range(4)})
    problem = PairwiseProblem(tuple(np.zeros(3) for _ in range(9)), hub)
    simple = simplify(problem)
    assert simple.problem.size().nodes <= 5
    choice = simple.expand(brute_force(simple.problem).choice)
    assert problem.cost(choice) == pytest.approx(brute_force(problem).cost)
    assert len(set(choice[4:])) == 1


def test_a_dense_graph_goes_to_the_ilp_and_still_meets_the_elimination(random_problem, monkeypatch):
    problem = random_problem(3, nodes=9, strategies=9, density=1.0)
    expected = solve(problem).cost
    solve_module = importlib.import_module("launcher.autopar.solver.solve")
    for name, entries in {"_QUICK_ENTRIES": 10, "_ENTRIES": 10}.items():
        monkeypatch.setattr(solve_module, name, entries)
    solution = solve(problem)
    assert solution.cost == pytest.approx(expected, abs=1e-6)
    assert solution.method == "ilp (highs)"


def test_tables_are_counted_before_they_are_made():
    """A chain of 5 nodes with 3 strategies: four tables of two nodes and one of the last node."""
    chain = {(i, i + 1): np.ones((3, 3)) for i in range(4)}
    problem = PairwiseProblem((np.zeros(3),) * 5, chain)
    entries = 4 * 3**2 + 3
    assert plan_order(problem, most_entries=entries * (1 + 1e-9)) is not None
    assert plan_order(problem, most_entries=entries - 1) is None


def test_bound_and_elimination_finds_the_optimum(random_problem, monkeypatch):
    solve_module = importlib.import_module("launcher.autopar.solver.solve")
    for name, entries in {"_QUICK_ENTRIES": 30, "_ENTRIES": 10, "_SMALL_ILP_ENTRIES": 0}.items():
        monkeypatch.setattr(solve_module, name, entries)
    methods = []
    for seed in range(60):
        problem = random_problem(seed, density=1.0)
        best = brute_force(problem).cost
        solution = solve(problem)
        assert problem.cost(solution.choice) == pytest.approx(best, abs=1e-6)
        assert solution.lower_bound <= best + 1e-6
        hurried = solve(problem, time_limit_s=0.0)
        assert hurried.lower_bound - 1e-6 <= best <= problem.cost(hurried.choice) + 1e-6
        methods += [solution.method, hurried.method]
    assert methods.count("bound and elimination") > 20
    assert methods.count("bound") > 20


def test_a_long_chain_needs_tables_of_two_nodes_only():
    rng = np.random.default_rng(0)
    costs = tuple(rng.random(5) for _ in range(2000))
    edges = {(i, i + 1): rng.random((5, 5)) for i in range(1999)}
    problem = PairwiseProblem(costs, edges)
    best = costs[0]
    for i in range(1999):  # the Viterbi recursion, written independently
        best = (best[:, None] + edges[i, i + 1]).min(axis=0) + costs[i + 1]
    assert solve(problem).cost == pytest.approx(best.min())


def test_out_of_time_there_is_still_a_choice_with_its_gap(random_problem):
    problem = random_problem(5, nodes=60, strategies=6, density=0.3, memory=True)
    solution = solve(problem, time_limit_s=0.0, method="search")
    assert problem.fits(solution.choice)
    assert solution.lower_bound <= solution.cost
