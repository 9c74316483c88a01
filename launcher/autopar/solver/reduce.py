"""Exact reductions of a pairwise problem: what can be decided without a search is decided here.

    one strategy left       its edge rows move into the neighbours' node costs
    degree 1                the node's best answer to each pick of its neighbour moves into the neighbour
    degree 2                the same, into an edge between its two neighbours
    dominated strategy      one that another beats whatever the neighbours pick is dropped

Every reduction keeps the optimal cost, and is undone in reverse order to recover the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from launcher.autopar.solver.problem import PairwiseProblem

# Below this share of the cost scale two costs count as equal, so that rounding keeps no strategy alive.
_TOLERANCE = 1e-12


@dataclass(slots=True)
class Reduced:
    """What is left of a problem: `nodes` and `edges` that still need a search, and the way back."""

    costs: dict[int, np.ndarray]
    neighbours: dict[int, dict[int, np.ndarray]]  # i -> j -> matrix[p_i, p_j]
    kept: dict[int, np.ndarray]  # i -> the original indices of the strategies left
    constant: float = 0.0
    undo: list[Callable[[dict[int, int]], None]] = field(default_factory=list)

    def rest(self) -> tuple[PairwiseProblem, tuple[int, ...]]:
        """What is left, as a problem of its own, and the original number of each of its nodes."""
        nodes = tuple(self.costs)
        number = {node: i for i, node in enumerate(nodes)}
        edges = {
            (number[i], number[j]): matrix
            for i, row in self.neighbours.items()
            for j, matrix in row.items()
            if number[i] < number[j]
        }
        return PairwiseProblem(tuple(self.costs.values()), edges), nodes

    def choice(self, picks: dict[int, int], num_nodes: int) -> tuple[int, ...]:
        """Extend picks (original strategy indices) of the nodes left to all nodes."""
        picks = dict(picks)
        for restore in reversed(self.undo):
            restore(picks)
        return tuple(picks[node] for node in range(num_nodes))


def reduce(problem: PairwiseProblem) -> Reduced:
    """Apply all reductions until none applies."""
    state = Reduced(
        costs={i: np.array(c, np.float64) for i, c in enumerate(problem.node_costs)},
        neighbours={i: {} for i in range(len(problem.node_costs))},
        kept={i: np.arange(len(c)) for i, c in enumerate(problem.node_costs)},
    )
    for (i, j), matrix in problem.edge_costs.items():
        _add_edge(state, i, j, np.asarray(matrix, np.float64))
    pending = set(state.costs)
    while pending:
        node = min(pending, key=lambda i: len(state.neighbours[i]))
        pending.discard(node)
        if node not in state.costs:
            continue
        touched = set(state.neighbours[node])
        if len(state.neighbours[node]) > 2 and not _drop_dominated(state, node):
            continue
        if len(state.costs[node]) == 1 or len(state.neighbours[node]) <= 2:
            _eliminate(state, node)
            pending |= touched
        else:
            pending |= touched | {node}
    return state


def _add_edge(state: Reduced, i: int, j: int, matrix: np.ndarray) -> None:
    if j in state.neighbours[i]:
        matrix = state.neighbours[i][j] + matrix
    state.neighbours[i][j] = matrix
    state.neighbours[j][i] = matrix.T


def _eliminate(state: Reduced, node: int) -> None:
    """Take out a node with one strategy or with at most two neighbours."""
    costs, kept = state.costs.pop(node), state.kept.pop(node)
    edges = state.neighbours.pop(node)
    for other in edges:
        del state.neighbours[other][node]
    if len(costs) == 1:
        state.constant += costs[0]
        for other, matrix in edges.items():
            state.costs[other] = state.costs[other] + matrix[0]
        state.undo.append(lambda picks: picks.__setitem__(node, int(kept[0])))
    elif not edges:
        state.constant += costs.min()
        best = int(kept[costs.argmin()])
        state.undo.append(lambda picks: picks.__setitem__(node, best))
    elif len(edges) == 1:
        _eliminate_leaf(state, node, costs, kept, edges)
    else:
        _eliminate_between(state, node, costs, kept, edges)


def _eliminate_leaf(state: Reduced, node, costs, kept, edges) -> None:
    ((other, matrix),) = edges.items()
    total = costs[:, None] + matrix  # (own, other)
    state.costs[other] = state.costs[other] + total.min(axis=0)
    best, others = kept[total.argmin(axis=0)], state.kept[other]

    def restore(picks: dict[int, int]) -> None:
        picks[node] = int(best[np.searchsorted(others, picks[other])])

    state.undo.append(restore)


def _eliminate_between(state: Reduced, node, costs, kept, edges) -> None:
    (left, left_matrix), (right, right_matrix) = edges.items()
    total = costs[:, None, None] + left_matrix[:, :, None] + right_matrix[:, None, :]
    _add_edge(state, left, right, total.min(axis=0))
    best, lefts, rights = kept[total.argmin(axis=0)], state.kept[left], state.kept[right]

    def restore(picks: dict[int, int]) -> None:
        row, column = np.searchsorted(lefts, picks[left]), np.searchsorted(rights, picks[right])
        picks[node] = int(best[row, column])

    state.undo.append(restore)


def _drop_dominated(state: Reduced, node: int) -> bool:
    """Drop strategies that another one beats for every pick of the neighbours; True if any went.

    Strategy q beats p if c_q + sum over edges of max(E_q - E_p) <= c_p.
    """
    costs = state.costs[node]
    if len(costs) == 1:
        return True
    worst = costs[:, None] - costs[None, :]  # (q, p): how much worse q can be than p
    for matrix in state.neighbours[node].values():
        worst = worst + (matrix[:, None, :] - matrix[None, :, :]).max(axis=2)
    scale = _TOLERANCE * max(1e-30, float(np.abs(costs).max()))
    beats = worst <= scale
    np.fill_diagonal(beats, False)
    alive = np.ones(len(costs), bool)
    for p in range(len(costs)):
        alive[p] = not (beats[:, p] & alive).any()
    if alive.all():
        return False
    state.costs[node] = costs[alive]
    state.kept[node] = state.kept[node][alive]
    for other, matrix in list(state.neighbours[node].items()):
        state.neighbours[node][other] = matrix[alive]
        state.neighbours[other][node] = matrix[alive].T
    return True
