"""Stages of a short period, beside those of the formula of `inter_op`.

The formula takes a stage for as slow as the microbatches that it waits for. Where transfers take long that
rules out stages that wait while their neighbours are fast (`critical_loops`). So for periods from the
shortest that there is upwards, and for each number of stages, one plan is made here, for the simulator to
judge.

Left out: of the plans with a period, the one with the shortest way; each stage is chosen as if what follows
had no more to respect than the period.
"""

import math
from collections.abc import Iterator

import numpy as np

from launcher.autopar.inter_op.critical_loops import Loops, Within
from launcher.autopar.inter_op.stage_table import StageChoice, StageTable, that_fit_in_all
from launcher.autopar.programs.schedules import AbstractSchedule, OneForwardOneBackward, ZbH1

_PERIODS = (1.0, 1.01, 1.02, 1.04, 1.08)  # times the shortest
_NEAR = 1.03  # times the least, by their periods: plans worth judging
_MOST_PLANS = 12


def plans_by_period(
    table: StageTable, schedule: AbstractSchedule, num_microbatches: int, room_bytes: np.ndarray,
    known_s: float,
) -> list[tuple[StageChoice, ...]]:  # fmt: skip
    """Some plans of short periods, the most promising first.

    Args:
        room_bytes: there is on a device, by row of the table.
        known_s: that a step should stay below.
    """
    if not isinstance(schedule, OneForwardOneBackward | ZbH1) or not math.isfinite(known_s):
        return []
    loops = Loops.of(table.pieces, table.rows, schedule)
    most_s = known_s / num_microbatches
    shortest = loops.shortest(most_s)
    if shortest is None:
        return []
    found: dict[tuple[int, ...], float] = {}
    for period_s in (shortest[1].period_s * factor for factor in _PERIODS):
        if period_s > most_s:
            break
        for within in _that_fit(loops, period_s, schedule, num_microbatches, room_bytes):
            for plan in within.plans():
                rows = within.loops.rows[plan]
                found[tuple(rows["number"].tolist())] = (
                    rows["path_s"].sum()
                    + (num_microbatches - 1) * within.loops.period_s(plan)
                    + rows["once_s"].max()
                )
    near_s = _NEAR * min(found.values(), default=math.inf)
    best = sorted((step_s, plan) for plan, step_s in found.items() if step_s <= near_s)
    return [tuple(table.choices[number] for number in plan) for _, plan in best[:_MOST_PLANS]]


def _that_fit(
    loops: Loops, period_s: float, schedule: AbstractSchedule, m: int, room_bytes: np.ndarray
) -> Iterator[Within]:
    """The plans within a period: of ZB-H1 by the number of stages, on which depends what fits."""
    within = loops.within(period_s)
    if not isinstance(schedule, ZbH1):
        yield within
        return
    pieces = loops.pieces
    for number in within.numbers().tolist():
        rows = that_fit_in_all(number, pieces, loops.rows, schedule, m, room_bytes)
        if len(rows):
            yield Loops.of(pieces, rows, schedule).within(period_s)
