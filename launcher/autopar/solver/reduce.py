"""Exact reductions of a pairwise problem: what can be decided without a search is decided here.

    one strategy left       its edge rows move into the neighbours' node costs
    degree 1                the node's best answer to each pick of its neighbour moves into the neighbour
    degree 2                the same, into an edge between its two neighbours
    dominated strategy      one that another beats whatever the neighbours pick is dropped
    twin                    a node with the same costs and the same edges as another picks what that picks

Under a memory limit a strategy dominates only if it takes no more at any point, and only nodes that take
part in no point that can overflow are eliminated or folded.

Every reduction keeps the optimal cost, and is undone in reverse order to recover the choice.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from launcher.autopar.solver.live_memory import LiveUse, Memory
from launcher.autopar.solver.problem import PairwiseProblem

# Below this share of the cost scale two costs count as equal, so that rounding keeps no strategy alive.
_TOLERANCE = 1e-12
_MOST_COMPARED = (
    20_000_000  # entries of edges times pairs of strategies: more is not worth its time
)


@dataclass(slots=True)
class Reduced:
    """What is left of a problem: `nodes` and `edges` that still need a search, and the way back."""

    costs: dict[int, np.ndarray]
    neighbours: dict[int, dict[int, np.ndarray]]  # i -> j -> matrix[p_i, p_j]
    kept: dict[int, np.ndarray]  # i -> the original indices of the strategies left
    uses: dict[int, LiveUse]  # of nodes whose strategies differ in memory
    memory: Memory | None = None
    constant: float = 0.0
    undo: list[Callable[[dict[int, int]], None]] = field(default_factory=list)
    # By node and neighbour, beside the matrix of the edge then: a node is looked at again whenever any of
    # its edges has changed, and the others have not.
    excess: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

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
        memory = self.memory
        if memory is not None:
            memory = replace(memory, uses=tuple(self.uses.get(node) for node in nodes))
        return PairwiseProblem(tuple(self.costs.values()), edges, memory), nodes

    def choice(self, picks: dict[int, int], num_nodes: int) -> tuple[int, ...]:
        """Extend picks (original strategy indices) of the nodes left to all nodes."""
        picks = dict(picks)
        for restore in reversed(self.undo):
            restore(picks)
        return tuple(picks[node] for node in range(num_nodes))

    def expand(self, choice: Sequence[int], num_nodes: int) -> tuple[int, ...]:
        """Extend a choice of `rest` to all nodes."""
        picks = {
            node: int(self.kept[node][pick]) for node, pick in zip(self.costs, choice, strict=True)
        }
        return self.choice(picks, num_nodes)


def reduce(problem: PairwiseProblem) -> Reduced:
    """Apply all reductions until none applies."""
    memory = None if problem.memory is None else problem.memory.tightened()
    uses = () if memory is None else memory.uses
    state = Reduced(
        costs={i: np.array(c, np.float64) for i, c in enumerate(problem.node_costs)},
        neighbours={i: {} for i in range(len(problem.node_costs))},
        kept={i: np.arange(len(c)) for i, c in enumerate(problem.node_costs)},
        uses={i: use for i, use in enumerate(uses) if use is not None},
        memory=memory,
    )
    for (i, j), matrix in problem.edge_costs.items():
        _add_edge(state, i, j, np.asarray(matrix, np.float64))
    pending = set(state.costs)
    while pending:
        _reduce_around(state, pending)
        pending = _fold_twins(state)
    state.excess.clear()
    return state


def _reduce_around(state: Reduced, pending: set[int]) -> None:
    """Drop strategies and eliminate, fewest neighbours first, from some nodes on until none is left."""
    queue = [(len(state.neighbours[node]), node) for node in pending]
    heapq.heapify(queue)
    while queue:
        _, node = heapq.heappop(queue)
        if node not in pending:
            continue
        pending.discard(node)
        touched = set(state.neighbours[node])
        is_small = len(touched) <= 2 and node not in state.uses
        changed = not is_small and _drop_dominated(state, node)
        if is_small or len(state.costs[node]) == 1:
            _eliminate(state, node)
        elif changed:
            touched.add(node)
        else:
            continue
        pending |= touched
        for other in touched:
            heapq.heappush(queue, (len(state.neighbours[other]), other))


def _fold_twins(state: Reduced) -> set[int]:
    """Let one node stand for all that have its costs and edges; returns those whose degree fell.

    For any picks of the neighbours, twins have the same best answer: repeated blocks between the same
    nodes fold this way, node by node.
    """
    seen: dict[tuple, int] = {}
    touched: set[int] = set()
    for node in list(state.costs):
        edges = state.neighbours[node]
        if node in state.uses or not edges:
            continue
        others = sorted(edges)
        key = (*others, state.costs[node].tobytes(), *(edges[other].tobytes() for other in others))
        first = seen.setdefault(key, node)
        if first != node and first not in edges:
            _merge_twin(state, first, node)
            touched.update(others)
    return touched


def _merge_twin(state: Reduced, first: int, twin: int) -> None:
    for other, matrix in state.neighbours.pop(twin).items():
        del state.neighbours[other][twin]
        _add_edge(state, first, other, matrix)
    state.costs[first] = state.costs[first] + state.costs.pop(twin)
    own, firsts = state.kept.pop(twin), state.kept[first]

    def restore(picks: dict[int, int]) -> None:
        picks[twin] = int(own[np.searchsorted(firsts, picks[first])])

    state.undo.append(restore)


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
        _take_room(state, state.uses.pop(node, None))
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


def _take_room(state: Reduced, use: LiveUse | None) -> None:
    """Take off the room what a node with one strategy left holds."""
    if use is not None:
        taken = np.zeros(len(state.memory.room))
        taken[use.times] = use.change[:, 0]
        state.memory = replace(state.memory, room=state.memory.room - taken.cumsum())


def _drop_dominated(state: Reduced, node: int) -> bool:
    """Drop strategies that another one beats for every pick of the neighbours; True if any went.

    Strategy q beats p if c_q + sum over edges of max(E_q - E_p) <= c_p, and takes no more memory.
    """
    costs = state.costs[node]
    neighbours = state.neighbours[node]
    entries = sum(matrix.size for matrix in neighbours.values())
    if len(costs) == 1 or len(costs) * entries > _MOST_COMPARED:
        return False
    worst = costs[:, None] - costs[None, :]  # (q, p): how much worse q can be than p
    for other, matrix in neighbours.items():
        known, excess = state.excess.get((node, other), (None, None))
        if known is not matrix:
            excess = _largest_excess(matrix)
            state.excess[node, other] = matrix, excess
        worst += excess
    scale = _TOLERANCE * max(1e-30, float(np.abs(costs).max()))
    beats = worst <= scale
    if node in state.uses:
        levels = state.uses[node].levels()
        beats &= (levels[:, :, None] <= levels[:, None, :]).all(axis=0)
    np.fill_diagonal(beats, False)
    beaten = np.flatnonzero(beats.any(axis=0))
    if not len(beaten):
        return False
    alive = np.ones(len(costs), bool)
    for p in beaten:  # of those that beat one another, the last one stays
        alive[p] = not (beats[:, p] & alive).any()
    _keep(state, node, alive)
    return True


def _largest_excess(matrix: np.ndarray) -> np.ndarray:
    """(q, p) -> the most that row q exceeds row p; where p is forbidden, nothing exceeds it."""
    if np.isfinite(matrix).all():
        return (matrix[:, None, :] - matrix[None, :, :]).max(axis=2)
    forbidden = np.isinf(matrix)
    finite = np.where(forbidden, 0.0, matrix)
    excess = np.where(forbidden[:, None, :], np.inf, finite[:, None, :] - finite[None, :, :])
    return np.where(forbidden[None, :, :], -np.inf, excess).max(axis=2)


def _keep(state: Reduced, node: int, alive: np.ndarray) -> None:
    """Leave a node only some of its strategies."""
    state.costs[node] = state.costs[node][alive]
    state.kept[node] = state.kept[node][alive]
    if node in state.uses:
        state.uses[node] = state.uses[node].of(np.flatnonzero(alive))
    for other, matrix in list(state.neighbours[node].items()):
        state.neighbours[node][other] = matrix[alive]
        state.neighbours[other][node] = matrix[alive].T
