"""From the best of the numbers of microbatches that were tried to the best of its neighbours."""

import math
from collections.abc import Callable, Mapping, Sequence


def climb(
    step_s: Callable[[int], float], tried: Callable[[], Mapping[int, float]],
    counts: Sequence[int], worth: float,
) -> None:  # fmt: skip
    """Try the counts next to the best, until none that promises enough is better.

    As much as the last step was better, for how far it went, the next one may be, for how far it goes.

    Args:
        step_s: tries a count, if it has not been tried; infinite where nothing fits.
        tried: the step times so far, by count, those of counts where nothing fits as well.
        counts: falling.
        worth: what a try must promise, as part of a step.
    """
    per_octave = math.inf
    while True:
        found = tried()
        at = min(found, key=found.__getitem__)
        hopeful = [n for n in _beside(counts, at) if per_octave * _octaves(n, at) > worth]
        # Downhill first: on the side of the better of those that were tried further away.
        for neighbour in sorted(hopeful, key=lambda count: _beyond_s(found, count, at)):
            gain = 1.0 - step_s(neighbour) / found[at]
            if gain > 0.0:
                per_octave = gain / _octaves(neighbour, at)
                break
        else:
            return


def _beside(counts: Sequence[int], at: int) -> list[int]:
    place = counts.index(at)
    return [counts[k] for k in (place - 1, place + 1) if 0 <= k < len(counts)]


def _octaves(count: int, other: int) -> float:
    return abs(math.log2(count / other))


def _beyond_s(tried: Mapping[int, float], neighbour: int, at: int) -> float:
    """The least step time on a neighbour's side; where nothing was tried, times have fallen that way."""
    side = [s for count, s in tried.items() if count != at and (count > at) == (neighbour > at)]
    return min(side, default=0.0)
