"""The processes of a run's hosts, as their supervisor sees them: started, asked, and ended for certain.

How they are started is in the subclasses: `ray_pool.py` has Ray do it. What happens in such a process is
`host_contract`'s affair; a pool only makes an object in each and hands calls to it.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launcher.errors import ClusterError


class HostDiedError(Exception):
    """The process of a host has ended, or its machine; the text says what is known of it."""


class TooFewHostsError(ClusterError):
    """There are not as many machines as the plan has hosts, or not such as it needs.

    Attributes:
        found: what is needed and what there is, without the ways on.
    """

    def __init__(self, found: str, ways_on: str = "") -> None:
        super().__init__(found + ways_on)
        self.found = found


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What the process of a host needs.

    Attributes:
        environment: set before the process imports anything of ours; jax reads it once.
        num_gpus: of the machine, for this process alone.
        log_path: where its standard output and error go.
    """

    environment: Mapping[str, str]
    num_gpus: int
    log_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where the process of a host came to be."""

    pid: int
    ip: str
    machine: str

    def __str__(self) -> str:
        return f"{self.machine}, {self.ip}, process {self.pid}"


class HostPool(abc.ABC):
    """As many processes as there are hosts, numbered from 0. Only one thread may use it."""

    @abc.abstractmethod
    def start(self, seats: Sequence[Seat], patience_s: float) -> list[Future[Whereabouts]]:
        """Start a process for every seat; none may be running.

        Raises:
            TooFewHostsError: the seats are not to be had within so many seconds.
        """

    @abc.abstractmethod
    def num_places(self, seat: Seat) -> int:
        """For how many such seats there is room now, with nothing running."""

    @abc.abstractmethod
    def make(self, host: int, factory: Callable[[object], object], task: object) -> Future[None]:
        """Make what the process holds: `factory(task)`."""

    @abc.abstractmethod
    def call(self, host: int, action: Callable[[object], object], *, quick: bool) -> Future:
        """Have `action` called with what the process holds; everything pickles.

        The future raises what the action raises, or HostDiedError. What is quick does not wait for what is
        not.
        """

    @abc.abstractmethod
    def kill(self) -> None:
        """End all processes at once, also those that are stopped or stuck."""

    @abc.abstractmethod
    def close(self) -> None:
        """End everything that the pool has started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
