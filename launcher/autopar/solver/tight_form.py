"""The ILP of a pairwise problem in its tight form, as arrays.

Node choices x are binary; for each edge, variables e(p, q) >= 0 are tied to them by marginals,

    sum_p x_i(p) = 1        sum_q e(p, q) = x_i(p)        sum_p e(p, q) = x_j(q)

so that e needs no integrality, and the relaxation is that of the local polytope. Alpa's form (e binary,
inequalities) has the same optimum with a weaker relaxation. A memory limit adds, for points t,

    sum over i, p of held_i(p, t) x_i(p) <= room(t)

Few points bind, so the solvers start with some and add those that an answer exceeds.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.solver.problem import PairwiseProblem


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Linear constraints: entries by row, and what each row must lie between."""

    row: np.ndarray
    column: np.ndarray
    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class TightForm:
    """Variables: first x, node by node (`offsets`), then e, edge by edge in row-major order."""

    problem: PairwiseProblem
    offsets: np.ndarray
    costs: np.ndarray
    upper: np.ndarray
    rows: Rows
    scale: float  # costs are multiplied by it: solvers work with absolute tolerances

    @property
    def num_binaries(self) -> int:
        return int(self.offsets[-1])

    def start(self, choice: Sequence[int]) -> np.ndarray:
        """The variables' values at a choice."""
        nodes = np.zeros(self.num_binaries)
        nodes[self.offsets[:-1] + np.asarray(choice, np.int64)] = 1.0
        values = [nodes]
        for (i, j), matrix in self.problem.edge_costs.items():
            edge = np.zeros(matrix.shape)
            edge[choice[i], choice[j]] = 1.0
            values.append(edge.ravel())
        return np.concatenate(values)

    def choice(self, values: np.ndarray) -> tuple[int, ...]:
        """The choice that the variables' values stand for."""
        return tuple(
            int(values[begin:end].argmax())
            for begin, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        )

    def memory_rows(self, points: Sequence[int], unit_bytes: float | None = None) -> Rows:
        """The limit at some points, in a unit; without one each row is divided by its largest entry."""
        memory = self.problem.memory
        points = np.asarray(points, np.int64)
        held = np.zeros((len(points), self.num_binaries))
        for node, use in enumerate(memory.uses):
            if use is not None:
                at = np.searchsorted(use.times, points, side="right")
                levels = np.concatenate((np.zeros((1, use.change.shape[1])), use.levels()))
                held[:, self.offsets[node] : self.offsets[node + 1]] = levels[at]
        scale = np.maximum(np.abs(held).max(axis=1, initial=0.0), 1e-30)
        if unit_bytes is not None:
            scale[:] = unit_bytes
        row, column = np.nonzero(held)
        return Rows(
            row=row,
            column=column,
            value=held[row, column] / scale[row],
            lower=np.full(len(points), -np.inf),
            upper=memory.room[points] / scale,
        )

    def cover_row(self, point: int, choice: Sequence[int]) -> Rows:
        """Forbid what overflows at a point by less than a solver's tolerance (a cover inequality).

        Not all nodes that hold something there may pick what holds as much as now, or more.
        """
        columns, count = [], 0
        for node, use in enumerate(self.problem.memory.uses):
            step = -1 if use is None else int(use.times.searchsorted(point, side="right")) - 1
            if step >= 0:
                held = use.levels()[step]
                if held[choice[node]] > 0:
                    count += 1
                    larger = np.flatnonzero(held >= held[choice[node]])
                    columns.append(self.offsets[node] + larger)
        column = np.concatenate(columns)
        zeros, ones = np.zeros(len(column), np.int64), np.ones(len(column))
        return Rows(zeros, column, ones, np.array([-np.inf]), np.array([count - 1.0]))

    def first_points(self, most: int) -> np.ndarray:
        """Points to begin with: the least room, among those where something changes."""
        memory = self.problem.memory
        if memory is None:
            return np.zeros(0, np.int64)
        return np.sort(np.argsort(memory.room, kind="stable")[:most])

    def overflowing(self, choice: Sequence[int]) -> np.ndarray:
        """Points where a choice exceeds the limit: of each run of such points, the worst."""
        memory = self.problem.memory
        if memory is None:
            return np.zeros(0, np.int64)
        over = memory.used(choice) - memory.room
        is_over = over > memory.tolerance
        run = np.cumsum(np.diff(is_over, prepend=False) & is_over)
        at = np.flatnonzero(is_over)
        worst = {int(run[t]): int(t) for t in at[np.argsort(over[at], kind="stable")]}
        return np.array(sorted(worst.values()), np.int64)


def tight_form(problem: PairwiseProblem) -> TightForm:
    """Write a problem as an ILP, without its memory rows."""
    sizes = np.array([len(costs) for costs in problem.node_costs], np.int64)
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    rows = [np.repeat(np.arange(len(sizes)), sizes)]
    columns, values = [np.arange(offsets[-1])], [np.ones(offsets[-1])]
    sums = [np.ones(len(sizes))]
    num_rows, num_columns = len(sizes), int(offsets[-1])
    for (i, j), matrix in problem.edge_costs.items():
        n, m = matrix.shape
        edge = num_columns + np.arange(n * m)
        by_row, by_column = num_rows + np.arange(n), num_rows + n + np.arange(m)
        rows += [np.repeat(by_row, m), np.tile(by_column, n), by_row, by_column]
        columns += [edge, edge, offsets[i] + np.arange(n), offsets[j] + np.arange(m)]
        values += [np.ones(2 * n * m), -np.ones(n + m)]
        sums.append(np.zeros(n + m))
        num_rows, num_columns = num_rows + n + m, num_columns + n * m
    level = np.concatenate(sums)
    parts = Rows(*map(np.concatenate, (rows, columns, values)), level, level)
    return TightForm(problem, offsets, rows=parts, **_costs_of(problem))


def like(form: TightForm, problem: PairwiseProblem) -> TightForm:
    """The form of another problem of the same shape."""
    return replace(form, problem=problem, **_costs_of(problem))


def shape(problem: PairwiseProblem) -> Hashable:
    """Equal for problems of the same nodes, strategies and edges, whatever they cost."""
    return tuple(len(costs) for costs in problem.node_costs), tuple(problem.edge_costs)


def _costs_of(problem: PairwiseProblem) -> dict[str, np.ndarray | float]:
    """The scaled costs, 0 where they forbid; the upper bounds, which forbid in their place; the scale."""
    costs = [np.asarray(c, np.float64) for c in problem.node_costs]
    costs += [np.asarray(matrix, np.float64).ravel() for matrix in problem.edge_costs.values()]
    total = np.concatenate(costs) if costs else np.zeros(0)
    allowed = np.isfinite(total)
    total = np.where(allowed, total, 0.0)
    largest = float(np.abs(total).max(initial=0.0))
    scale = 1e4 / largest if largest > 0 else 1.0
    return {"costs": total * scale, "upper": allowed.astype(float), "scale": scale}
