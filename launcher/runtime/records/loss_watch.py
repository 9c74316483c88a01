"""Losses that jump: worth a warning long before a loss is not finite.

A loss is a spike where it is above the median of the losses before it by so many of their usual deviations
from it (the median absolute deviation, which earlier spikes move little, scaled to a standard deviation of
normal noise), and by a share of the median besides, since losses that hardly vary deviate by nothing.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW, FEWEST = 64, 16  # losses that are looked back on
DEVIATIONS, SHARE = 8.0, 0.1
_OF_NORMAL = 1.4826  # standard deviations in a median absolute deviation


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss, and the median of how many before it."""

    loss: float
    median: float
    window: int


class LossWatch:
    """Is told every loss, and says which are spikes: the first of a row of them."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._was_spike = False

    def spike(self, loss: float) -> Spike | None:
        """Take note of a loss; give what there is to say of it if it is a spike."""
        if not math.isfinite(loss):
            return None
        recent, before = list(self._recent), self._was_spike
        self._recent.append(loss)
        self._was_spike = len(recent) >= FEWEST and loss > _highest(recent)
        if not self._was_spike or before:
            return None
        return Spike(loss=loss, median=statistics.median(recent), window=len(recent))


def _highest(losses: list[float]) -> float:
    """What a loss may be after these."""
    median = statistics.median(losses)
    deviation = _OF_NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + max(DEVIATIONS * deviation, SHARE * abs(median))
