"""Searching from several starts, and the best mixture of where they end.

A neighbourhood search ends in a choice that no neighbourhood it tried improves. Starts that differ end in
different ones; each is best somewhere, and an ILP over only their strategies finds the best mixture
(solution merging; Rothberg, INFORMS Journal on Computing 2007, does so with mixed-integer programs).

The best choice is searched again between new starts, in larger neighbourhoods. New starts come from
rounding the messages of costs with noise. Whether one helps is luck; the bound is not touched.
"""

import time

import numpy as np

from launcher.autopar.solver.messages import Messages
from launcher.autopar.solver.neighbourhoods import Search
from launcher.autopar.solver.prices import Bound

_MERGE_LIMIT_S = 20.0
_POOL = 16  # the most choices that are mixed: the latest
_NOISY_SWEEPS = 2


class Restarts:
    """Improves `search`, whose choice is always the best known."""

    def __init__(self, search: Search, messages: Messages, bound: Bound, excess: np.ndarray):
        self._search, self._messages = search, messages
        self._bound, self._excess = bound, excess
        self._rng = np.random.default_rng(0)
        self._current = search
        self._pool: list[np.ndarray] = []

    def improve(self, end_s: float) -> None:
        """Search until a time of `time.monotonic`, from new starts where the search is stuck."""
        while time.monotonic() < end_s and not self._search.is_done:
            self._current.run(end_s, seed=int(self._rng.integers(2**31)))
            if not self._current.is_stuck:
                continue
            if self._current is self._search:
                self._current = self._new_start()
                continue
            self._pool = [*self._pool, self._current.choice.copy()][-_POOL:]
            self._search.adopt(self._current.choice)
            left_s = end_s - time.monotonic()
            self._search.merge(self._pool, max(1.0, min(_MERGE_LIMIT_S, left_s)))
            self._current = self._search

    def _new_start(self) -> Search:
        """A search from another choice that fits; the best known if rounding found none."""
        costs = self._bound.costs
        positive = self._excess[self._excess > 0]
        typical = float(np.median(positive)) if len(positive) else 0.0
        noise = typical * 10 ** self._rng.uniform(-2, 0.5)
        noisy = costs + noise * self._rng.exponential(1.0, len(costs))
        for _ in range(_NOISY_SWEEPS):
            self._messages.sweep(noisy)
        choice = self._messages.rounded(noisy, within_room=True)
        return self._search.restarted(choice)
