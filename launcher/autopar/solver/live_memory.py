"""The memory that choices hold over time, and the limit it must keep at every point.

Time is a row of points. A node holds bytes over its live range, how many depends on its strategy; nodes
that were merged hold the sum. So a node's use is a step function of time per strategy, written as its
changes. `room` is what is free at each point before any node has chosen.

Only points where the live set is largest between a birth and a death can be the first to overflow, so
the others are left out; so are the points that overflow whatever is chosen cannot reach
(`tightened`). Nodes whose strategies all hold the same at the points left have no part in the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

TOLERANCE = 1e-12  # of the limit: rounding in sums of bytes


@dataclass(frozen=True, slots=True)
class LiveUse:
    """From point `times[e]` on, strategy p holds `change[e, p]` bytes more than before.

    Times rise, and all are points.
    """

    times: np.ndarray
    change: np.ndarray

    def levels(self) -> np.ndarray:
        """The bytes held from each of `times` until the next, per strategy."""
        return self.change.cumsum(axis=0)

    def of(self, strategies: np.ndarray) -> "LiveUse":
        """The use with other strategies, each given by the number of an old one."""
        return LiveUse(self.times, self.change[:, strategies])


@dataclass(frozen=True, slots=True)
class Memory:
    """`room[t]` is free at point t; `uses[i]` is what node i takes, None where it takes nothing."""

    limit: float
    room: np.ndarray
    uses: tuple[LiveUse | None, ...]

    @classmethod
    def of_intervals(
        cls, usages: Sequence[np.ndarray], intervals: np.ndarray, limit: float
    ) -> "Memory":
        """Node i holds `usages[i][p]` bytes from `intervals[i][0]` up to, not including, `[1]`."""
        intervals = np.asarray(intervals, np.int64).reshape(len(usages), 2)
        live = intervals[:, 0] < intervals[:, 1]
        points = _largest_live_sets(intervals[live])
        bounds = np.searchsorted(points, intervals)
        uses = tuple(
            _while_live(usages[i], bounds[i], len(points)) if live[i] else None
            for i in range(len(usages))
        )
        return cls(float(limit), np.full(len(points), float(limit)), uses)

    def used(self, choice: Sequence[int]) -> np.ndarray:
        """Bytes that a choice takes at each point."""
        taken = [(u, p) for u, p in zip(self.uses, choice, strict=True) if u is not None]
        if not taken:
            return np.zeros(len(self.room))
        times = np.concatenate([use.times for use, _ in taken])
        change = np.concatenate([use.change[:, pick] for use, pick in taken])
        return np.bincount(times, weights=change, minlength=len(self.room)).cumsum()

    def excess(self, choice: Sequence[int]) -> float:
        """By how many bytes a choice exceeds the limit at its worst point; at most 0 where it fits."""
        return float((self.used(choice) - self.room).max(initial=-np.inf))

    @property
    def tolerance(self) -> float:
        return TOLERANCE * max(1.0, abs(self.limit))

    @property
    def shortage(self) -> float:
        """Bytes missing even where every node takes its least: more than 0 proves that nothing fits."""
        least = self._total(lambda levels: levels.min(axis=1))
        return float((least - self.room).max(initial=-np.inf))

    def tightened(self) -> "Memory":
        """Count every node's least use as taken, and leave out points that cannot overflow."""
        least = self._total(lambda levels: levels.min(axis=1))
        most = self._total(lambda levels: levels.max(axis=1))
        points = np.flatnonzero(most > self.room + self.tolerance)
        uses = tuple(None if use is None else _above_least(use, points) for use in self.uses)
        return replace(self, room=(self.room - least)[points], uses=uses)._without_idle_points()

    def _without_idle_points(self) -> "Memory":
        """Join points between which nothing changes; the least room among them counts."""
        times = [use.times for use in self.uses if use is not None]
        if not times:
            # Whatever is short of room stays short; nothing else can be.
            return replace(self, room=self.room[self.room < 0])
        moving = np.unique(np.concatenate(times))
        room = np.minimum.reduceat(self.room[moving[0] :], moving - moving[0])
        still = self.room[: moving[0]]
        if (still < 0).any():
            return self
        uses = tuple(
            None if use is None else LiveUse(np.searchsorted(moving, use.times), use.change)
            for use in self.uses
        )
        return replace(self, room=room, uses=uses)

    def _total(self, extreme) -> np.ndarray:
        """The sum over nodes of the least, or the most, that each holds."""
        total = np.zeros(len(self.room))
        for use in self.uses:
            if use is not None:
                np.add.at(total, use.times, np.diff(extreme(use.levels()), prepend=0.0))
        return total.cumsum()


def joined(parts: Sequence[LiveUse]) -> LiveUse | None:
    """The sum of uses over the same strategies."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    times = np.concatenate([part.times for part in parts])
    order = np.argsort(times, kind="stable")
    times, change = times[order], np.concatenate([part.change for part in parts])[order]
    first = np.flatnonzero(np.diff(times, prepend=-1))
    return LiveUse(times[first], np.add.reduceat(change, first, axis=0))


def fitting(use: LiveUse, room: np.ndarray, tolerance: float) -> np.ndarray:
    """Which strategies fit into the room that is there, as a mask."""
    least_room = np.minimum.reduceat(room[use.times[0] :], use.times - use.times[0])
    return (use.levels() <= least_room[:, None] + tolerance).all(axis=0)


def _largest_live_sets(intervals: np.ndarray) -> np.ndarray:
    """Points after a birth whose next event is a death: every live set is part of one of theirs."""
    births, deaths = np.unique(intervals[:, 0]), np.unique(intervals[:, 1])
    next_death = np.searchsorted(deaths, births, side="right")
    # Of the births before the same death only the last has the largest set.
    last = np.diff(next_death, append=-1) != 0
    return births[last]


def _while_live(usage: np.ndarray, bounds: np.ndarray, num_points: int) -> LiveUse:
    """The use of a node between two points; an end after the last point is no change."""
    usage = np.asarray(usage, np.float64)
    count = 2 if bounds[1] < num_points else 1
    return LiveUse(bounds[:count], np.stack((usage, -usage))[:count])


def _above_least(use: LiveUse, points: np.ndarray) -> LiveUse | None:
    """What a node holds beyond its least, at some of the points, numbered anew."""
    if not len(points):
        return None
    levels = use.levels()
    levels = levels - levels.min(axis=1, keepdims=True)
    times = np.searchsorted(points, use.times)
    # Of several steps before the same point only the last counts.
    last = (np.diff(times, append=len(points)) != 0) & (times < len(points))
    times, change = times[last], np.diff(levels[last], axis=0, prepend=0.0)
    moves = (change != 0).any(axis=1)
    return LiveUse(times[moves], change[moves]) if moves.any() else None
