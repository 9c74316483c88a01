"""Watches what a host receives from others: how long its devices wait for it, and whether it comes at all.

What a submesh computes and receives is waited for in the order of dispatch, by a thread of its own, so that
nobody else has to wait. A submesh waits from the moment at which it has what it has computed before, or at
which the receive is dispatched, if that is later, until the values are there. Computations whose results
cannot be waited for, since the next program takes them over, are passed by: then their time counts as
waiting, so the sum is an upper bound.

A pull from a peer that is dead or stopped may stay pending for ever, so somebody has to ask `check`.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import jax

from launcher.errors import LostPeerError


@dataclass(frozen=True, slots=True)
class _Entry:
    """Arrays to wait for; `text` says what is received, None of what is computed."""

    arrays: Sequence[jax.Array]
    text: str | None
    dispatched_s: float


class _Lane:
    """One submesh: its queue, and the thread that goes through it."""

    def __init__(self, name: str, clock: Callable[[], float]):
        self._clock = clock
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._free_s = clock()  # when all before the head was there
        self.head: _Entry | None = None
        self.waited_s = 0.0
        self.failure: str | None = None
        threading.Thread(target=self._run, name=f"arrivals of {name}", daemon=True).start()

    def put(self, entry: _Entry | None) -> None:
        self._queue.put(entry)

    def waiting_s(self) -> tuple[str, float] | None:
        """What is waited for now, and for how long."""
        head = self.head
        if head is None or head.text is None:
            return None
        return head.text, self._clock() - max(self._free_s, head.dispatched_s)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self.head = entry
            is_there = self._wait(entry)
            if is_there:
                now_s = self._clock()
                if entry.text is not None:
                    self.waited_s += max(now_s - max(self._free_s, entry.dispatched_s), 0.0)
                self._free_s = now_s
            self.head = None

    def _wait(self, entry: _Entry) -> bool:
        try:
            jax.block_until_ready(entry.arrays)
        except RuntimeError as error:  # a donated array, or what has come of a peer's failure
            if entry.text is not None and self.failure is None:
                self.failure = f"{entry.text} failed: {str(error).splitlines()[0][:200]}"
            return False
        return True


class Arrivals:
    """The lanes of all submeshes of this process."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self._limit_s, self._clock = limit_s, clock
        self._lanes: dict[int, _Lane] = defaultdict(lambda: _Lane("a submesh", clock))

    def computed(self, submesh: int, array: jax.Array) -> None:
        """Take note of a result of the submesh's newest computation."""
        self._lanes[submesh].put(_Entry([array], None, self._clock()))

    def expected(self, submesh: int, text: str, arrays: Sequence[jax.Array]) -> None:
        """Take note of what the submesh will receive next."""
        self._lanes[submesh].put(_Entry(arrays, text, self._clock()))

    def check(self) -> None:
        """Raise LostPeerError for a receive that has failed, or has taken longer than the limit."""
        for lane in list(self._lanes.values()):
            if lane.failure is not None:
                raise LostPeerError(f"{lane.failure}: look at that host's log, and run again")
            waiting = lane.waiting_s()
            if waiting is not None and waiting[1] > self._limit_s:
                raise LostPeerError(
                    f"{waiting[0]} has not come for {waiting[1]:.0f} s (the limit is "
                    f"{self._limit_s:g} s): that host hangs or has died; look at its log, and run again"
                )

    @property
    def waiting_for(self) -> str:
        """The receive that one of the submeshes waits for, "" if none does."""
        waiting = [found for lane in list(self._lanes.values()) if (found := lane.waiting_s())]
        return max(waiting, key=lambda entry: entry[1])[0] if waiting else ""

    @property
    def waited_s(self) -> float:
        """The seconds for which submeshes have waited so far, all together."""
        return sum(lane.waited_s for lane in list(self._lanes.values()))

    def close(self) -> None:
        """End the threads, as soon as what they wait for is there."""
        for lane in self._lanes.values():
            lane.put(None)
