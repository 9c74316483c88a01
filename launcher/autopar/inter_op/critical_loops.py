"""How fast a pipeline runs: its period, which the slowest loop through its stages sets.

Under 1F1B and ZB-H1 stage i sends a microbatch on when one has come back to it, and there is room for
l - i + 1 between it and stage l. So in the middle of a step, when every stage does one forward and one
backward pass in turn, the dependencies close a loop from i to l and back, for every i <= l, in which so many
microbatches go round. With

    t    F + I + W, what keeps a stage busy
    q    F + I + c, what others wait for (1F1B: I is all of the backward pass, and W is 0)

each of them takes

    (t_i + sum of q_j over i < j <= l) / (l - i + 1)

and the greatest of these is the period (the greatest cycle mean of the event graph: Baccelli, Cohen, Olsder
and Quadrat, Synchronization and Linearity, 1992, chapter 2). It is less than the greatest t + c, by which
the formula of `inter_op` goes, as far as the neighbours of a stage that waits long are fast; tests hold it
against the simulator. Under GPipe all microbatches are on their way at once: a stage waits for itself
alone, and q is 0.

Whether a plan's period is at most P can be seen stage by stage, from the last to the first, by what the loops
through a stage lack, and must have left over before it:

    need_j = max(0, q_j - P + need_(j+1)),    t_i + need_(i+1) <= P

which less need is always good for. So the least need is a DP as in `sweeps`, exact for each P.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from launcher.autopar.inter_op.pace import busy_s, waited_for_s
from launcher.autopar.inter_op.stage_table import Pieces, microbatch_time_s
from launcher.autopar.inter_op.sweeps import sweep, sweep_with
from launcher.autopar.programs.schedules import AbstractSchedule, GPipe, ZbH1

_BISECTIONS = 8
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Loops:
    """The rows of a stage table, as loops see them.

    Attributes:
        busy_s: t of the module's head, by row.
        waited_s: q, by row.
        last_s: what a first stage does when the last microbatch is back, by row.
    """

    pieces: Pieces
    rows: np.ndarray
    busy_s: np.ndarray
    waited_s: np.ndarray
    last_s: np.ndarray

    @classmethod
    def of(cls, pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule) -> "Loops":
        waited_s, last_s = microbatch_time_s(rows), rows["once_s"]
        match schedule:
            case GPipe():
                waited_s = np.zeros(len(rows))
            case ZbH1():
                waited_s, last_s = waited_for_s(rows), rows["once_s"] + rows["weight_s"]
        return cls(pieces, rows, busy_s(rows), waited_s, last_s)

    def within(self, period_s: float) -> "Within":
        """What can be had with a period that is no longer."""
        period_s *= 1 + _ROUNDING
        live = self.busy_s <= period_s
        columns = (column[live] for column in (self.busy_s, self.waited_s, self.last_s))
        loops = Loops(self.pieces, self.rows[live], *columns)
        return Within(loops, period_s, loops._needs(period_s))

    def shortest(self, most_s: float) -> tuple[float, "Within"] | None:
        """A period that no plan stays below, and nearly the shortest; None if that is over `most_s`."""
        low_s = float(sweep(self.pieces, self.rows, self.busy_s, np.maximum)[:, 0, -1].min())
        if low_s > most_s:
            return None
        best = self.within(low_s)  # where no stage waits for others
        if len(best.numbers()):
            return low_s, best
        best = self.within(most_s)
        if not len(best.numbers()):
            return None
        for _ in range(_BISECTIONS):
            middle = self.within((low_s + best.period_s) / 2)
            if len(middle.numbers()):
                best = middle
            else:
                low_s = middle.period_s
        return low_s, best

    def period_s(self, plan: np.ndarray) -> float:
        """Of a plan, given by the numbers of its rows."""
        waited_s = np.cumsum(self.waited_s[plan])
        stages = np.arange(len(plan))
        around_s = self.busy_s[plan][:, None] + waited_s[None] - waited_s[:, None]
        room = np.maximum(stages[None] - stages[:, None], 0) + 1
        return float((np.triu(around_s) / room).max())

    def _needs(self, period_s: float) -> np.ndarray:
        def step(live: np.ndarray, stages: int, behind: np.ndarray) -> np.ndarray:
            del stages
            is_slow = self.busy_s[live, None] + behind > period_s
            behind += self.waited_s[live, None] - period_s
            np.maximum(behind, 0.0, out=behind)
            behind[is_slow] = np.inf
            return behind

        return sweep_with(self.pieces, self.rows, step)


@dataclass(frozen=True, slots=True, eq=False)
class Within:
    """The plans whose period is at most `period_s`; `needs` by stages, start and devices."""

    loops: Loops
    period_s: float
    needs: np.ndarray

    def numbers(self) -> np.ndarray:
        """How many stages such plans have."""
        return np.flatnonzero(np.isfinite(self.needs[:, 0, -1]))

    def plans(self) -> Iterator[np.ndarray]:
        """Yield, by the number of stages, the numbers of the rows of one with a short way."""
        rows = self.loops.rows
        ways_s = sweep(self.loops.pieces, rows, rows["path_s"], np.add)
        for number in self.numbers().tolist():
            yield self._plan(number, ways_s)

    def _plan(self, number: int, ways_s: np.ndarray) -> np.ndarray:
        """Each row is chosen as if what follows had no need."""
        loops, axis, period_s = self.loops, self.loops.pieces.axis, self.period_s
        rows, picked, slack_s = loops.rows, [], _ROUNDING * period_s
        start, devices, left_over_s = 0, axis.all_devices, np.inf
        for stages in range(number, 0, -1):
            here = np.arange(*np.searchsorted(rows["start"], (start, start + 1)))
            submesh = rows["submesh"][here]
            here = here[rows["fits"][here, stages - 1] & axis.has_room[submesh, devices]]
            place = stages - 1, rows["end"][here], devices - axis.takes[rows["submesh"][here]]
            behind_s = self.needs[place]
            need_s = np.maximum(loops.waited_s[here] - period_s + behind_s, 0.0)
            can = (loops.busy_s[here] + behind_s <= period_s) & (need_s <= left_over_s + slack_s)
            total_s = np.where(can, rows["path_s"][here] + ways_s[place], np.inf)
            row = int(here[total_s.argmin()])
            picked.append(row)
            left_over_s += period_s - loops.waited_s[row]
            left_over_s = min(left_over_s, period_s - loops.busy_s[row])
            start, devices = rows["end"][row], devices - axis.takes[rows["submesh"][row]]
        return np.array(picked)
