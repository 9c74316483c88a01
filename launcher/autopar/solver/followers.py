"""Forbidden pairs decide a lot before any search: followers are merged into the nodes they follow.

    unsupported strategy    one that some neighbour has no allowed answer to (arc consistency, AC-3)
    too large               one that does not fit even where all others take their least
    one strategy left       its edge rows move into the neighbours' node costs
    follower                a node with one allowed answer to each strategy of a neighbour (Alpa, section
                            4.2, merges operators this way); its costs, edges and memory move into it

Everything here is exact, with a memory limit too: a merged node holds the memory of all its members. On
graphs that compilers produce this takes out four nodes of five, or 99 of 100.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.solver.live_memory import LiveUse, Memory, fitting, joined
from launcher.autopar.solver.problem import PairwiseProblem
from launcher.errors import InfeasiblePlanError


@dataclass(frozen=True, slots=True)
class Merged:
    """The smaller problem, and for each of its nodes the members with their picks by its strategy."""

    problem: PairwiseProblem
    members: tuple[tuple[tuple[int, np.ndarray], ...], ...]
    settled: tuple[tuple[int, int], ...]  # nodes with one strategy left, and that strategy

    def expand(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The original problem's choice."""
        picks = dict(self.settled)
        for members, pick in zip(self.members, choice, strict=True):
            picks.update((node, int(answers[pick])) for node, answers in members)
        return tuple(picks[node] for node in range(len(picks)))


def merge_followers(problem: PairwiseProblem) -> Merged:
    """Apply the steps above until none applies."""
    graph = _Graph(problem)
    graph.propagate(range(len(graph.costs)))
    graph.merge()
    memory = problem.memory
    while memory is not None:
        memory = graph.flattened(memory).tightened()
        if memory.shortage > memory.tolerance:
            raise TooLittleMemoryError(memory.limit, memory.limit + memory.shortage)
        if not graph.drop_too_large(memory):
            break
        graph.merge()
    return graph.result(memory)


class TooLittleMemoryError(InfeasiblePlanError):
    """The memory limit is below what every choice needs."""

    def __init__(self, limit: float, least: float):
        super().__init__(
            f"the memory limit of {limit:.15g} is too small: at least {least:.15g} is needed even "
            f"if every node took its least; raise the limit to that"
        )


class _Graph:
    """The problem in the making: costs and edges of nodes, and what was merged into each."""

    def __init__(self, problem: PairwiseProblem):
        self.costs = [np.array(costs, np.float64) for costs in problem.node_costs]
        self.neighbours: list[dict[int, np.ndarray]] = [{} for _ in self.costs]
        for (i, j), matrix in problem.edge_costs.items():
            self.neighbours[i][j] = matrix = np.asarray(matrix, np.float64)
            self.neighbours[j][i] = matrix.T
        self.kept = [np.arange(len(costs)) for costs in self.costs]  # of the node itself
        self.followers: list[list[int]] = [[] for _ in self.costs]
        self.answers: dict[int, np.ndarray] = {}  # follower -> its pick by its leader's strategy
        self.is_root = [True] * len(self.costs)
        self._problem = problem
        for node, costs in enumerate(self.costs):
            if not np.isfinite(costs).all():
                self._keep(node, np.isfinite(costs))

    def propagate(self, nodes: Iterable[int]) -> bool:
        """Drop strategies without an allowed answer in some neighbour; True if any went."""
        pending, dropped = set(nodes), False
        while pending:
            node = pending.pop()
            mask = np.ones(len(self.costs[node]), bool)
            for matrix in self.neighbours[node].values():
                mask &= np.isfinite(matrix).any(axis=1)
            if not mask.all():
                self._keep(node, mask)
                pending.update(self.neighbours[node])
                dropped = True
        return dropped

    def merge(self) -> None:
        """Merge until nothing follows; merged edges may forbid more, and so make more followers."""
        self._merge_once()
        while self.propagate(i for i, is_root in enumerate(self.is_root) if is_root):
            self._merge_once()

    def _merge_once(self) -> None:
        """Merge followers into leaders, and nodes with one strategy into their neighbours' costs."""
        for node, costs in enumerate(self.costs):
            if self.is_root[node] and len(costs) == 1:
                self._settle(node)
        pending = [(i, j) for i, edges in enumerate(self.neighbours) for j in edges]
        while pending:
            leader, follower = pending.pop()
            if follower not in self.neighbours[leader]:
                continue
            allowed = np.isfinite(self.neighbours[leader][follower])
            if not (allowed.sum(axis=1) == 1).all():
                continue
            if self._is_mutual(allowed, leader, follower):
                leader, follower, allowed = follower, leader, allowed.T
            for other in self._absorb(leader, follower, allowed.argmax(axis=1)):
                pending += [(leader, other), (other, leader)]

    def drop_too_large(self, memory: Memory) -> bool:
        """Drop root strategies that fit in no case; True if any went."""
        dropped = []
        narrow = float(memory.room.min(initial=np.inf))
        for node, use in enumerate(memory.uses):
            if use is None or use.levels().max() <= narrow:
                continue
            mask = fitting(use, memory.room, memory.tolerance)
            if not mask.all():
                self._keep(node, mask)
                dropped.append(node)
        self.propagate(dropped + [j for i in dropped for j in self.neighbours[i]])
        return bool(dropped)

    def flattened(self, memory: Memory) -> Memory:
        """The memory of the original problem, each root holding its members' (others: none)."""
        uses: list[LiveUse | None] = [None] * len(self.costs)
        for node, is_root in enumerate(self.is_root):
            if is_root:
                parts = [
                    use.of(answers)
                    for member, answers in self._members(node)
                    if (use := self._problem.memory.uses[member]) is not None
                ]
                uses[node] = joined(parts)
        return replace(memory, room=self._problem.memory.room, uses=tuple(uses))

    def result(self, memory: Memory | None) -> Merged:
        """The merged problem over the roots that have a choice."""
        roots = [i for i, is_root in enumerate(self.is_root) if is_root and len(self.costs[i]) > 1]
        number = {node: n for n, node in enumerate(roots)}
        edges = {
            (number[i], number[j]): matrix
            for i in roots
            for j, matrix in self.neighbours[i].items()
            if i < j
        }
        if memory is not None:
            memory = replace(memory, uses=tuple(memory.uses[i] for i in roots))
        settled = [
            (member, int(answers[0]))
            for node, is_root in enumerate(self.is_root)
            if is_root and len(self.costs[node]) == 1
            for member, answers in self._members(node)
        ]
        merged = PairwiseProblem(tuple(self.costs[i] for i in roots), edges, memory)
        members = tuple(tuple(self._members(i)) for i in roots)
        return Merged(merged, members, tuple(settled))

    def _members(self, root: int) -> list[tuple[int, np.ndarray]]:
        """The root and all that follow it, with their original picks by the root's strategy."""
        found = [(root, np.arange(len(self.costs[root])))]
        for node, picks in found:
            found += [(other, self.answers[other][picks]) for other in self.followers[node]]
        return [(node, self.kept[node][picks]) for node, picks in found]

    def _keep(self, node: int, mask: np.ndarray) -> None:
        """Leave a root only some of its strategies."""
        if not mask.any():
            raise InfeasiblePlanError(
                f"no choice is allowed: every strategy of node {node} is ruled out by forbidden "
                f"costs or by the memory limit; allow one of its strategies or raise the limit"
            )
        self.costs[node] = self.costs[node][mask]
        self.kept[node] = self.kept[node][mask]
        for other, matrix in self.neighbours[node].items():
            self.neighbours[node][other] = matrix[mask]
            self.neighbours[other][node] = self.neighbours[node][other].T
        for follower in self.followers[node]:
            self.answers[follower] = self.answers[follower][mask]

    def _settle(self, node: int) -> None:
        for other, matrix in self.neighbours[node].items():
            self.costs[other] = self.costs[other] + matrix[0]
            del self.neighbours[other][node]
        self.neighbours[node] = {}

    def _is_mutual(self, allowed: np.ndarray, leader: int, follower: int) -> bool:
        """Whether the two follow each other and the follower has more edges, dearer to move."""
        one_to_one = len(allowed) == allowed.shape[1] and (allowed.sum(axis=0) == 1).all()
        return bool(one_to_one) and len(self.neighbours[follower]) > len(self.neighbours[leader])

    def _absorb(self, leader: int, follower: int, answers: np.ndarray) -> list[int]:
        """Move a follower into its leader; returns the neighbours whose edge with it changed."""
        own = self.neighbours[leader]
        link = own.pop(follower)
        del self.neighbours[follower][leader]
        rows = np.arange(len(answers))
        self.costs[leader] = (
            self.costs[leader] + self.costs[follower][answers] + link[rows, answers]
        )
        moved = []
        for other, matrix in self.neighbours[follower].items():
            del self.neighbours[other][follower]
            matrix = matrix[answers]
            own[other] = own[other] + matrix if other in own else matrix
            self.neighbours[other][leader] = own[other].T
            moved.append(other)
        self.neighbours[follower] = {}
        self.is_root[follower] = False
        self.followers[leader].append(follower)
        self.answers[follower] = answers
        return moved
