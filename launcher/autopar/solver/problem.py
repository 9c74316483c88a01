"""The problem that all sharding choices come down to, free of anything about tensors.

Each node picks one of its strategies. The objective is the sum of the picked node costs and, for every
edge, of the entry that the two picks select in its matrix (Alpa, section 4.2, equation 1). An infinite
cost forbids. Where there is a memory limit, the picks must fit at every point of time (the problem of the
ASPLOS 2025 contest on intra-operator parallelism).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.solver.live_memory import Memory

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PairwiseProblem:
    """`node_costs[i][p]` and `edge_costs[i, j][p, q]` with i < j; one matrix per pair of nodes."""

    node_costs: tuple[np.ndarray, ...]
    edge_costs: Mapping[Edge, np.ndarray]
    memory: Memory | None = None

    def cost(self, choice: Sequence[int]) -> float:
        """Price a given choice."""
        nodes = sum(float(costs[pick]) for costs, pick in zip(self.node_costs, choice, strict=True))
        edges = sum(
            float(matrix[choice[i], choice[j]]) for (i, j), matrix in self.edge_costs.items()
        )
        return nodes + edges

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps the memory limit."""
        return self.memory is None or self.memory.excess(choice) <= self.memory.tolerance

    def size(self) -> "ProblemSize":
        """What an ILP of this problem would count."""
        return ProblemSize(
            nodes=len(self.node_costs),
            strategies=sum(len(costs) for costs in self.node_costs),
            edges=len(self.edge_costs),
            edge_entries=sum(matrix.size for matrix in self.edge_costs.values()),
            memory_points=0 if self.memory is None else len(self.memory.room),
        )


@dataclass(frozen=True, slots=True)
class ProblemSize:
    """Nodes, binary variables, edges, continuous variables, and points of time with a limit."""

    nodes: int
    strategies: int
    edges: int
    edge_entries: int
    memory_points: int


@dataclass(frozen=True, slots=True)
class Stage:
    """The size of a problem after one step of its solution."""

    name: str
    size: ProblemSize


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, its cost, and a lower bound on every choice's cost (equal where proven optimal)."""

    choice: tuple[int, ...]
    cost: float
    lower_bound: float
    method: str = ""
    stages: tuple[Stage, ...] = ()

    @property
    def gap_fraction(self) -> float:
        """How far from optimal the choice may be, relative to its cost."""
        return 0.0 if self.cost <= self.lower_bound else 1 - self.lower_bound / self.cost

    @property
    def is_proven(self) -> bool:
        """Whether no choice is better, up to the solver's tolerance."""
        return self.gap_fraction <= PROVEN_GAP_FRACTION


PROVEN_GAP_FRACTION = 2e-6


def brute_force(problem: PairwiseProblem) -> Solution | None:
    """Try every choice; the oracle of the tests. None where no choice is allowed."""
    sizes = [range(len(costs)) for costs in problem.node_costs]
    choices = (choice for choice in itertools.product(*sizes) if problem.fits(choice))
    best = min(choices, key=problem.cost, default=None)
    if best is None or not np.isfinite(cost := problem.cost(best)):
        return None
    return Solution(tuple(best), cost, cost)
