"""Inter-operator parallelism: cut the layers into stages and the cluster into submeshes.

The DP of Alpa (OSDI 2022, section 5.2). With B microbatches, t_i the seconds that stage i takes for each of
them at the steady pace of a schedule, c_i those that it adds once, on the way of a microbatch through the
pipeline, and u_i those of the end of a step, the plan found is the one of least

    T = sum_i c_i  +  (B - 1) * max_i t_i  +  max_i u_i

among those whose every stage fits into memory: fixed + (microbatches in flight) * stash. What t_i and c_i
are depends on the schedule (`Pace`); in the paper both are the time of a microbatch, forward and backward.
With both maxima bounded what is left is a sum, which the DP (`sweeps.sweep`) minimises.

The paper tries the bounds on max t_i one by one, from below. Here pairs of bounds are searched by
branch and bound, which is as exact and takes tens of passes of the DP instead of thousands: the
plan found under the loosest bounds of a rectangle stays the best wherever the bounds allow it, and
in the rest of the rectangle no plan has a smaller sum.

Left out: T is the time of a pipeline whose slowest stage never waits once it has begun. What uneven
stages and transfers that overlap with computation do to that is for the simulator to say.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.inter_op.plan_bounds import Line, least_step_s
from launcher.autopar.inter_op.stage_table import (
    ALPA,
    Pace,
    Pieces,
    StageChoice,
    StageOption,
    StageTable,
    make_pieces,
    make_rows,
    needed_bytes,
    that_fit,
)
from launcher.autopar.inter_op.sweeps import sweep, trace_back
from launcher.autopar.text.wording import noun_for, ranges, size
from launcher.errors import InfeasiblePlanError

# Where the search divides the range of max t_i at first, in multiples of the least there is: the
# best plan is mostly near it, and a good plan found early rules out most of the rest.
_FIRST_EDGES = (1.0, 1.02, 1.1, 1.3, 2.0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best plan and what it took to find it.

    Attributes:
        stages: None where no plan can take less than was asked for.
        bound_s: What no plan of the space can beat, by the caller's own bounds.
        table: What there was to choose from.
        lines: These bounds.
    """

    stages: tuple[StageChoice, ...] | None
    total_s: float
    bound_s: float
    num_candidates: int  # options of all ranges that were asked for
    num_too_large: int  # those of them that fit into memory nowhere in the pipeline
    num_passes: int  # of the DP
    table: StageTable
    lines: tuple[Line, ...]


def plan_stages(
    *,
    num_layers: int,
    submeshes: Sequence[tuple[int, int]],
    num_devices: int | Sequence[int],
    num_microbatches: int,
    memory_bytes: float | Sequence[float],
    options: Callable[[int, int, int], Sequence[StageOption]],
    cuts: Sequence[int],
    in_flight: Callable[[int, int], int],
    split: Callable[[int, int], int] = lambda stages_to_end, num_microbatches: 0,
    kinds: Sequence[int] = (),
    num_stages: int | None = None,
    weight: int | None = None,
    use_all_devices: bool = True,
    transfer_s: Callable[[int], float] = lambda cut: 0.0,
    pace: Pace = ALPA,
    lines: Callable[[Pieces, np.ndarray], Sequence[Line]] = lambda pieces, rows: (),
    worth_s: float = math.inf,
    cures: Callable[[float], str] = lambda times: "take less, or more devices",
) -> SearchResult:
    """Find the plan of least T, or raise `InfeasiblePlanError`.

    Args:
        submeshes: shapes that a stage may have, as (hosts, devices per host).
        num_devices: by kind of hosts, where there are several.
        memory_bytes: of one device; likewise.
        options: ways to run layers [first, last) on a submesh, or none; called as (first, last,
            submesh index), once for each stage beside which all layers and devices can be used up.
        cuts: layers before which a stage may begin, ascending, with 0 and `num_layers`.
        in_flight: how many microbatches a stage holds at once, called as (stages from it to the
            last, both counted; number of microbatches).
        split: likewise, how many of them are between the halves of their backward pass.
        kinds: of hosts, by submesh; all of one where it is left out.
        num_stages: forces the number of stages.
        weight: of max t_i in the objective; B - 1 where it is not given.
        use_all_devices: whether submeshes must add up to `num_devices`, or may leave some idle.
        transfer_s: seconds per microbatch for what crosses a cut, both ways.
        pace: what stages add to T.
        lines: from what fits to bounds that no plan of it can beat (`plan_bounds`).
        worth_s: a bound from which on the search is not worth it.
        cures: what to suggest where no plan fits into memory, by how many times as much is needed.
    """
    pieces = make_pieces(
        num_layers=num_layers, submeshes=submeshes, num_devices=num_devices, cuts=cuts,
        num_stages=num_stages, use_all_devices=use_all_devices, kinds=kinds,
    )  # fmt: skip
    choices = [
        StageChoice(first=first, last=last, submesh=submesh, option=option)
        for first, last, submesh in pieces.ranges()
        for option in options(first, last, submesh)
    ]
    rows = make_rows(pieces, choices, transfer_s, pace)
    held, halves = (
        np.array([count(s, num_microbatches) for s in pieces.numbers_of_stages])
        for count in (in_flight, split)
    )
    need_bytes = needed_bytes(rows, held, halves)
    kind_of = np.array(kinds or [0] * len(submeshes))
    room_bytes = np.atleast_1d(memory_bytes)[kind_of[rows["submesh"]]]
    fitting = that_fit(rows, need_bytes, room_bytes)
    bounds = tuple(lines(pieces, fitting)) if len(fitting) else ()
    least_s = least_step_s(bounds) if len(fitting) else math.inf
    best, total_s, num_passes = None, math.inf, 0
    if least_s < worth_s:
        weight = num_microbatches - 1 if weight is None else weight
        best, total_s, num_passes = _search(pieces, fitting, fitting["path_s"], weight)
    if best is None and (least_s < worth_s or math.isinf(least_s)):
        raise _infeasible(pieces, rows, need_bytes, room_bytes, num_microbatches, cures)
    return SearchResult(
        stages=None if best is None else tuple(choices[n] for n in fitting["number"][best]),
        total_s=total_s,
        bound_s=least_s,
        num_candidates=len(choices),
        num_too_large=len(rows) - len(fitting),
        num_passes=num_passes,
        table=StageTable(pieces, fitting, choices),
        lines=bounds,
    )


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle of values for max t_i and max u_i, and a lower bound on sum c_i in it."""

    min_slowest_s: float
    max_slowest_s: float
    min_once_s: float
    max_once_s: float
    sum_s: float

    def least_s(self, weight: int) -> float:
        """No plan whose maxima are in here takes less."""
        if self.min_slowest_s > self.max_slowest_s or self.min_once_s > self.max_once_s:
            return math.inf
        return self.sum_s + weight * self.min_slowest_s + self.min_once_s

    def below(self, best_s: float, weight: int) -> "_Box":
        """Drop the maxima with which a plan takes at least `best_s`."""
        slack_s = best_s - self.least_s(weight)
        slowest_s = self.min_slowest_s + slack_s / weight if weight else math.inf
        return replace(
            self,
            max_slowest_s=min(self.max_slowest_s, slowest_s),
            max_once_s=min(self.max_once_s, self.min_once_s + slack_s),
        )

    def without(
        self, slowest_s: float, once_s: float, sum_s: float, weight: int
    ) -> tuple["_Box", "_Box"]:
        """The maxima of which one is less than those of the plan with the least sum.

        They form an L, which is cut in two so that in the second part little is left to gain.
        """
        rest = replace(self, sum_s=sum_s)
        less_slow = replace(rest, max_slowest_s=math.nextafter(slowest_s, -math.inf))
        less_once = replace(rest, max_once_s=math.nextafter(once_s, -math.inf))
        if once_s - self.min_once_s < weight * (slowest_s - self.min_slowest_s):
            return less_slow, replace(less_once, min_slowest_s=slowest_s)
        return less_once, replace(less_slow, min_once_s=once_s)


def cheapest(table: StageTable, weight: int, price_s: np.ndarray) -> tuple[StageChoice, ...] | None:
    """The plan of least T where rows have a price besides, by the number of stages from them on."""
    rows = table.rows
    best, _, _ = _search(table.pieces, rows, rows["path_s"][:, None] + price_s, weight)
    return None if best is None else tuple(table.choices[number] for number in rows["number"][best])


def _search(
    pieces: Pieces, rows: np.ndarray, path_s: np.ndarray, weight: int
) -> tuple[np.ndarray | None, float, int]:
    """The numbers of the best plan's rows, if there is one, its T, and how many passes it took."""
    floor_s = _bottleneck(pieces, rows, rows["steady_s"])
    path_floor_s = _bottleneck(pieces, rows, path_s)
    once_floor_s = _bottleneck(pieces, rows, rows["once_s"])
    best, best_s, num_passes = None, math.inf, 3
    tickets = itertools.count()  # so that boxes with equal bounds are not compared
    queue = []  # a heap, as its boxes ascend
    for low, high in itertools.pairwise(_FIRST_EDGES):
        highest_s = floor_s * high if floor_s else math.inf
        box = _Box(floor_s * low, highest_s, once_floor_s, math.inf, sum_s=path_floor_s)
        queue.append((box.least_s(weight), next(tickets), box))
    while queue and queue[0][0] < best_s:
        box = heapq.heappop(queue)[2].below(best_s, weight)
        plan, sum_s = _least_sum(pieces, rows, path_s, box)
        num_passes += 1
        if plan is None:
            continue
        slowest_s, once_s = float(rows["steady_s"][plan].max()), float(rows["once_s"][plan].max())
        total_s = sum_s + weight * slowest_s + once_s
        if total_s < best_s:
            best, best_s = plan, total_s
        for rest in box.without(slowest_s, once_s, sum_s, weight):
            if rest.least_s(weight) < best_s:
                heapq.heappush(queue, (rest.least_s(weight), next(tickets), rest))
    return best, best_s, num_passes


def _bottleneck(pieces: Pieces, rows: np.ndarray, values: np.ndarray) -> float:
    """The least value that the greatest of a plan's stages can have."""
    return float(sweep(pieces, rows, values, np.maximum)[:, 0, -1].min())


def _least_sum(pieces: Pieces, rows: np.ndarray, path_s: np.ndarray, box: _Box):
    """The plan with the least sum under a box's loosest bounds: its rows' numbers and that sum."""
    inside = np.flatnonzero(
        (rows["steady_s"] <= box.max_slowest_s) & (rows["once_s"] <= box.max_once_s)
    )
    rows, path_s = rows[inside], path_s[inside]
    sums = sweep(pieces, rows, path_s, np.add)
    stages = int(sums[:, 0, -1].argmin())
    sum_s = float(sums[stages, 0, -1])
    if math.isinf(sum_s):
        return None, sum_s
    return inside[trace_back(pieces, rows, path_s, sums, stages)], sum_s


def _infeasible(
    pieces: Pieces, rows: np.ndarray, need_bytes: np.ndarray, room_bytes: np.ndarray,
    num_microbatches: int, cures: Callable[[float], str],
) -> InfeasiblePlanError:  # fmt: skip
    """The error for a search without a plan: what the least demanding one needs, on the device it lacks."""
    excess = need_bytes - room_bytes[:, None]
    least = _bottleneck(pieces, rows, excess)
    if math.isinf(least):
        return InfeasiblePlanError(
            f"some of the {pieces.cuts[-1]} layers have no sharding on any submesh that leaves enough "
            f"devices to the others (parallel.num_microbatches={num_microbatches}); set another number"
        )
    row, stages = np.argwhere(rows["fits"] & (excess == least))[0]
    least_bytes, memory_bytes = need_bytes[row, stages], room_bytes[row]
    over_bytes = math.ceil(least_bytes - memory_bytes)
    layers = range(pieces.cuts[rows["start"][row]], pieces.cuts[rows["end"][row]])
    return InfeasiblePlanError(
        f"the least demanding plan needs {size(least_bytes)} for {noun_for(len(layers), 'layer')} "
        f"{ranges(layers)} of {pieces.cuts[-1]} on a device that has {size(memory_bytes)}, "
        f"{size(over_bytes)} or {over_bytes:,} bytes too many "
        f"(parallel.num_microbatches={num_microbatches}); "
        f"{cures(least_bytes / memory_bytes)}"
    )
