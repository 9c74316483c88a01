"""A pairwise problem laid out for methods that look at single nodes many thousand times.

All strategies of all nodes stand in one row (`offsets[i]` begins node i), and so do all changes of memory
(`events`), so that pricing memory and adding it up are single array operations.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from launcher.autopar.solver.live_memory import Memory
from launcher.autopar.solver.problem import PairwiseProblem


class FlatProblem:
    """Read-only; `neighbours[i][j]` is the matrix of the edge with node i's strategies first."""

    def __init__(self, problem: PairwiseProblem):
        self.problem = problem
        self.sizes = np.array([len(costs) for costs in problem.node_costs], np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(self.sizes)))
        self.costs = np.concatenate([np.asarray(c, np.float64) for c in problem.node_costs])
        self.neighbours: list[dict[int, np.ndarray]] = [{} for _ in self.sizes]
        for (i, j), matrix in problem.edge_costs.items():
            self.neighbours[i][j], self.neighbours[j][i] = matrix, matrix.T
        self.memory = problem.memory
        self.levels = [None] * len(self.sizes)
        self.room = np.zeros(0)
        if self.memory is not None:
            self.room = self.memory.room
            self._lay_out_memory(self.memory)

    def _lay_out_memory(self, memory: Memory) -> None:
        used = [(i, use) for i, use in enumerate(memory.uses) if use is not None]
        self.levels = [None if use is None else use.levels() for use in memory.uses]
        strategies, times, changes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
        for node, use in used:
            event, strategy = np.nonzero(use.change)
            strategies.append(self.offsets[node] + strategy)
            times.append(use.times[event])
            changes.append(use.change[event, strategy])
        self._event_strategy = np.concatenate(strategies)
        self._event_time = np.concatenate(times)
        self._event_change = np.concatenate(changes)

    def with_prices(self, prices: np.ndarray) -> np.ndarray:
        """The costs of all strategies, every byte at point t costing `prices[t]`."""
        if not len(prices):
            return self.costs
        from_here_on = np.cumsum(prices[::-1])[::-1]
        weights = self._event_change * from_here_on[self._event_time]
        return self.costs + np.bincount(
            self._event_strategy, weights=weights, minlength=len(self.costs)
        )

    def used(self, choice: np.ndarray) -> np.ndarray:
        """Bytes taken at each point."""
        if not len(self.room):
            return self.room
        is_picked = np.zeros(len(self.costs), bool)
        is_picked[self.offsets[:-1] + choice] = True
        events = is_picked[self._event_strategy]
        change = np.bincount(
            self._event_time[events], self._event_change[events], minlength=len(self.room)
        )
        return change.cumsum()

    def fits(self, used: np.ndarray) -> bool:
        return self.memory is None or bool((used <= self.room + self.memory.tolerance).all())

    def cost_at(self, node: int, choice: Sequence[int]) -> np.ndarray:
        """What each strategy of a node costs while its neighbours stay."""
        costs = self.costs[self.offsets[node] : self.offsets[node + 1]].copy()
        for other, matrix in self.neighbours[node].items():
            costs += matrix[:, choice[other]]
        return costs

    def change_of_cost(self, choice: np.ndarray, picks: Mapping[int, int]) -> float:
        """What new picks of some nodes would change, the others staying."""
        change = 0.0
        for node, pick in picks.items():
            offset, old = self.offsets[node], choice[node]
            change += self.costs[offset + pick] - self.costs[offset + old]
            for other, matrix in self.neighbours[node].items():
                if other not in picks:
                    change += matrix[pick, choice[other]] - matrix[old, choice[other]]
                elif node < other:
                    change += matrix[pick, picks[other]] - matrix[old, choice[other]]
        return float(change)
