"""Asks every host again and again what it is at, and keeps what each said last.

A host is asked once a heartbeat, and not again before it has answered: who is silent is `HostWatch`'s
affair, what was said is handed to whoever listens.
"""

from collections.abc import Callable
from concurrent.futures import Future
from operator import methodcaller

from launcher.runtime.hosts.host_contract import HostBeat
from launcher.runtime.hosts.host_pool import HostDiedError, HostPool


class HostBeats:
    """The beats of one start of the hosts."""

    def __init__(
        self, pool: HostPool, num_hosts: int, heartbeat_s: float, clock: Callable[[], float]
    ) -> None:
        self._pool, self._heartbeat_s, self._clock = pool, heartbeat_s, clock
        self._asked: list[Future | None] = [None] * num_hosts
        self._asked_s = [-heartbeat_s] * num_hosts
        self.newest: list[HostBeat | None] = [None] * num_hosts

    def look(self) -> list[HostBeat]:
        """Give what was answered since, and ask those whose turn it is. Who has died has no answer."""
        answers = []
        for host, asked in enumerate(self._asked):
            if asked is not None and asked.done():
                self._asked[host] = None
                if not isinstance(asked.exception(), HostDiedError):
                    answers.append(asked.result())
            is_due = self._clock() - self._asked_s[host] >= self._heartbeat_s
            if self._asked[host] is None and is_due:
                self._asked[host] = self._pool.call(host, methodcaller("beat"), quick=True)
                self._asked_s[host] = self._clock()
        for beat in answers:
            self.newest[beat.host] = beat
        return answers

    def pending(self) -> dict[int, Future]:
        """Give those that are still on their way, which the caller then waits for."""
        pending = {host: asked for host, asked in enumerate(self._asked) if asked is not None}
        self._asked = [None] * len(self._asked)
        return pending
