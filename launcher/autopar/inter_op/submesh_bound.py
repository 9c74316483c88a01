"""Virtual stages that fill the memory of their submesh together: bounds, and the best options of some.

The v stages of submesh j do all its work, m t for each, after the first microbatch came to it, which takes
at least j times the shortest stage. Which layers they are made of is left open, but for their number: f_j(n)
is the least work of v stages of n layers together whose bytes fit into a device, by combining, stage after
stage, those options of each length that no other one beats in time and bytes. Then no plan takes less than

    min over n_j that add up to all layers of max over j of  (j * shortest + f_j(n_j))

Tight where layers are much alike. Left out: where the layers lie, and that one stage's workspace is not
another's (each counts with a v-th).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import numpy as np

from launcher.autopar.inter_op.judge import MOST_MISJUDGED, judged_s, num_passes
from launcher.autopar.inter_op.stage_table import (
    Pieces,
    StageChoice,
    StageOption,
    StageTable,
    in_flight_bytes,
    microbatch_time_s,
    unbeaten,
)
from launcher.autopar.programs.schedules import Interleaved

_MOST_PASSES = 20_000  # of microbatches through stages that the simulator may play


@dataclass(frozen=True, slots=True, eq=False)
class _Ways:
    """Ways to run so many layers: what each takes in seconds, and on a device in bytes."""

    layers: np.ndarray
    work_s: np.ndarray
    bytes: np.ndarray

    def unbeaten(self) -> "_Ways":
        """Those that no other with as many layers beats in both."""
        order = np.lexsort((self.bytes, self.work_s, self.layers))
        lengths, sizes = self.layers[order], self.bytes[order]
        is_kept = np.zeros(len(order), bool)
        for group in np.split(np.arange(len(order)), np.flatnonzero(np.diff(lengths)) + 1):
            least = np.minimum.accumulate(sizes[group])
            is_kept[group] = np.diff(least, prepend=np.inf) < 0
        return self.only(order[is_kept])

    def only(self, which: np.ndarray) -> "_Ways":
        return _Ways(self.layers[which], self.work_s[which], self.bytes[which])

    def beside(self, other: "_Ways", memory_bytes: float, worth_s: float) -> "_Ways":
        """One of these and one of the others on the same devices."""
        both = _Ways(
            np.add.outer(self.layers, other.layers).ravel(),
            np.add.outer(self.work_s, other.work_s).ravel(),
            np.add.outer(self.bytes, other.bytes).ravel(),
        )
        return both.only((both.bytes <= memory_bytes) & (both.work_s < worth_s)).unbeaten()


def busiest_submesh_s(
    pieces: Pieces, rows: np.ndarray, schedule: Interleaved, num_microbatches: int,
    memory_bytes: float, worth_s: float = math.inf,
) -> float:  # fmt: skip
    """The bound of the module's head.

    Args:
        rows: those that fit into memory, as `stage_table.that_fit` returns them.
        worth_s: a bound that is as good as any above it.
    """
    if not len(rows):
        return math.inf
    number, v = pieces.num_stages, schedule.virtual_stages
    submeshes = number // v
    shortest_s = float(microbatch_time_s(rows).min())
    num_layers = pieces.cuts[-1]
    least_s = np.full((submeshes, num_layers + 1), np.inf)  # f_j(n), and what is before
    for j in range(submeshes):
        held = tuple(
            schedule.stash_peak(i, number, num_microbatches) for i in range(j, number, submeshes)
        )
        ways = _together(
            rows, np.array(pieces.cuts), number, j, held, num_microbatches, memory_bytes, worth_s
        )
        inside = ways.layers <= num_layers
        np.minimum.at(least_s[j], ways.layers[inside], ways.work_s[inside] + j * shortest_s)
    return min(_shared_out_s(least_s, num_layers), worth_s)


def fastest_options_s(
    table: StageTable, schedule: Interleaved, num_microbatches: int,
    transfer_s: Callable[[int], float],
) -> float:  # fmt: skip
    """The least step time, over the ways to cut, if every stage had the least of its options in all.

    Less by what the simulator's short cuts may be wrong by; 0 where there are too many ways.
    """
    pieces = table.pieces
    num_ways = math.comb(pieces.num_pieces - 1, pieces.num_stages - 1)
    passes = num_ways * num_passes(schedule, pieces.num_stages, num_microbatches)
    if num_ways > 1 and passes > _MOST_PASSES:
        return 0.0
    least_s = math.inf
    for inner in itertools.combinations(range(1, pieces.num_pieces), pieces.num_stages - 1):
        stages = _with_fastest(table, (0, *inner, pieces.num_pieces))
        if stages is not None:
            least_s = min(least_s, judged_s(stages, schedule, num_microbatches, transfer_s))
    return (1 - MOST_MISJUDGED) * least_s


def _with_fastest(table: StageTable, ends: Sequence[int]) -> list[StageChoice] | None:
    """The stages between some pieces, each with the least of its options in all; None if one has none."""
    cuts, rows, stages = table.pieces.cuts, table.rows, []
    for start, end in pairwise(ends):
        own = rows[(rows["start"] == start) & (rows["end"] == end)]
        own = own[own["fits"][:, len(ends) - 2 - len(stages)]]
        if not len(own):
            return None
        least_s = {name: float(own[name].min()) for name in ("forward_s", "backward_s", "once_s")}
        fastest = StageOption(**least_s, fixed_bytes=0.0, stash_bytes=0.0, tag=None)
        ends_at = {"first": cuts[start], "last": cuts[end]}
        stages.append(StageChoice(**ends_at, submesh=0, option=fastest))
    return stages


def repacked(
    stages: Sequence[StageChoice], options: Callable[[int, int, int], Sequence[StageOption]],
    schedule: Interleaved, num_microbatches: int, memory_bytes: float,
) -> tuple[StageChoice, ...]:  # fmt: skip
    """The same ranges, those of each submesh with the options that fit together and take least."""
    number, submeshes = len(stages), len(stages) // schedule.virtual_stages
    packed = list(stages)
    for home in range(submeshes):
        own = range(home, number, submeshes)
        chosen = least_together(
            [options(stages[i].first, stages[i].last, stages[i].submesh) for i in own],
            [schedule.stash_peak(i, number, num_microbatches) for i in own],
            memory_bytes,
        )
        for stage, option in zip(own, chosen, strict=True):
            packed[stage] = replace(stages[stage], option=option)
    return tuple(packed)


def least_together(
    options: Sequence[Sequence[StageOption]], held: Sequence[int], memory_bytes: float
) -> tuple[StageOption, ...]:
    """One option for each stage of a submesh, those that take least of all that fit; there must be some.

    Args:
        held: microbatches in flight, by stage.
    """
    parts = [
        np.array([_parts(option, flying) for option in own])
        for own, flying in zip(options, held, strict=True)
    ]
    # What the stages behind take and need at least, and a time that can be had.
    rest = np.cumsum([part.min(axis=0) for part in parts[::-1]], axis=0)[::-1]
    rest = np.vstack([rest[1:], np.zeros(4)]) * [1.0, 1.0, 1.0, 0.0]
    enough_s = _by_price_s(parts, memory_bytes) * (1 + 1e-9)
    ways, sums = [()], np.zeros((1, 4))  # chosen options; seconds, running, ending, workspace
    for own, part, later in zip(options, parts, rest, strict=True):
        numbers = unbeaten(part)
        both = _added(sums[:, None], part[None, numbers]).reshape(-1, 4)
        worth = _fit(both + later, memory_bytes) & (both[:, 0] + later[0] <= enough_s)
        kept = np.flatnonzero(worth)[unbeaten(both[worth])]
        firsts, seconds = np.divmod(kept, len(numbers))
        ways = [
            (*ways[first], own[numbers[second]])
            for first, second in zip(firsts, seconds, strict=True)
        ]
        sums = both[kept]
    return ways[int(sums[:, 0].argmin())]


def _added(sums: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """What stages take and need together; of workspaces there is one at a time."""
    both = sums + parts
    both[..., 3] = np.maximum(sums[..., 3], parts[..., 3])
    return both


def _fit(sums: np.ndarray, memory_bytes: float) -> np.ndarray:
    return np.maximum(sums[..., 1] + sums[..., 3], sums[..., 2]) <= memory_bytes


def _by_price_s(parts: Sequence[np.ndarray], memory_bytes: float) -> float:
    """The least time of what fits where all stages pay one price for a byte; infinite if nothing does."""
    least_s = math.inf
    price_s = max(part[:, 0].max() for part in parts) / memory_bytes
    for price in (0.0, *(price_s * np.geomspace(1e-3, 1e3, 31))):
        chosen = [part[(part[:, 0] + price * part[:, 1:].sum(axis=1)).argmin()] for part in parts]
        together = reduce(_added, chosen)
        if _fit(together, memory_bytes):
            least_s = min(least_s, float(together[0]))
    return least_s


def _parts(option: StageOption, flying: int) -> tuple[float, float, float, float]:
    """Seconds, and bytes: while microbatches are in flight, at the end of a step, and the workspace."""
    running_bytes = option.fixed_bytes + flying * option.stash_bytes
    ending_bytes = option.fixed_bytes + option.gradient_bytes
    return option.seconds, running_bytes, ending_bytes, option.workspace_bytes


def _together(
    rows: np.ndarray, cuts: np.ndarray, number: int, j: int, held: tuple[int, ...], num_microbatches: int,
    memory_bytes: float, worth_s: float,
) -> _Ways:  # fmt: skip
    """Ways to run the stages of submesh j together."""
    v = len(held)
    together = _Ways(np.zeros(1, int), np.zeros(1), np.zeros(1))
    for turn, in_flight in enumerate(held):
        behind = number - 1 - (turn * number // v + j)
        own = rows[rows["fits"][:, behind]]
        bytes_ = in_flight_bytes(own, np.array([in_flight]))[:, 0]
        bytes_ += own["fixed_bytes"] + own["workspace_bytes"] / v
        work_s = num_microbatches * (own["forward_s"] + own["backward_s"])
        alone = _Ways(cuts[own["end"]] - cuts[own["start"]], work_s, bytes_).unbeaten()
        together = together.beside(alone, memory_bytes, worth_s)
    return together


def _shared_out_s(least_s: np.ndarray, num_layers: int) -> float:
    """The least time in which the submeshes can do all layers, each as many as it can."""
    # With more layers in less time, fewer are done in it too.
    least_s = np.minimum.accumulate(least_s[:, ::-1], axis=1)[:, ::-1]
    times_s = np.unique(least_s[np.isfinite(least_s)])
    low, high = 0, len(times_s)  # the first time that is enough
    while low < high:
        middle = (low + high) // 2
        done = (least_s <= times_s[middle]).sum(axis=1) - 1  # layers; -1: not even its stages
        if (done >= 0).all() and done.sum() >= num_layers:
            high = middle
        else:
            low = middle + 1
    return float(times_s[low]) if low < len(times_s) else math.inf
