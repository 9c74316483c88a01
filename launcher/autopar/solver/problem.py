"""The problem that all sharding choices come down to, free of anything about tensors.

Each node picks one of its strategies. The objective is the sum of the picked node costs and, for every
edge, of the entry that the two picks select in its matrix (Alpa, section 4.2, equation 1).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PairwiseProblem:
    """`node_costs[i][p]` and `edge_costs[i, j][p, q]` with i < j; one matrix per pair of nodes."""

    node_costs: tuple[np.ndarray, ...]
    edge_costs: Mapping[Edge, np.ndarray]

    def cost(self, choice: Sequence[int]) -> float:
        """Price a given choice."""
        nodes = sum(float(costs[pick]) for costs, pick in zip(self.node_costs, choice, strict=True))
        edges = sum(
            float(matrix[choice[i], choice[j]]) for (i, j), matrix in self.edge_costs.items()
        )
        return nodes + edges


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, its cost, and a lower bound on every choice's cost (equal where proven optimal)."""

    choice: tuple[int, ...]
    cost: float
    lower_bound: float

    @property
    def gap_fraction(self) -> float:
        """How far from optimal the choice may be, relative to its cost."""
        return 0.0 if self.cost <= self.lower_bound else 1 - self.lower_bound / self.cost


def brute_force(problem: PairwiseProblem) -> Solution:
    """Try every choice; the oracle of the tests."""
    sizes = [range(len(costs)) for costs in problem.node_costs]
    best = min(itertools.product(*sizes), key=problem.cost)
    cost = problem.cost(best)
    return Solution(tuple(best), cost, cost)
