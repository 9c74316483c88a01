"""Branch and bound over the stages of a plan, with the simulator as the judge.

The DP of `inter_op` finds the best stages of a formula; the simulator may find others better: uneven stages
and transfers do not add up as the formula says. Here stages are chosen one by one, from the first to the
last, depth first and the most promising first. A beginning is left alone once no way to go on can beat the
best plan known: what the stages so far have, and the least that the DP says of the rest, for every line of
`plan_bounds`.

Objective: `judge.judged_s`. If the search ends by itself, no plan of the space is better; if it has judged as
many plans as it may, the bound of the whole space stands.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.inter_op.plan_bounds import Line
from launcher.autopar.inter_op.stage_table import StageChoice, StageTable

Stages = tuple[StageChoice, ...]
_EXPANDED_PER_JUDGED = 20  # beginnings that may be looked at for each plan that may be judged


@dataclass(frozen=True, slots=True)
class Refined:
    """The best stages that were met, if any beat the best known; `is_proven`: none are better."""

    stages: Stages | None
    step_s: float
    is_proven: bool


def refine(
    table: StageTable, lines: Sequence[Line], known_s: float,
    judge: Callable[[Stages], float], most_judged: int,
) -> Refined:  # fmt: skip
    """Look for stages that take less than `known_s`.

    Args:
        lines: that bound what a plan takes.
        judge: the step time of some stages, infinite where they do not fit together.
    """
    search = _Search(table, lines, judge, known_s, most_judged)
    for number in table.pieces.numbers_of_stages:
        if table.pieces.num_stages in (None, number):
            search.all_of(number)
    return Refined(search.best, search.best_s, search.judged_left > 0 and search.looks_left > 0)


class _Search:
    def __init__(self, table, lines, judge, known_s, most_judged):
        self.table, self.lines, self.judge = table, lines, judge
        self.best: Stages | None = None
        self.best_s = known_s
        self.judged_left, self.looks_left = most_judged, most_judged * _EXPANDED_PER_JUDGED
        self.axis = table.pieces.axis
        self.takes = self.axis.takes[table.rows["submesh"]]
        starts = np.arange(table.pieces.num_pieces + 2)
        self.bounds = np.searchsorted(table.rows["start"], starts)

    def all_of(self, number: int) -> None:
        """All plans of so many stages."""
        states = [_State.start(line, number) for line in self.lines]
        self._go_on((), states, 0, self.axis.all_devices, number)

    def _go_on(self, rows: tuple[int, ...], states, start: int, devices: int, left: int) -> None:
        if not left:
            self._judge(rows)
            return
        self.looks_left -= 1
        for row, least_s, following in self._ways(states, start, devices, left):
            if least_s >= self.best_s or self.judged_left <= 0 or self.looks_left <= 0:
                return
            end = int(self.table.rows["end"][row])
            self._go_on((*rows, row), following, end, devices - int(self.takes[row]), left - 1)

    def _ways(self, states: Sequence["_State"], start: int, devices: int, left: int) -> Iterator:
        """The next stages that there may be, the most promising first: (row, least time, states)."""
        here = np.arange(*self.bounds[start : start + 2])
        rows = self.table.rows
        has_room = self.axis.has_room[rows["submesh"][here], devices]
        here = here[rows["fits"][here, left - 1] & has_room]
        ends, rest = rows["end"][here], devices - self.takes[here]
        least_s = np.max([s.least_s(here, ends, rest, left - 1) for s in states], axis=0)
        for at in np.argsort(least_s, kind="stable"):
            row = int(here[at])
            yield row, float(least_s[at]), [state.after(row, left - 1) for state in states]

    def _judge(self, rows: tuple[int, ...]) -> None:
        stages = tuple(self.table.choices[self.table.rows["number"][row]] for row in rows)
        step_s = self.judge(stages)
        if math.isinf(step_s):  # soon seen
            self.looks_left -= 1
            return
        self.judged_left -= 1
        if step_s < self.best_s:
            self.best, self.best_s = stages, step_s


@dataclass(frozen=True, slots=True)
class _State:
    """What a line of the bound says of a beginning: its greatest so far, and the way behind it."""

    line: Line
    factor: float
    greatest_s: float
    path_s: float

    @classmethod
    def start(cls, line: Line, num_stages: int) -> "_State":
        return cls(line, line.factor(num_stages), 0.0, line.offset_s)

    def least_s(self, rows: np.ndarray, ends: np.ndarray, devices: np.ndarray, left: int):
        """The least that a plan takes which goes on with each of the rows."""
        way_s = self.path_s + self.line.way_s(rows, left)
        rest_s = way_s + self.line.table[left, ends, devices]
        own_s = self.path_s + self.line.own_s[rows]
        return self.factor * np.maximum(np.maximum(self.greatest_s, own_s), rest_s)

    def after(self, row: int, left: int) -> "_State":
        own_s = self.path_s + float(self.line.own_s[row])
        path_s = self.path_s + float(self.line.way_s(row, left))
        return _State(self.line, self.factor, max(self.greatest_s, own_s), path_s)
