"""Has all hosts stop after the same step.

Hosts are at different steps when the signal comes, and none may begin one that another will not make. So
every host is first held, and says how many steps it has begun; the most of these is where all stop.
"""

from concurrent.futures import Future
from operator import methodcaller

from launcher.runtime.hosts.host_pool import HostPool


class HostStop:
    """Asks for it without waiting: each look goes on from the one before."""

    def __init__(self, pool: HostPool, num_hosts: int) -> None:
        self._pool, self._hosts = pool, range(num_hosts)
        self._held: list[Future] | None = None
        self._is_told = False

    def look(self) -> None:
        """Hold the hosts; once all are, tell them where to stop. A host that fails ends the run elsewhere."""
        if self._held is None:
            self._held = self._call(methodcaller("hold"))
        answered = all(held.done() and held.exception() is None for held in self._held)
        if answered and not self._is_told:
            last = max(held.result() for held in self._held)
            self._call(methodcaller("stop_after", last))
            self._is_told = True

    def _call(self, action: methodcaller) -> list[Future]:
        return [self._pool.call(host, action, quick=True) for host in self._hosts]
