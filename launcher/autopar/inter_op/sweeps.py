"""The DP over stages, as sweeps over the table of all ways to run them (Alpa, OSDI 2022, section 5.2).

Stages from the last to the first, with s, the number of stages from k on, telling how many microbatches a
stage has in flight:

    F(s, k, d) = least over j, submesh, option of
                 value(k..j, submesh, option)  combined with  F(s - 1, j, d - devices)

What is combined, and how, is the caller's: `inter_op` adds up seconds, `plan_bounds` bounds them from below.
"""

import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np

from launcher.autopar.inter_op.stage_table import Pieces


def sweep(pieces: Pieces, rows: np.ndarray, values: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """One pass of the DP: F(s, k, d) of the module's head, infinite where there is no plan.

    Args:
        values: what stages cost, one value per row, or one per row and number of stages.
        combine: `np.add` for their sum, `np.maximum` for the greatest of them.
    """
    places = np.array([rows["start"], rows["end"], rows["submesh"]])
    heads = np.flatnonzero(np.diff(places, prepend=-1).any(axis=0))
    values = np.where(rows["fits"], np.atleast_2d(values.T).T, np.inf)
    cheapest = np.minimum.reduceat(values, heads, axis=0)  # of the options of a place

    def step(live: np.ndarray, stages: int, behind: np.ndarray) -> np.ndarray:
        return combine(behind, cheapest[live, stages - 1, None], out=behind)

    fits = np.logical_or.reduceat(rows["fits"], heads, axis=0)
    return _sweep(pieces, rows[heads], fits, step)


def trace_back(
    pieces: Pieces, rows: np.ndarray, values: np.ndarray, sums: np.ndarray, num_stages: int
) -> np.ndarray:
    """The numbers of the rows, first stage first, of the plan of so many stages with the least sum.

    Args:
        sums: what `sweep` found for the values with `np.add`.
    """
    axis, submesh = pieces.axis, rows["submesh"]
    picked, start, devices = [], 0, axis.all_devices
    for stages in range(num_stages, 0, -1):
        here = np.arange(*np.searchsorted(rows["start"], (start, start + 1)))
        here = here[rows["fits"][here, stages - 1] & axis.has_room[submesh[here], devices]]
        own = values[here] if values.ndim == 1 else values[here, stages - 1]
        total = own + sums[stages - 1, rows["end"][here], devices - axis.takes[submesh[here]]]
        first = here[np.lexsort((rows["once_s"][here], total))[0]]
        picked.append(first)
        start, devices = rows["end"][first], devices - axis.takes[submesh[first]]
    return np.array(picked)


def sweep_longest(
    pieces: Pieces, rows: np.ndarray, own: np.ndarray, path: np.ndarray
) -> np.ndarray:
    """The same for the least over plans of the greatest of `own_i + sum of path_j before i`."""

    def step(live: np.ndarray, stages: int, behind: np.ndarray) -> np.ndarray:
        del stages
        behind += path[live, None]
        return np.maximum(behind, np.where(np.isinf(behind), behind, own[live, None]), out=behind)

    return _sweep(pieces, rows, rows["fits"], step)


def sweep_waiting(
    pieces: Pieces, rows: np.ndarray, own: np.ndarray, path: np.ndarray, trip: np.ndarray,
    wait: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """The same where a stage also waits for what is behind it.

    Args:
        trip: of each row; the least sum of it behind a stage is what the stage may have to wait for.
        wait: from that, called as (numbers of rows, stages behind them, sums), to seconds added to `own`.
    """

    def step(live: np.ndarray, stages: int, behind: np.ndarray, sums: np.ndarray) -> np.ndarray:
        waits = own[live, None] + wait(live, stages - 1, sums)
        return np.maximum(behind + path[live, None], waits, out=behind)

    return _sweep(pieces, rows, rows["fits"], step, sweep(pieces, rows, trip, np.add))


def sweep_with(
    pieces: Pieces, rows: np.ndarray, step: Callable[..., np.ndarray], *others: np.ndarray
) -> np.ndarray:
    """The same with the caller's own way to combine.

    Args:
        step: from the numbers of rows, how many stages there are from them on, and what is behind them
            (rows, devices) in this table and in the others, to what is at them.
    """
    return _sweep(pieces, rows, rows["fits"], step, *others)


def _sweep(
    pieces: Pieces, rows: np.ndarray, fits: np.ndarray, step, *others: np.ndarray
) -> np.ndarray:
    """The DP, of which only those entries are there that rows which fit are at, or lead to.

    Args:
        step: from rows and what is behind them, in this table and in `others`, to what is at them.
    """
    start, end, axis = rows["start"], rows["end"], pieces.axis
    spans = [_spans(start, end, fitting) for fitting in fits.T]
    table = _table(pieces, spans)
    used, submesh = np.unique(rows["submesh"], return_inverse=True)
    longest = max((ends.stop - ends.start for _, ends in spans), default=0)
    tables = (table, *others)
    behind = np.full((len(tables), len(used), longest, axis.width), np.inf)
    for stages, (_, ends) in enumerate(spans, start=1):
        live = np.flatnonzero(fits[:, stages - 1])
        if not len(live):
            continue
        for index, name in enumerate(used):
            room, rest = axis.moves(name)
            for there, known in zip(behind, tables, strict=True):
                there[index, : ends.stop - ends.start, room] = known[stages - 1, ends, rest]
        places = submesh[live], end[live] - ends.start
        ways = step(live, stages, *(there[places] for there in behind))  # (rows, devices)
        groups = np.flatnonzero(np.diff(start[live], prepend=-1))
        table[stages, start[live[groups]]] = np.minimum.reduceat(ways, groups, axis=0)
    return table


def _spans(start: np.ndarray, end: np.ndarray, fits: np.ndarray) -> tuple[slice, slice]:
    """Where the rows that fit start, and where they end."""
    if not fits.any():
        return slice(0, 0), slice(0, 0)
    start, end = start[fits], end[fits]
    return slice(start.min(), start.max() + 1), slice(end.min(), end.max() + 1)


def _table(pieces: Pieces, spans: Sequence[tuple[slice, slice]]) -> np.ndarray:
    """(stages, start, devices left), without plans yet.

    Nobody writes to the rest, and what nobody writes to takes no memory: where the number of stages is
    given, that is most of it.
    """
    table = _untouched((pieces.max_stages + 1, pieces.num_pieces + 1, pieces.axis.width))
    table[0] = table[:, 0] = np.inf
    for stages, (starts, ends) in enumerate(spans, start=1):
        table[stages - 1, ends] = table[stages, starts] = np.inf
    table[0, -1, : 1 if pieces.use_all_devices else None] = 0.0  # behind the last stage
    return table


def _untouched(shape: tuple[int, ...]) -> np.ndarray:
    """Memory that is taken as it is written to: of NumPy's own, an entry takes the huge page it lies in."""
    values = mmap.mmap(-1, math.prod(shape) * np.dtype(float).itemsize)
    return np.frombuffer(values, float).reshape(shape)
