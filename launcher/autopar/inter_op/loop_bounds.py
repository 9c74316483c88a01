"""What a step takes at least, of plans whose period is known to be longer than some P.

The period says what further microbatches take; this is about all of them. Let the slowest loop of a plan
(`critical_loops`, with its letters) go from stage i to stage l, with n = l - i + 1 stages in it and b behind
it. It is closed while stage i has forwards left, which is for

    R = floor((m - 1 - b) / n)

rounds of n periods each. So there is a path through the simulator's graph that goes with the first
microbatch to the end and back to l, round the loop, stays in it for the r = m - 1 - b - R n microbatches that
are left, as long as its mean t for each, and follows the last one from l to the end once more and back:

    sum of all q  +  sum of q behind l  +  R n P  +  r / n (sum of t in the loop)  +  what comes last

Last is the end of the step of the first stage, with its W. ZB-H1 does W of the first i microbatches last of
all, so that the first ceil(i / n) rounds go without stage i's, and those that are left without any where
R n < p. Where R is 0, those that are left count nothing. Where m - 1 <= b, the first microbatch is not back
before the last one has left, and the second way behind l is the first one. A loop of one stage takes at
least m P, too; so does every step of GPipe, where q is 0.

Which loop is the slowest is up to the plan, so that the least over all (n, b) counts. For each of them the
least over plans is a DP as in `sweeps`, since how many stages are behind one says where in the loop it is.
There q is left out in the loop, which takes n P, and more than that, once more:

    sum of q outside the loop  +  q_i - t_i  +  sum of q behind l  +  (R + 1) n P  +  ...

Before, the sums are minimised one by one; the DP is for the loops about which that says least.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from launcher.autopar.inter_op.critical_loops import Within
from launcher.autopar.inter_op.sweeps import sweep_with

_MOST_LOOPS = 60  # that a DP of their own is run for


def least_step_s(
    within: Within, num_microbatches: int, longer_than_s: float, enough_s: float
) -> np.ndarray:
    """What no plan of `within` can beat whose period is longer than so much, by the number of stages.

    Args:
        enough_s: a bound that need not be any greater.
    """
    least_s = np.full(within.loops.pieces.max_stages + 1, num_microbatches * longer_than_s)
    numbers = within.numbers()
    if not within.loops.waited_s.any() or not len(numbers):
        return least_s
    paths = _Paths(within, num_microbatches, longer_than_s, int(numbers.max()))
    of_loops_s = paths.apart_s(numbers)
    done = set()
    for _ in range(_MOST_LOOPS):
        stages, behind, number = np.unravel_index(of_loops_s.argmin(), of_loops_s.shape)
        loop = int(stages) + 1, int(behind)
        if of_loops_s[stages, behind, number] >= enough_s or loop in done:
            break
        done.add(loop)
        together_s = paths.together_s(*loop)[numbers]
        of_loops_s[stages, behind] = np.maximum(of_loops_s[stages, behind], together_s)
    least_s[numbers] = of_loops_s.min(axis=(0, 1))
    return least_s


@dataclass(frozen=True, eq=False)
class _Paths:
    """The paths of the module's head, by n and b.

    Attributes:
        most: Of the numbers of stages; for ZB-H1 the only one.
    """

    within: Within
    num_microbatches: int
    period_s: float
    most: int

    def apart_s(self, numbers: np.ndarray) -> np.ndarray:
        """[n - 1, b, number of stages], without what is left; infinite where the loop is too long."""
        stages, behind = np.indices((self.most, self.most))
        stages += 1
        rounds = np.maximum((self.num_microbatches - 1 - behind) // stages, 0)
        own_s = rounds * stages * self.period_s
        own_s += np.where(self.num_microbatches - 1 > behind, self._behind_s, 0.0)
        own_s -= (
            np.minimum(-(-(self.most - stages - behind) // stages), rounds) * self._most_weight_s
        )
        sums_s = own_s[:, :, None] + self._sums_s[numbers, 0, -1]
        sums_s[0] = np.maximum(sums_s[0], self.num_microbatches * self.period_s)
        return np.where((stages + behind)[:, :, None] <= numbers, sums_s, np.inf)

    def together_s(self, stages: int, behind: int) -> np.ndarray:
        """Of one loop, by the number of all stages."""
        m = self.num_microbatches
        rounds = max((m - 1 - behind) // stages, 0)
        left = max(m - 1 - behind, 0) - rounds * stages if rounds else 0
        without = min(-(-(self.most - stages - behind) // stages), rounds)
        loops = self.within.loops
        stayed_s = loops.busy_s if rounds * stages >= self.most else loops.busy_s - self._weight_s
        last, first = behind, behind + stages - 1

        def added_s(behind_it: int, live: np.ndarray) -> np.ndarray:
            if behind_it < last:
                return loops.waited_s[live] if m - 1 > behind else np.zeros(len(live))
            if behind_it > first:
                return np.zeros(len(live))
            round_s = loops.busy_s[live] if behind_it == first else loops.waited_s[live]
            weight_s = self._weight_s[live] * (without if behind_it == first else 0)
            return stayed_s[live] * left / stages - weight_s - round_s

        return self._sweep(added_s)[:, 0, -1] + (rounds + 1) * stages * self.period_s

    def _sweep(self, added_s) -> np.ndarray:
        """The DP over q and what comes last, and what is added, where each stage's loops can be."""
        within, loops = self.within, self.within.loops
        own_s = loops.waited_s + np.where(loops.rows["start"] == 0, loops.last_s, 0.0)

        def step(
            live: np.ndarray, stages: int, behind: np.ndarray, needs: np.ndarray
        ) -> np.ndarray:
            behind += (own_s[live] + added_s(stages - 1, live))[:, None]
            behind[loops.busy_s[live, None] + needs > within.period_s] = np.inf
            return behind

        return sweep_with(loops.pieces, loops.rows, step, within.needs)

    @cached_property
    def _sums_s(self) -> np.ndarray:
        return self._sweep(lambda behind_it, live: 0.0)

    @cached_property
    def _behind_s(self) -> np.ndarray:
        """The least sum of q over so many last stages, wherever they begin."""
        rows = self.within.loops.rows
        sums_s = (
            self._sums_s[b, rows["start"][rows["fits"][:, b - 1]]].min(initial=np.inf)
            for b in range(1, self.most)
        )
        return np.array([0.0, *sums_s])

    @cached_property
    def _weight_s(self) -> np.ndarray:
        """W that others do not wait for, by row."""
        loops = self.within.loops
        return loops.busy_s + loops.rows["received_s"] - loops.waited_s

    @property
    def _most_weight_s(self) -> float:
        return float(self._weight_s.max(initial=0.0))
