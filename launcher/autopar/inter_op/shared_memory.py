"""Memory that the virtual stages of a submesh share, and prices on it.

The DP over stages cannot know which stages come to lie on one submesh, so it cannot keep their sum below a
device's memory M. With a price of l_j seconds per byte of submesh j, what a plan costs at least is

    D(l) = min over plans (sum of value_i + sum of l_home(i) bytes_i)  -  sum_j l_j M

for every l >= 0 (Lagrange's relaxation). Its maximum is looked for along subgradients, the bytes by which
the plan that is cheapest at the prices exceeds each submesh's memory, with the step sizes of Polyak. The
plan at good prices mostly fits, or nearly.

Bytes are counted from below: of the workspace, of which one stage at a time has need, each stage has a v-th.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.autopar.inter_op.stage_table import (
    Pieces,
    StageChoice,
    in_flight_bytes,
    shared_bytes,
)
from launcher.autopar.inter_op.sweeps import sweep, trace_back
from launcher.autopar.programs.schedules import AbstractSchedule, Interleaved

_FIRST_PRICES = range(-4, 5)  # the same on all submeshes, as powers of two
_ROUNDS = 40
_RAISE = 1.5
_FIRST_GAIN, _FADE = 0.1, 0.93  # of the bound: how much a step is hoped to add, and how that fades


def on_submeshes_bytes(
    stages: Sequence[StageChoice], schedule: AbstractSchedule, num_microbatches: int
) -> np.ndarray:
    """What the stages of each submesh need together on a device."""
    number, submeshes = len(stages), len(stages) // schedule.virtual_stages
    held, split = (
        [peak(stage, number, num_microbatches) for stage in range(number)]
        for peak in (schedule.stash_peak, schedule.split_peak)
    )
    options = [choice.option for choice in stages]
    homes = [slice(home, None, submeshes) for home in range(submeshes)]
    return np.array([shared_bytes(options[own], held[own], split[own]) for own in homes])


@dataclass(frozen=True, slots=True, eq=False)
class MemoryPrices:
    """What bytes cost.

    Attributes:
        s_per_byte: By submesh.
        least: A price that is worth paying attention to.
        homes: Each stage's submesh, by the number of stages behind it.
        rows_bytes: Each row's, (rows, stages), likewise.
        memory_bytes: Of a submesh's devices.
    """

    s_per_byte: np.ndarray
    least: float
    homes: np.ndarray
    rows_bytes: np.ndarray
    memory_bytes: float

    @property
    def rows_s(self) -> np.ndarray:
        """What the bytes of each row cost: (rows, stages)."""
        return self.s_per_byte[self.homes] * self.rows_bytes

    @property
    def all_s(self) -> float:
        """What all the memory there is costs."""
        return float(self.s_per_byte.sum()) * self.memory_bytes

    def raised(self, is_short: np.ndarray) -> "MemoryPrices":
        """The prices where some submeshes are still short of memory."""
        higher = np.maximum(self.s_per_byte, self.least) * _RAISE
        return replace(self, s_per_byte=np.where(is_short, higher, self.s_per_byte))


def memory_prices(
    pieces: Pieces, rows: np.ndarray, values: np.ndarray, schedule: Interleaved, num_microbatches: int,
    memory_bytes: float,
) -> MemoryPrices:  # fmt: skip
    """The prices with the greatest D that was found.

    Args:
        values: (rows, stages), in seconds.
    """
    number, v = pieces.num_stages, schedule.virtual_stages
    stages, p = number - 1 - np.arange(number), number // v  # by how many are behind
    held = np.array([schedule.stash_peak(i, number, num_microbatches) for i in stages.tolist()])
    own = rows["fixed_bytes"] + rows["workspace_bytes"] / v
    rows_bytes = own[:, None] + in_flight_bytes(rows, held)
    none = MemoryPrices(np.zeros(p), 0.0, stages % p, rows_bytes, memory_bytes)
    ascent = _Ascent(pieces, rows, values)
    free = ascent.at(none)
    if math.isinf(memory_bytes) or free is None or (free.over_bytes <= 0).all():
        return none
    # In units of a price at which full devices cost as much as their work.
    unit = free.value_s / (p * memory_bytes)
    none = replace(none, least=unit * 2.0 ** _FIRST_PRICES[0])
    points = (ascent.at(replace(none, s_per_byte=np.full(p, unit * 2.0**k))) for k in _FIRST_PRICES)
    best = at = max((replace(free, prices=none), *points), key=lambda point: point.value_s)
    for round_ in range(_ROUNDS):
        length = float(at.over_bytes @ at.over_bytes)
        if not length:
            break
        step = _FIRST_GAIN * _FADE**round_ * best.value_s / length
        moved = np.maximum(at.prices.s_per_byte + step * at.over_bytes, 0.0)
        at = ascent.at(replace(none, s_per_byte=moved))
        best = max(best, at, key=lambda point: point.value_s)
    return best.prices


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """D at some prices, and the bytes by which the cheapest plan exceeds each submesh's memory."""

    prices: MemoryPrices
    value_s: float
    over_bytes: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Ascent:
    pieces: Pieces
    rows: np.ndarray
    values: np.ndarray

    def at(self, prices: MemoryPrices) -> _Point | None:
        """The cheapest plan at some prices; None if there is none."""
        values, number = self.values + prices.rows_s, self.pieces.num_stages
        sums = sweep(self.pieces, self.rows, values, np.add)
        if math.isinf(sums[number, 0, -1]):
            return None
        plan = trace_back(self.pieces, self.rows, values, sums, number)
        behind = number - 1 - np.arange(number)
        over_bytes = np.full(len(prices.s_per_byte), -float(prices.memory_bytes))
        np.add.at(over_bytes, prices.homes[behind], prices.rows_bytes[plan, behind])
        return _Point(prices, float(sums[number, 0, -1]) - prices.all_s, over_bytes)
