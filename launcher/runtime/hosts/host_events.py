"""What hosts report, handed on only when every host has done the step that it is of.

A row of step 7 is known to one host before the others have finished step 7, and if one of them is lost
then, the step is done again. So events wait here, in the order of their host, until they count.
"""

from collections import deque
from collections.abc import Iterator

from launcher.runtime.hosts.host_contract import HostBeat, HostEvent


class HostEvents:
    """The events that wait, by host."""

    def __init__(self, num_hosts: int, first_step: int) -> None:
        self._waiting: list[deque[HostEvent]] = [deque() for _ in range(num_hosts)]
        self._done = [first_step] * num_hosts

    @property
    def steps_done(self) -> int:
        """How many steps every host has done."""
        return min(self._done)

    def heard(self, beat: HostBeat) -> Iterator[HostEvent]:
        """Take in a beat, and yield what counts now."""
        self._waiting[beat.host].extend(beat.events)
        self._done[beat.host] = beat.steps_done
        for waiting in self._waiting:
            while waiting and self._counts(waiting[0]):
                yield waiting.popleft()

    def left_over(self) -> tuple[HostEvent, ...]:
        """Give what waits, in no more than the order of its host, and let go of it."""
        left = tuple(event for waiting in self._waiting for event in waiting)
        for waiting in self._waiting:
            waiting.clear()
        return left

    def _counts(self, event: HostEvent) -> bool:
        # Going back is no result: all hosts have decided it alike, and what follows waits again.
        return event.kind == "rewind" or event.step <= self.steps_done
