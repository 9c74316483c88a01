"""A sharper bound, for schedules without virtual stages: plans apart by their period.

The bound of all plans is the least over ranges of the period (`critical_loops`) of the bound of the plans in
that range. With a period that is no longer, stages share the work more evenly, and what lies before and
behind a stage cannot be small. What the loops say (`loop_bounds`) is mostly enough. Where it is not, the
lines of `plan_bounds` count too, and these, with the words from there and q for the number of stages behind i
(again longest paths through the simulator's graph):

    GPipe    sum of all t + c,  then (m - 1) t_i
    1F1B     sum of t + c before i,  then m t_i,  and twice what a trip to the end and back takes longer than
             the work meanwhile: at the beginning q forwards, at the end q backwards
    ZB-H1    sum of F + c / 2 before i,  then m t_i + u_i,  and the same at the beginning alone

A trip is the least sum behind i of t + c, for ZB-H1 of F + I + c.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from launcher.autopar.inter_op.critical_loops import Loops
from launcher.autopar.inter_op.loop_bounds import least_step_s
from launcher.autopar.inter_op.pace import busy_s, waited_for_s
from launcher.autopar.inter_op.plan_bounds import lines_of
from launcher.autopar.inter_op.stage_table import Pieces, microbatch_time_s, that_fit_in_all
from launcher.autopar.inter_op.sweeps import sweep, sweep_waiting
from launcher.autopar.programs.schedules import AbstractSchedule, GPipe, ZbH1

_NUM_RANGES = 6
_FAR = 1.1  # times the mean time of a microbatch: longer periods are none of a good plan
_CLOSE = 0.98  # of a plan's time: a bound that need not be sharper


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """What no plan of a part of a space can beat; `sharper` makes a better one, no better than it is told."""

    least_s: float
    sharper: Callable[[float], float] | None = None

    def __lt__(self, other: "Bound") -> bool:
        return self.least_s < other.least_s


def least_bound_s(bounds: Iterable[Bound], step_s: float) -> float:
    """What no plan of all parts can beat: the loosest bounds are made sharper as far as `step_s` needs it."""
    heap = list(bounds)
    heapq.heapify(heap)
    while heap[0].least_s < _CLOSE * step_s and heap[0].sharper is not None:
        loosest = heap[0]
        heapq.heapreplace(heap, Bound(max(loosest.least_s, loosest.sharper(step_s))))
    return heap[0].least_s


def by_period_s(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int,
    room_bytes: np.ndarray, enough_s: float,
) -> float:  # fmt: skip
    """What no plan can beat.

    Args:
        rows: those that fit into memory, as `stage_table.that_fit` returns them.
        room_bytes: there is on a device, by row.
        enough_s: a bound that is as good as any above it.
    """
    if not isinstance(schedule, ZbH1):
        return _of_rows_s(pieces, rows, schedule, num_microbatches, enough_s)
    # What a stage holds depends on the number of all stages.
    bound_s = enough_s
    for number in pieces.numbers_of_stages:
        fitting = that_fit_in_all(number, pieces, rows, schedule, num_microbatches, room_bytes)
        if len(fitting):
            of_number_s = _of_rows_s(pieces, fitting, schedule, num_microbatches, bound_s)
            bound_s = min(bound_s, of_number_s)
    return bound_s


def _of_rows_s(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int, enough_s: float
) -> float:  # fmt: skip
    loops, m = Loops.of(pieces, rows, schedule), num_microbatches
    longest_s = float(loops.busy_s.max() + loops.waited_s.max())  # no plan's period is longer
    far_s = min(_FAR * enough_s / m, longest_s)
    shortest = loops.shortest(far_s)
    low_s = far_s if shortest is None else shortest[0]
    bound_s, edges_s = enough_s, np.geomspace(low_s, far_s, _NUM_RANGES + 1)
    for low_s, high_s in pairwise((*edges_s.tolist(), longest_s)):
        within = loops.within(high_s)
        numbers, wanted_s = within.numbers(), min(bound_s, _CLOSE * enough_s)
        least_s = least_step_s(within, m, low_s, wanted_s)
        if (least_s[numbers] < wanted_s).any():  # or the lines need not say more
            least_s = np.maximum(least_s, _by_stages(pieces, within.loops.rows, schedule, m))
        bound_s = min(bound_s, float(least_s[numbers].min(initial=np.inf)))
    return bound_s


def _by_stages(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int
) -> np.ndarray:
    """The greatest of all lines, by the number of stages."""
    own = _own_line(pieces, rows, schedule, num_microbatches)
    lines = [line.by_stages() for line in lines_of(pieces, rows, schedule, num_microbatches)]
    return np.max([own, *lines], axis=0)


def _own_line(pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, m: int) -> np.ndarray:
    work_s, trip_s, arrived_s = busy_s(rows), microbatch_time_s(rows), rows["received_s"]
    last_s = np.where(rows["start"] == 0, rows["once_s"], 0.0)
    forward_s, backward_s = rows["forward_s"][:, None], rows["backward_s"][:, None]

    def until_return(live: np.ndarray, behind: int, trips_s: np.ndarray) -> np.ndarray:
        return np.maximum(trips_s - behind * forward_s[live], 0.0)

    def both(live: np.ndarray, behind: int, trips_s: np.ndarray) -> np.ndarray:
        first_s = until_return(live, behind, trips_s)
        at_end_s = np.maximum(trips_s - behind * backward_s[live], 0.0)
        # With so few microbatches the last forward comes before the first backward.
        return first_s + at_end_s if m >= behind + 2 else np.maximum(first_s, at_end_s)

    match schedule:
        case GPipe():
            sums = sweep(pieces, rows, trip_s + last_s, np.add)
            table = sums + sweep(pieces, rows, (m - 1) * work_s, np.maximum)
        case ZbH1():
            own_s = m * work_s + arrived_s / 2 + rows["once_s"]
            path_s, trip_s = rows["forward_s"] + arrived_s / 2, waited_for_s(rows)
            table = sweep_waiting(pieces, rows, own_s, path_s, trip_s, until_return)
        case _:
            own_s = m * work_s + arrived_s + last_s
            table = sweep_waiting(pieces, rows, own_s, trip_s + last_s, trip_s, both)
    return table[:, 0, -1]
