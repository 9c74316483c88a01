"""Exact solution by variable elimination: dynamic programming over a tree decomposition of the graph.

A node is taken out by adding up all cost tables that mention it and keeping, for every combination of its
neighbours' picks, its own best answer: a table over the neighbours. Taking nodes in the order of the
smallest table that arises keeps the tables small on graphs of small treewidth, which layers of neural
networks have: a transformer block with its backward pass needs tables of at most some 10^5 entries.
`plan_order` finds out beforehand; `solve` says where it goes on if the answer is no.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.solver.problem import PairwiseProblem, Solution


@dataclass(frozen=True, slots=True)
class Table:
    """Costs over the picks of some nodes, one axis per node."""

    scope: tuple[int, ...]
    costs: np.ndarray


def plan_order(problem: PairwiseProblem, *, most_entries: float) -> tuple[int, ...] | None:
    """An elimination order by smallest table first; None if all tables together have more entries."""
    neighbours: list[set[int]] = [set() for _ in problem.node_costs]
    for i, j in problem.edge_costs:
        if len(problem.node_costs[i]) > 1 and len(problem.node_costs[j]) > 1:
            neighbours[i].add(j)
            neighbours[j].add(i)
    bits = [math.log2(len(costs)) for costs in problem.node_costs]

    def table_bits(node: int) -> float:
        return bits[node] + sum(bits[other] for other in neighbours[node])

    current = [table_bits(node) for node in range(len(bits))]
    queue = [(size, node) for node, size in enumerate(current)]
    heapq.heapify(queue)
    order: list[int] = []
    done = [False] * len(bits)
    entries = 0.0
    while queue:
        size, node = heapq.heappop(queue)
        if done[node] or size != current[node]:
            continue
        entries += 2.0**size
        if entries > most_entries:
            return None
        done[node] = True
        order.append(node)
        around = neighbours[node]
        for other in around:
            neighbours[other] |= around
            neighbours[other] -= {node, other}
        for other in around:
            current[other] = table_bits(other)
            heapq.heappush(queue, (current[other], other))
    return tuple(order)


class _Tables:
    """All cost tables, found by the nodes they mention."""

    def __init__(self, num_nodes: int):
        self._by_node: list[dict[int, Table]] = [{} for _ in range(num_nodes)]
        self._added = 0

    def add(self, table: Table) -> None:
        self._added += 1
        for node in table.scope:
            self._by_node[node][self._added] = table

    def take(self, node: int) -> list[Table]:
        """Remove and return the tables that mention a node."""
        taken = self._by_node[node]
        for number, table in taken.items():
            for other in table.scope:
                if other != node:
                    del self._by_node[other][number]
        self._by_node[node] = {}
        return list(taken.values())


def solve_by_elimination(problem: PairwiseProblem, order: Sequence[int]) -> Solution:
    """Return an optimal choice, eliminating the nodes in the given order."""
    tables = _Tables(len(problem.node_costs))
    scoped = [((node,), costs) for node, costs in enumerate(problem.node_costs)]
    for scope, costs in (*scoped, *problem.edge_costs.items()):
        tables.add(_without_singletons(scope, np.asarray(costs, np.float64)))
    answers: list[Table] = []
    for node in order:
        if len(problem.node_costs[node]) == 1:
            answers.append(Table((node,), np.zeros((), np.int64)))
            continue
        total = _add_up(node, tables.take(node))
        answers.append(Table((node, *total.scope[:-1]), total.costs.argmin(axis=-1)))
        tables.add(Table(total.scope[:-1], total.costs.min(axis=-1)))
    picks: dict[int, int] = {}
    for answer in reversed(answers):
        node, *others = answer.scope
        picks[node] = int(answer.costs[tuple(picks[other] for other in others)])
    choice = tuple(picks[node] for node in range(len(problem.node_costs)))
    cost = problem.cost(choice)
    return Solution(choice, cost, cost)


def _without_singletons(scope: tuple[int, ...], costs: np.ndarray) -> Table:
    """A table without the axes of nodes that have one strategy and so nothing to say."""
    kept = [i for i, size in enumerate(costs.shape) if size > 1]
    return Table(tuple(scope[i] for i in kept), costs.reshape([costs.shape[i] for i in kept]))


def _add_up(node: int, tables: Sequence[Table]) -> Table:
    """The sum of tables over the union of their scopes, the given node last."""
    others = sorted({other for table in tables for other in table.scope} - {node})
    scope = (*others, node)
    axis = {other: i for i, other in enumerate(scope)}
    total: np.ndarray | float = 0.0
    for table in sorted(tables, key=lambda table: table.costs.size):
        order = sorted(range(len(table.scope)), key=lambda i: axis[table.scope[i]])
        present = {axis[table.scope[i]] for i in order}
        where = tuple(slice(None) if i in present else None for i in range(len(scope)))
        total = total + table.costs.transpose(order)[where]
    sizes = tuple(
        next(t.costs.shape[t.scope.index(other)] for t in tables if other in t.scope)
        for other in scope
    )
    return Table(scope, np.broadcast_to(total, sizes))
