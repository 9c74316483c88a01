"""A time that no plan of a search space can beat: what the optimality gap is stated against.

With F, I, W, c as in `pace`, t = F + I + W, u for the end of a step, and m microbatches, every program of a
schedule takes at least, for each stage i (a longest path through the simulator's graph; `before` i: the
stages and cuts that the first microbatch passes on its way to i, and the last one on its way back):

    1F1B, GPipe     sum of t + c before i,      then m t_i
    ZB-H1           sum of F + c / 2 before i,  then m t_i + u_i
    ZB-H1           sum of F + I + c before i,  then m (F_i + I_i)
    1F1B            ceil(m / p) (sum of all t + c):      p microbatches at most are between their first
                                                         forward and last backward
    ZB-H1           ceil(m / p) (sum of all F + I + c):  likewise, to their last input gradient
    interleaved     1 / p (sum of all m t, and of (p - 1 - j) (t + c) of the stages j < p): the mean over
                    p submeshes of their work and of what goes before it

and u of the first stage (for ZB-H1 with a W) after a way back. For each line the DP of `stage_table` finds
the least over all plans of its greatest value; the greatest line of the best number of stages p counts.

Left out: that lines add up, what stages that follow i still do, gradients and norms sent between stages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launcher.autopar.pace import waited_for_s
from launcher.autopar.schedules import (
    AbstractSchedule,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
)
from launcher.autopar.stage_table import Pieces, microbatch_time_s, sweep, sweep_longest

_PRICES = range(-4, 5)  # on memory that stages share, as powers of two


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the module's head, as the greatest over stages of own_s and the path_s before.

    Attributes:
        path_s: By row, or by row and the number of stages behind it.
        table: The least of the stages behind, by their number, where they start, and their devices.
        factor: From the number of all stages to what the line is multiplied by.
    """

    own_s: np.ndarray
    path_s: np.ndarray
    table: np.ndarray
    factor: Callable[[int], float] = lambda num_stages: 1.0

    def way_s(self, rows: np.ndarray, behind: int) -> np.ndarray:
        """The path_s of rows with so many stages behind them."""
        return self.path_s[rows] if self.path_s.ndim == 1 else self.path_s[rows, behind]

    def by_stages(self) -> np.ndarray:
        """What no plan can beat, by its number of stages."""
        least_s = self.table[:, 0, -1]
        return least_s * [self.factor(max(n, 1)) for n in range(len(least_s))]


def least_step_s(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int,
    memory_bytes: float = math.inf,
) -> float:  # fmt: skip
    """No plan made of the rows takes less under the schedule; infinite where there is none.

    Args:
        rows: those that fit into memory, as `stage_table.that_fit` returns them.
        memory_bytes: of one device.
    """
    if not len(rows):
        return math.inf
    if schedule.virtual_stages > 1 and pieces.num_stages is not None:
        return _sharing_memory_s(pieces, rows, schedule, num_microbatches, memory_bytes)
    lines = lines_of(pieces, rows, schedule, num_microbatches)
    return float(np.max([line.by_stages() for line in lines], axis=0).min())


def lines_of(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int
) -> list[Line]:
    """The lines of a schedule."""
    if isinstance(schedule, Interleaved):
        return [_mean_of_submeshes(pieces, rows, schedule, num_microbatches)]
    m, first = num_microbatches, rows["start"] == 0

    def longest(own_s: np.ndarray, path_s: np.ndarray) -> Line:
        return Line(own_s, path_s, sweep_longest(pieces, rows, own_s, path_s))

    def waves(trip_s: np.ndarray) -> Line:
        table = sweep(pieces, rows, trip_s, np.add)
        return Line(np.zeros(len(rows)), trip_s, table, lambda p: math.ceil(m / p))

    work_s, arrived_s = rows["forward_s"] + rows["backward_s"], rows["received_s"]
    if isinstance(schedule, ZbH1):
        waited_s = waited_for_s(rows)
        last_s = np.where(first, rows["once_s"] + rows["weight_s"], 0.0)
        inputs_s = m * (work_s - rows["weight_s"]) + arrived_s
        return [
            longest(m * work_s + arrived_s / 2 + rows["once_s"], rows["forward_s"] + arrived_s / 2),
            longest(inputs_s + last_s, waited_s + last_s),
            waves(waited_s),
        ]
    trip_s, last_s = microbatch_time_s(rows), np.where(first, rows["once_s"], 0.0)
    ways = [longest(m * work_s + arrived_s + last_s, trip_s + last_s)]
    return [*ways, waves(trip_s)] if isinstance(schedule, OneForwardOneBackward) else ways


def _mean_of_submeshes(
    pieces: Pieces, rows: np.ndarray, schedule: Interleaved, num_microbatches: int
) -> Line:
    """The line of the interleaved schedule; what goes before a submesh's work only for a given p."""
    v, nothing = schedule.virtual_stages, np.zeros(len(rows))
    path_s = num_microbatches * (rows["forward_s"] + rows["backward_s"])
    if pieces.num_stages is not None:
        p, behind = pieces.num_stages // v, np.arange(pieces.num_stages)
        before = np.maximum(p - pieces.num_stages + behind, 0)  # p - 1 less the stage's number
        path_s = path_s[:, None] + microbatch_time_s(rows)[:, None] * before
    table = sweep(pieces, rows, path_s, np.add)
    return Line(nothing, path_s, table, lambda num_stages: 1 / max(num_stages // v, 1))


def _sharing_memory_s(
    pieces: Pieces, rows: np.ndarray, schedule: Interleaved, num_microbatches: int,
    memory_bytes: float,
) -> float:  # fmt: skip
    """The line of the interleaved schedule where the stages of p submeshes share p times the memory.

    With a price on bytes, what all stages cost, less the price of all that p submeshes have, is a bound at
    every price (Lagrange's relaxation); the best of some prices is taken.
    """
    line = _mean_of_submeshes(pieces, rows, schedule, num_microbatches)
    (least_s,) = line.by_stages()[pieces.num_stages :]
    p, factor = pieces.num_stages // schedule.virtual_stages, line.factor(pieces.num_stages)
    if math.isinf(least_s) or math.isinf(memory_bytes):
        return float(least_s)

    def bound_s(price_s: float) -> float:
        paid_s = line.path_s + price_s * rows["need_bytes"]
        total_s = sweep(pieces, rows, paid_s, np.add)[pieces.num_stages, 0, -1]
        return float(total_s - price_s * p * memory_bytes) * factor

    # In units of a price at which a full device costs as much as its work.
    unit = least_s / factor / (p * memory_bytes)
    return max(least_s, *(bound_s(unit * 2.0**k) for k in _PRICES))
