"""A lower bound by sequential tree-reweighted message passing (TRW-S; Kolmogorov, TPAMI 2006, section 4).

The graph is covered by chains along the order of the nodes. Messages move costs along the edges until
every chain's own optimum is as high as it gets; their sum is the bound, that of the local polytope where
it converges (it may stop short: coordinate ascent). One sweep forward and one back never lower it.

What the costs look like after a sweep says which strategies are worth a look: `excess` is how much the
bound would rise if a strategy had to be taken. A strategy whose excess goes past a known solution's cost is
in no better solution.
"""

from dataclasses import dataclass

import numpy as np

from launcher.autopar.solver.flat import FlatProblem
from launcher.autopar.solver.live_memory import LiveUse


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """All edges from a node to later nodes, or to earlier ones, side by side."""

    matrix: np.ndarray  # (strategies of all targets, own strategies)
    edge: np.ndarray  # for each row: which of the node's incoming messages belongs to it
    target: np.ndarray  # for each row: where its message lies
    first: np.ndarray  # the first row of each edge
    number: np.ndarray  # for each row: the number of its edge in `first`


class Messages:
    """The messages of one problem; each sweep goes over all nodes once."""

    def __init__(self, flat: FlatProblem):
        self._flat = flat
        self._others = [sorted(edges) for edges in flat.neighbours]
        degrees = np.array([len(others) for others in self._others], np.int64)
        self._begin = np.concatenate(([0], np.cumsum(degrees * flat.sizes))).tolist()
        self._all = np.zeros(self._begin[-1])
        row = [{other: n for n, other in enumerate(others)} for others in self._others]
        self._earlier = [sum(j < i for j in others) for i, others in enumerate(self._others)]
        self._degree = degrees.tolist()
        self._forward = [
            self._outgoing(i, self._earlier[i], self._degree[i], row) for i in range(len(degrees))
        ]
        self._backward = [self._outgoing(i, 0, self._earlier[i], row) for i in range(len(degrees))]

    def sweep(self, costs: np.ndarray) -> float:
        """Go forward and back once; returns the lower bound for these costs."""
        self._pass(costs, self._forward, range(len(self._degree)))
        return self._pass(costs, self._backward, reversed(range(len(self._degree))))

    def excess(self, costs: np.ndarray) -> np.ndarray:
        """How much the bound before would rise for each strategy, taken on a sweep back."""
        found = np.empty_like(costs)
        self._pass(costs, self._forward, range(len(self._degree)))
        self._pass(costs, self._backward, reversed(range(len(self._degree))), found)
        return found

    def rounded(self, costs: np.ndarray, *, within_room: bool) -> np.ndarray:
        """A choice, node by node: earlier picks as they are, later nodes by their messages.

        With `within_room` a strategy is taken only if it fits beside those picked before.
        """
        flat, room = self._flat, self._flat.room.copy()
        choice = np.zeros(len(flat.sizes), np.int64)
        for node, others in enumerate(self._others):
            reach = costs[flat.offsets[node] : flat.offsets[node + 1]].copy()
            earlier = self._earlier[node]
            if earlier < len(others):
                reach += self._incoming(node)[earlier:].sum(axis=0)
            for other in others[:earlier]:
                reach += flat.neighbours[node][other][:, choice[other]]
            if flat.levels[node] is not None and within_room:
                choice[node] = _fitting_pick(flat, node, reach, room)
            else:
                choice[node] = reach.argmin()
        return choice

    def _incoming(self, node: int) -> np.ndarray:
        """Messages into a node, one row per neighbour."""
        rows = self._all[self._begin[node] : self._begin[node + 1]]
        return rows.reshape(self._degree[node], -1) if len(rows) else rows.reshape(0, 1)

    def _pass(self, costs: np.ndarray, outgoing, nodes, excess: np.ndarray | None = None) -> float:
        offsets, bound = self._flat.offsets.tolist(), 0.0
        for node in nodes:
            incoming = self._incoming(node)
            total = costs[offsets[node] : offsets[node + 1]] + incoming.sum(axis=0)
            least = total.min()
            total -= least
            bound += least
            if excess is not None:
                excess[offsets[node] : offsets[node + 1]] = total
            edges = outgoing[node]
            if edges is None:
                continue
            chains = max(self._earlier[node], self._degree[node] - self._earlier[node])
            sent = (edges.matrix + (total / chains - incoming)[edges.edge]).min(axis=1)
            level = np.minimum.reduceat(sent, edges.first)
            bound += level.sum()
            self._all[edges.target] = sent - level[edges.number]
        return float(bound)

    def _outgoing(self, node: int, first: int, last: int, row) -> _Outgoing | None:
        others = self._others[node][first:last]
        if not others:
            return None
        flat = self._flat
        sizes = flat.sizes[others]
        return _Outgoing(
            matrix=np.ascontiguousarray(
                np.concatenate([flat.neighbours[node][other] for other in others], axis=1).T
            ),
            edge=np.repeat(np.arange(first, last), sizes),
            target=np.concatenate(
                [
                    self._begin[other] + row[other][node] * size + np.arange(size)
                    for other, size in zip(others, sizes.tolist(), strict=True)
                ]
            ),
            first=np.concatenate(([0], np.cumsum(sizes)[:-1])),
            number=np.repeat(np.arange(len(others)), sizes),
        )


def _fitting_pick(flat: FlatProblem, node: int, reach: np.ndarray, room: np.ndarray) -> int:
    """The best strategy that fits, its bytes taken off the room; the smallest if none does."""
    use: LiveUse = flat.memory.uses[node]
    levels, start = flat.levels[node], use.times[0]
    least_room = np.minimum.reduceat(room[start:], use.times - start)
    over = (levels - least_room[:, None]).max(axis=0)
    fits = over <= flat.memory.tolerance
    pick = int(np.where(fits, reach, np.inf).argmin()) if fits.any() else int(over.argmin())
    taken = levels[:, pick]
    if taken.any():
        room[start:] -= np.repeat(taken, np.diff(use.times, append=len(room)))
    return pick
