"""Arrays from this process to others and back, by `jax.experimental.transfer`: the only module that knows it.

A sender posts arrays under a number, the receiver pulls them by it; either may come first, and neither waits
for the values to be computed. What is posted is kept until two more steps are done: a pull may come late,
and what it reads must not be gone.

A backend that cannot transfer between processes says so when the server starts. Tried on CPU devices only.
"""

import socket
from collections import Counter, deque
from collections.abc import Sequence

import jax
from jax.experimental import transfer

from launcher.errors import ClusterError
from launcher.runtime.hosts.arrivals import Arrivals

_KEPT_STEPS = 2


class PostOffice:
    """The server of this process, and its connections.

    Args:
        host: the number of this one.
        addresses: "ip:port" of all hosts' servers, by their numbers.
    """

    def __init__(self, host: int, addresses: Sequence[str], arrivals: Arrivals):
        self.host, self.num_hosts, self.arrivals = host, len(addresses), arrivals
        self._addresses, self._connections = addresses, {}
        self._server = _start(addresses[host])
        self._posted: deque[tuple[int, Sequence[jax.Array]]] = deque()
        self._steps_begun = 0
        self._num_bytes: Counter[str] = Counter()

    def post(self, kind: str, to_host: int, number: int, arrays: Sequence[jax.Array]) -> None:
        """Let a host pull these, each of one device."""
        self._posted.append((self._steps_begun, arrays))
        self._num_bytes[kind] += sum(array.nbytes for array in arrays)
        self._server.await_pull(self._identifier(number, self.host, to_host), list(arrays))

    def pull(
        self, from_host: int, number: int, wanted: Sequence[jax.ShapeDtypeStruct]
    ) -> list[jax.Array]:
        """What a host has posted, or will, each array to the device of its sharding."""
        if from_host not in self._connections:
            self._connections[from_host] = self._server.connect(self._addresses[from_host])
        identifier = self._identifier(number, from_host, self.host)
        return self._connections[from_host].pull(identifier, list(wanted))

    def _identifier(self, number: int, source: int, target: int) -> int:
        return (number * self.num_hosts + source) * self.num_hosts + target

    def bytes_sent(self) -> dict[str, int]:
        """Bytes posted so far, by kind."""
        return dict(self._num_bytes)

    def begin_step(self) -> None:
        """What is posted from here on belongs to the next step."""
        self._steps_begun += 1

    def let_go(self, steps_done: int) -> None:
        """Let go of what belongs to steps that every reader has behind it."""
        while self._posted and self._posted[0][0] + _KEPT_STEPS <= steps_done:
            self._posted.popleft()


def _start(address: str) -> "transfer.TransferServer":
    client = jax.local_devices()[0].client
    ip = address.rpartition(":")[0]
    try:
        return transfer.start_transfer_server(client, address, [f"{ip}:0"])
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ClusterError(
            f"this host cannot send arrays to others from {client.platform} devices at {address} "
            f"({str(error).splitlines()[0][:200]}): give a plan of one stage (parallel=data, zero or "
            f"parallel.pp=1), which needs no such transfers, or run on one host"
        ) from error


def free_port(ip: str) -> int:
    """A port of an interface that nobody listens at now."""
    with socket.socket() as found:
        found.bind((ip, 0))
        return found.getsockname()[1]
