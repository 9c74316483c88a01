"""The hosts' processes by Ray: this side of the connection to `ray_keeper.py`, which has to do with Ray.

Says what is needed and what was found where a cluster is not there, or is too small. Knows the shape of the
run's cluster, and no plan.
"""

import contextlib
import itertools
import os
import pathlib
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from multiprocessing.connection import Connection, Pipe

from launcher.errors import ClusterError
from launcher.runtime.hosts.host_pool import (
    HostDiedError,
    HostPool,
    Seat,
    TooFewHostsError,
    Whereabouts,
)
from launcher.runtime.hosts.ray_keeper import DIED, FAILED, OWN_IP

KEEPER = (sys.executable, "-m", "launcher.runtime.hosts.ray_keeper")
START_LIMIT_S, REACH_LIMIT_S, END_LIMIT_S = 180.0, 5.0, 20.0
UNNOTICED_LIMIT_S = 30.0  # in which Ray finds out that a machine is gone
# No figures about its use leave the machine, and no hint about GPUs is mixed into the output.
QUIETLY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_NOT_NICE = {
    "RAY_worker_niceness": "0"
}  # hosts get as much of their machine as a run of one process

# What Ray's words are about if the cluster has answered, and refuses.
_REFUSALS = ("version", "token")


def ray_address(asked: str | None, environment: Mapping[str, str]) -> str | None:
    """The address of the cluster that `runtime.address` asks for; None where a Ray of our own starts."""
    if asked != "auto":
        return asked
    given = environment.get("RAY_ADDRESS", "")
    return None if given in ("", "local") else given


def own_token() -> dict[str, str]:
    """A token for one session; without one Ray makes a lasting one in the home folder."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class RayPool(HostPool):
    """One Ray, its own or a cluster's, for all starts of the hosts of a run."""

    def __init__(self, address: str | None, num_hosts: int, log_path: pathlib.Path) -> None:
        """Bring Ray up, or join it.

        Args:
            num_hosts: that an own one has room for.
            log_path: of what Ray says.

        Raises:
            ClusterError: it cannot be.
        """
        self._address, self._num_hosts = address, num_hosts
        self._numbers = itertools.count()
        self._waiting: dict[int, Future] = {}
        self._lock = threading.Lock()
        if address not in (None, "auto"):  # of RAY_ADDRESS: the one that is up on this machine
            _check_reachable(address)
        # Short, because Ray's sockets lie in it, and their paths may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self._connection, theirs = Pipe()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._keeper = subprocess.Popen(
                [*KEEPER, str(theirs.fileno()), self._folder],
                env=_environment(address),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of the reach of Ctrl-C
            )
        theirs.close()
        self._reader = threading.Thread(target=self._read, args=(self._connection,), daemon=True)
        self._reader.start()
        self._log_path = log_path

    def connect(self, *, with_gpus: bool) -> None:
        """Wait until Ray is there."""
        done = self._ask("connect", self._address, self._num_hosts, with_gpus)
        try:
            done.result(START_LIMIT_S)
        except (TooLate, HostDiedError, RuntimeError) as error:
            reason = str(error) or f"no answer within {START_LIMIT_S:.0f} s"
            raise self._not_there(reason) from error

    def start(self, seats: Sequence[Seat], patience_s: float) -> list[Future[Whereabouts]]:
        """Reserve a place for every seat, and start the processes."""
        bundles, strategy = [_bundle(seat) for seat in seats], self._strategy(seats)
        placed = self._ask("place", bundles, strategy, patience_s).result()
        if not placed and self.num_places(seats[0]) >= len(seats):
            # One of them is in use, or gone, and Ray does not know yet.
            placed = self._ask("place", bundles, strategy, UNNOTICED_LIMIT_S).result()
        if not placed:
            raise self._too_small(seats)
        folder, paths = str(pathlib.Path.cwd()), tuple(filter(None, sys.path))
        started = []
        for seat in seats:
            arguments = dict(seat.environment), seat.num_gpus, str(seat.log_path), folder, paths
            started.append(_then(self._ask("start", *arguments), self._whereabouts))
        return started

    def num_places(self, seat: Seat) -> int:
        """How many machines have what a seat needs; of emulated hosts, how many there is room for."""
        rooms = [_rooms(resources, seat) for _, _, resources in self._ask("nodes").result()]
        return sum(map(bool, rooms)) if seat.num_gpus else sum(rooms)

    def make(self, host: int, factory: Callable[[object], object], task: object) -> Future[None]:
        """Pickled here and made there: the keeper knows neither."""
        return _then(self._ask("make", host, pickle.dumps((factory, task))), _unpickled)

    def call(self, host: int, action: Callable[[object], object], *, quick: bool) -> Future:
        """Pickled here, and called there."""
        return _then(self._ask("call", host, pickle.dumps(action), quick), _unpickled)

    def kill(self) -> None:
        """End the actors."""
        with contextlib.suppress(
            HostDiedError, RuntimeError, TooLate
        ):  # then Ray is gone, and they are
            self._ask("kill").result(END_LIMIT_S)

    def close(self) -> None:
        """Let the keeper end everything; if it does not, end it: Ray goes with it."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        try:
            self._keeper.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _whereabouts(self, answer: tuple[int, str, str]) -> Whereabouts:
        pid, ip, machine = answer
        return Whereabouts(pid=pid, ip=ip if self._address else OWN_IP, machine=machine)

    def _strategy(self, seats: Sequence[Seat]) -> str:
        if self._address is None:
            return "PACK"
        return "STRICT_SPREAD" if seats[0].num_gpus else "SPREAD"

    def _ask(self, verb: str, *arguments: object) -> Future:
        number, answer = next(self._numbers), Future()
        with self._lock:
            self._waiting[number] = answer
        try:
            self._connection.send((number, verb, *arguments))
        except OSError:
            self._fail_all()
        return answer

    def _read(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, status, value = connection.recv()
                with self._lock:
                    answer = self._waiting.pop(number)
                if status == DIED:
                    answer.set_exception(HostDiedError(value))
                elif status == FAILED:
                    answer.set_exception(RuntimeError(value))
                else:
                    answer.set_result(value)
        self._fail_all()

    def _fail_all(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(HostDiedError("the process that keeps Ray has ended"))

    def _not_there(self, reason: str) -> ClusterError:
        if self._address is None:
            return ClusterError(
                f"Ray does not start on this machine: {reason} (runtime=ray; more in {self._log_path}): see "
                f"`python -m launcher.doctor`, or run in one process with runtime=auto"
            )
        where = f"{reason} (runtime.address, RAY_ADDRESS; more in {self._log_path})"
        if any(sign in reason.lower() for sign in _REFUSALS):
            return ClusterError(
                f"the Ray cluster at {self._address} cannot be joined: {where}: Ray and Python must have "
                f"the versions that they have there, and a cluster that asks for a token needs "
                f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            )
        return ClusterError(
            f"no Ray cluster answers at {self._address}: {where}: something else may be listening there; see "
            f"`ray status` on the cluster's head, and give the address that `ray start --head` says"
        )

    def _too_small(self, seats: Sequence[Seat]) -> TooFewHostsError:
        nodes = self._ask("nodes").result()
        where = f"the Ray cluster at {self._address}" if self._address else "this machine"
        found = ", ".join(
            f"{machine} ({ip}): {resources.get('GPU', 0):g} GPUs, {resources.get('CPU', 0):g} CPUs"
            for machine, ip, resources in sorted(nodes, key=str)
        )
        gpus = f" with {seats[0].num_gpus} GPUs each" if seats[0].num_gpus else " with a CPU each"
        return TooFewHostsError(
            f"the plan needs {len(seats)} hosts{gpus}, and {where} has {len(nodes)}: {found} "
            f"(cluster.hosts, runtime.address)",
            "; the plan is saved. Ways on: start Ray on more hosts, with "
            "`ray start --address=HEAD:6379` on each; plan for what there is with cluster.hosts=N; or "
            "rehearse on this CPU by adding runtime=emulate model.size=tiny "
            "(a plan from a file is for its own model: leave it out)",
        )


def _environment(address: str | None) -> dict[str, str]:
    """Of the keeper, and of what it starts."""
    root = str(pathlib.Path(__file__).parents[3])
    paths = filter(None, (os.environ.get("PYTHONPATH"), root))
    ours = QUIETLY | _NOT_NICE | {"PYTHONPATH": os.pathsep.join(paths)}
    if address is None:
        ours |= own_token()
    return {**os.environ, **ours}


def _check_reachable(address: str) -> None:
    """Find out at once whether anybody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_LIMIT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error} (runtime.address, RAY_ADDRESS): start one with "
            f"`ray start --head`, correct the address, or take a Ray of this run's own with "
            f"runtime.address=null"
        ) from error


def _bundle(seat: Seat) -> dict[str, float]:
    gpus = {"GPU": float(seat.num_gpus)} if seat.num_gpus else {}
    return {"CPU": 1.0, **gpus}


def _rooms(resources: Mapping[str, float], seat: Seat) -> int:
    return int(min(resources.get(kind, 0) // number for kind, number in _bundle(seat).items()))


def _unpickled(outcome: bytes) -> object:
    value, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return value


def _then(first: Future, convert: Callable[[object], object]) -> Future:
    """What `convert` makes of the result, or raises."""
    second: Future = Future()

    def pass_on(done: Future) -> None:
        try:
            second.set_result(convert(done.result()))
        except BaseException as error:
            second.set_exception(error)

    first.add_done_callback(pass_on)
    return second
