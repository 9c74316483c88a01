"""Memory over time against sums written out, point by point."""

import itertools

import numpy as np
import pytest

from launcher.autopar.solver.live_memory import Memory


def random_memory(seed: int):
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 6))
    usages = [rng.integers(0, 20, rng.integers(1, 4)) for _ in range(nodes)]
    begins = rng.integers(0, 12, nodes)
    intervals = np.stack((begins, begins + rng.integers(0, 8, nodes)), axis=1)
    return usages, intervals, int(rng.integers(0, 50))


def peak_by_points(usages, intervals, choice) -> int:
    return max(
        sum(
            int(use[pick])
            for use, (begin, end), pick in zip(usages, intervals, choice, strict=True)
            if begin <= point < end
        )
        for point in range(24)
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_choice_fits_exactly_if_no_point_exceeds_the_limit(seed):
    usages, intervals, limit = random_memory(seed)
    memory = Memory.of_intervals(usages, intervals, limit)
    tight = memory.tightened()
    least = min(
        peak_by_points(usages, intervals, choice)
        for choice in itertools.product(*(range(len(use)) for use in usages))
    )
    assert limit + memory.shortage <= least + 1e-9
    for choice in itertools.product(*(range(len(use)) for use in usages)):
        peak = peak_by_points(usages, intervals, choice)
        assert memory.used(choice).max(initial=0.0) == pytest.approx(peak)
        assert (memory.excess(choice) <= memory.tolerance) == (peak <= limit)
        assert (tight.excess(choice) <= tight.tolerance) == (peak <= limit)


def test_only_the_largest_live_sets_are_points():
    # Births at 0, 1, 2, deaths at 3, 4, 5: all three live from 2 to 3, and never more.
    memory = Memory.of_intervals([np.array([1])] * 3, np.array([[0, 3], [1, 4], [2, 5]]), 2)
    assert len(memory.room) == 1
    assert memory.excess((0, 0, 0)) == 1


def test_a_node_that_never_lives_takes_nothing():
    memory = Memory.of_intervals([np.array([9]), np.array([1])], np.array([[3, 3], [0, 2]]), 1)
    assert memory.excess((0, 0)) == 0
