"""Watches what a host waits for of others: how long its devices wait for it, and whether it comes at all.

What a submesh computes and receives is waited for in the order of dispatch, by a thread of its own, so that
nobody else has to wait. A submesh waits from the moment at which it has what it has computed before, or at
which the receive is dispatched, if that is later, until the values are there. Computations whose results
cannot be waited for, since the next program takes them over, are passed by: then their time counts as
waiting, so the sum is an upper bound.

A pull from a peer that is dead or stopped may stay pending for ever, and so may a computation that several
hosts do together, so somebody has to ask `check`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import jax

from launcher.errors import LostPeerError


@dataclass(frozen=True, slots=True)
class _Entry:
    """Arrays to wait for; `text` says what they are."""

    arrays: Sequence[jax.Array]
    text: str
    is_received: bool
    dispatched_s: float


class _Lane:
    """One submesh: its queue, and the thread that goes through it."""

    def __init__(self, submesh: int, clock: Callable[[], float]):
        self._clock, name = clock, f"arrivals of submesh {submesh}"
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._free_s = clock()  # when all before the head was there
        self.head: _Entry | None = None
        self.waited_s = 0.0
        self.failure: str | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, entry: _Entry | None) -> None:
        self._queue.put(entry)

    def waiting_s(self) -> tuple[_Entry, float] | None:
        """What is waited for now, and for how long."""
        head = self.head
        if head is None:
            return None
        return head, self._clock() - max(self._free_s, head.dispatched_s)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self.head = entry
            is_there = self._wait(entry)
            if is_there:
                now_s = self._clock()
                if entry.is_received:
                    self.waited_s += max(now_s - max(self._free_s, entry.dispatched_s), 0.0)
                self._free_s = now_s
            self.head = None

    def _wait(self, entry: _Entry) -> bool:
        try:
            jax.block_until_ready(entry.arrays)
        except RuntimeError as error:  # a donated array, or what has come of a peer's failure
            if entry.is_received and self.failure is None:
                self.failure = f"{entry.text} failed: {str(error).splitlines()[0][:200]}"
            return False
        return True


class Arrivals:
    """The lanes of all submeshes of this process.

    Attributes:
        partners: by submesh, the other hosts that compute on it, where there are some.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic):
        self._limit_s, self._clock = limit_s, clock
        self._lanes: dict[int, _Lane] = {}
        self.partners: dict[int, Sequence[int]] = {}

    def computed(self, submesh: int, text: str, array: jax.Array) -> None:
        """Take note of a result of the submesh's newest computation."""
        self._put(submesh, _Entry([array], text, False, self._clock()))

    def expected(self, submesh: int, text: str, arrays: Sequence[jax.Array]) -> None:
        """Take note of what the submesh will receive next."""
        self._put(submesh, _Entry(arrays, text, True, self._clock()))

    def _put(self, submesh: int, entry: _Entry) -> None:
        if submesh not in self._lanes:
            self._lanes[submesh] = _Lane(submesh, self._clock)
        self._lanes[submesh].put(entry)

    def check(self) -> None:
        """Raise LostPeerError for a receive that has failed, or for what has taken longer than the limit.

        What a host computes alone may take as long as it likes.
        """
        for submesh, lane in list(self._lanes.items()):
            if lane.failure is not None:
                raise LostPeerError(f"{lane.failure}: look at that host's log, and run again")
            waiting = lane.waiting_s()
            if waiting is not None and waiting[1] > self._limit_s:
                self._raise_late(submesh, *waiting)

    def _raise_late(self, submesh: int, entry: _Entry, waited_s: float) -> None:
        limit = f"{waited_s:.0f} s (the limit is {self._limit_s:g} s)"
        if entry.is_received:
            raise LostPeerError(
                f"{entry.text} has not come for {limit}: that host hangs or has died; look at its log, "
                f"and run again"
            )
        if submesh in self.partners:
            hosts = ", ".join(map(str, self.partners[submesh]))
            raise LostPeerError(
                f"{entry.text}, which is computed together with host {hosts}, has taken {limit}: one of "
                f"them hangs or has died; look at their logs, and run again"
            )

    @property
    def waiting_for(self) -> str:
        """The receive that one of the submeshes waits for, "" if none does."""
        found = [lane.waiting_s() for lane in list(self._lanes.values())]
        late = [(waited_s, e.text) for e, waited_s in filter(None, found) if e.is_received]
        return max(late)[1] if late else ""

    @property
    def waited_s(self) -> float:
        """The seconds for which submeshes have waited so far, all together."""
        return sum(lane.waited_s for lane in list(self._lanes.values()))

    def close(self) -> None:
        """End the threads, as soon as what they wait for is there."""
        for lane in self._lanes.values():
            lane.put(None)
