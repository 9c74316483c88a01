"""A time that no plan of a search space can beat: what the optimality gap is stated against.

With F, I, W, c as in `pace`, t = F + I + W, u for the end of a step, and m microbatches, every program of a
schedule takes at least, for each stage i (a longest path through the simulator's graph; `before` i: the
stages and cuts that the first microbatch passes on its way to i, and the last one on its way back):

    all but ZB-H1   sum of t + c before i,      then m t_i  (of interleaved ones where p > 1)
    ZB-H1           sum of F + c / 2 before i,  then m t_i + u_i
    ZB-H1           sum of F + I + c before i,  then m (F_i + I_i)
    1F1B            ceil(m / p) (sum of all t + c):      p microbatches at most are between their first
                                                         forward and last backward
    ZB-H1           ceil(m / p) (sum of all F + I + c):  likewise, to their last input gradient
    interleaved     1 / p (sum of all m t + u, and of (p - 1 - j) (t + c) of the stages j < p): the mean
                    over p submeshes of their work and of what goes before it

and u of the first stage (for ZB-H1 with a W) after a way back. For each line the DP of `stage_table` finds
the least over all plans of its greatest value; the greatest line of the best number of stages p counts.

Left out: that lines add up, what stages that follow i still do, gradients and norms sent between stages.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.inter_op.pace import waited_for_s
from launcher.autopar.inter_op.shared_memory import MemoryPrices, memory_prices
from launcher.autopar.inter_op.stage_table import Pieces, microbatch_time_s
from launcher.autopar.inter_op.sweeps import sweep, sweep_longest
from launcher.autopar.programs.schedules import (
    AbstractSchedule,
    Interleaved,
    OneForwardOneBackward,
    ZbH1,
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the module's head, as the greatest over stages of own_s and the path_s before.

    Attributes:
        path_s: By row, or by row and the number of stages behind it.
        table: The least of the stages behind, by their number, where they start, and their devices.
        prices: What path_s has of prices on memory.
        factor: From the number of all stages to what the line is multiplied by.
    """

    own_s: np.ndarray
    path_s: np.ndarray
    table: np.ndarray
    prices: MemoryPrices | None = None
    factor: Callable[[int], float] = lambda num_stages: 1.0

    @property
    def offset_s(self) -> float:
        """Added to the greatest, for the prices."""
        return -self.prices.all_s if self.prices else 0.0

    def way_s(self, rows: np.ndarray, behind: int) -> np.ndarray:
        """The path_s of rows with so many stages behind them."""
        return self.path_s[rows] if self.path_s.ndim == 1 else self.path_s[rows, behind]

    def by_stages(self) -> np.ndarray:
        """What no plan can beat, by its number of stages."""
        least_s = self.table[:, 0, -1] + self.offset_s
        return least_s * [self.factor(max(n, 1)) for n in range(len(least_s))]


@dataclass(frozen=True, slots=True, eq=False)
class Crowded:
    """Devices that slow one another down, so that a path is as fast as whoever waits meanwhile lets it be.

    What all of them do together is bounded all the same: no step is shorter than their mean work.

    Attributes:
        shares: Of all devices, by submesh.
        speed_up: How many times as much as priced they can do together at the very most.
    """

    shares: np.ndarray
    speed_up: float


def least_step_s(lines: Sequence[Line]) -> float:
    """No plan takes less than the lines say; infinite where there is none."""
    return float(np.max([line.by_stages() for line in lines], axis=0).min()) if lines else 0.0


def lines_of(
    pieces: Pieces, rows: np.ndarray, schedule: AbstractSchedule, num_microbatches: int,
    memory_bytes: float = math.inf, crowded: Crowded | None = None,
) -> list[Line]:  # fmt: skip
    """The lines of a schedule.

    Args:
        rows: those that fit into memory, as `stage_table.that_fit` returns them.
        memory_bytes: of one device.
        crowded: where devices slow one another down, for which there is but the mean of their work.
    """
    m, first = num_microbatches, rows["start"] == 0
    if crowded is not None and not isinstance(schedule, Interleaved):
        return [_mean_of_devices(pieces, rows, m, crowded)]

    def longest(own_s: np.ndarray, path_s: np.ndarray) -> Line:
        return Line(own_s, path_s, sweep_longest(pieces, rows, own_s, path_s))

    def waves(trip_s: np.ndarray) -> Line:
        table = sweep(pieces, rows, trip_s, np.add)
        return Line(np.zeros(len(rows)), trip_s, table, factor=lambda p: math.ceil(m / p))

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
    lines = []
    if isinstance(schedule, Interleaved):
        lines = [_mean_of_submeshes(pieces, rows, schedule, m, memory_bytes, crowded)]
        if crowded is not None or (pieces.num_stages or 0) <= schedule.virtual_stages:
            return lines  # all on one submesh they send nothing, so that c is none of their time
    ways = [*lines, longest(m * work_s + arrived_s + last_s, trip_s + last_s)]
    return [*ways, waves(trip_s)] if isinstance(schedule, OneForwardOneBackward) else ways


def _mean_of_submeshes(
    pieces: Pieces, rows: np.ndarray, schedule: Interleaved, num_microbatches: int,
    memory_bytes: float, crowded: Crowded | None,
) -> Line:  # fmt: skip
    """The line of the interleaved schedule; what goes before a submesh's work only for a given p.

    With prices on the bytes of a submesh, what all stages cost, less the price of all that the submeshes
    have, is a bound too: Lagrange's relaxation of memory that stages share (`shared_memory`).
    """
    v, prices = schedule.virtual_stages, None
    speed_up = 1.0 if crowded is None else crowded.speed_up
    path_s = num_microbatches * (rows["forward_s"] + rows["backward_s"]) + rows["once_s"]
    if pieces.num_stages is not None:
        p, behind = pieces.num_stages // v, np.arange(pieces.num_stages)
        before = np.maximum(p - pieces.num_stages + behind, 0)  # p - 1 less the stage's number
        if crowded is not None:
            before[:] = 0
        path_s = path_s[:, None] + microbatch_time_s(rows)[:, None] * before
        prices = memory_prices(pieces, rows, path_s, schedule, num_microbatches, memory_bytes)
        path_s = path_s + prices.rows_s
    return Line(
        own_s=np.zeros(len(rows)),
        path_s=path_s,
        table=sweep(pieces, rows, path_s, np.add),
        prices=prices,
        factor=lambda num_stages: 1 / max(num_stages // v, 1) / speed_up,
    )


def _mean_of_devices(pieces: Pieces, rows: np.ndarray, m: int, crowded: Crowded) -> Line:
    """The mean of what the devices do, as fast as they can."""
    work_s = m * (rows["forward_s"] + rows["backward_s"]) + rows["once_s"]
    share_s = work_s * crowded.shares[rows["submesh"]] / crowded.speed_up
    return Line(np.zeros(len(rows)), share_s, sweep(pieces, rows, share_s, np.add))
