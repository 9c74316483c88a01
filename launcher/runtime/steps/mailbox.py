"""Messages between the submeshes of one process, by their tickets."""

import threading
from collections.abc import Hashable


class Mailbox:
    """What has been sent and not yet received; `take` waits for what is not there yet.

    A single thread that plays a dispatch order never waits. Threads that play a list each do.
    """

    def __init__(self) -> None:
        self._posted: dict[Hashable, object] = {}
        self._changed = threading.Condition()
        self._broken = False

    def post(self, ticket: Hashable, value: object) -> None:
        with self._changed:
            self._posted[ticket] = value
            self._changed.notify_all()

    def take(self, ticket: Hashable):
        """The message of a ticket."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or ticket in self._posted)
            return self._posted.pop(ticket)

    def give_up(self) -> None:
        """Wake everybody who waits: the one they wait for has failed."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._posted)
