"""Random problems for the tests of the solver, small enough for brute force."""

from collections.abc import Callable

import numpy as np
import pytest

from launcher.autopar.solver import Memory, PairwiseProblem


@pytest.fixture(scope="session")
def random_problem() -> Callable[..., PairwiseProblem]:
    """A function from a seed to a problem."""
    return _random_problem


def _random_problem(
    seed: int,
    *,
    nodes: int = 7,
    strategies: int = 4,
    density: float = 0.6,
    forbidden: float = 0.0,
    memory: bool = False,
) -> PairwiseProblem:
    """A graph with costs of several scales, zeros and ties among them, as sharding problems have.

    Args:
        forbidden: The share of pairs that are forbidden; whole followers come with it.
        memory: With a limit that the cheapest choice often exceeds.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, strategies + 1, nodes)
    costs = [rng.choice([0.0, 1.0, rng.random()], size) for size in sizes]
    edges = {
        (i, j): rng.random((sizes[i], sizes[j])) * rng.choice([0.0, 1.0, 10.0])
        for i in range(nodes)
        for j in range(i + 1, nodes)
        if rng.random() < density
    }
    for matrix in edges.values():
        _forbid(matrix, rng, forbidden)
    if not memory:
        return PairwiseProblem(tuple(costs), edges)
    usages = [rng.integers(0, 9, size) for size in sizes]
    begins = rng.integers(0, 9, nodes)
    intervals = np.stack((begins, begins + rng.integers(0, 7, nodes)), axis=1)
    least = _peak(usages, intervals, np.min)
    limit = least + rng.choice([0.0, 0.2, 0.5]) * (_peak(usages, intervals, np.max) - least)
    return PairwiseProblem(tuple(costs), edges, Memory.of_intervals(usages, intervals, int(limit)))


def _forbid(matrix: np.ndarray, rng: np.random.Generator, share: float) -> None:
    """Forbid entries, or all but one answer to each row: a follower."""
    if not share:
        return
    if rng.random() < share:
        answers = rng.integers(matrix.shape[1], size=len(matrix))
        kept = matrix[np.arange(len(matrix)), answers]
        matrix[:] = np.inf
        matrix[np.arange(len(matrix)), answers] = kept
    else:
        matrix[rng.random(matrix.shape) < share / 2] = np.inf


def _peak(usages, intervals, extreme) -> float:
    """The largest use at any point, every node taking its extreme."""
    return max(
        sum(
            extreme(use)
            for use, (begin, end) in zip(usages, intervals, strict=True)
            if begin <= t < end
        )
        for t in range(20)
    )
