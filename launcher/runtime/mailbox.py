"""Messages between the submeshes of one process, by the identity of their send."""

import threading

from launcher.autopar.instructions import Instruction


class Mailbox:
    """What has been sent and not yet received; `take` waits for what is not there yet.

    A single thread that plays a dispatch order never waits. Threads that play a list each do.
    """

    def __init__(self) -> None:
        self._posted: dict[Instruction, object] = {}
        self._changed = threading.Condition()
        self._broken = False

    def post(self, send: Instruction, value: object) -> None:
        with self._changed:
            self._posted[send] = value
            self._changed.notify_all()

    def take(self, receive: Instruction):
        """The message of the send that belongs to a receive."""
        send = receive.partner
        with self._changed:
            self._changed.wait_for(lambda: self._broken or send in self._posted)
            return self._posted.pop(send)

    def give_up(self) -> None:
        """Wake everybody who waits: the one they wait for has failed."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._posted)
