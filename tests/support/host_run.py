"""A run over several host processes on this machine, without a supervisor: the phases of the contract."""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Listener

from launcher.runtime.hosts.host_contract import HostBeat, HostEnd, HostEvent, HostReady, HostTask

PATIENCE_S = 400.0
_CHILD = pathlib.Path(__file__).with_name("host_child.py")


class HostClient:
    """One process; every method of the contract gives a future."""

    def __init__(self, task: HostTask, num_devices: int, log: pathlib.Path):
        self._folder = tempfile.TemporaryDirectory(prefix="host-")  # of the socket
        path = f"{self._folder.name}/socket"
        self._listener = Listener(path, "AF_UNIX")
        self.process = _start(path, num_devices, log)
        self.task, self._numbers, self._lock = task, itertools.count(), threading.Lock()
        self._waiting: dict[int, Future] = {}

    def connect(self) -> None:
        """Return when the process answers."""
        self._listener._listener._socket.settimeout(PATIENCE_S)  # it may have died instead
        self._connection = self._listener.accept()
        self._connection.send(self.task)
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, method: str, *arguments) -> Future:
        """Call a method of the host; its error becomes that of the future."""
        number, future = next(self._numbers), Future()
        self._waiting[number] = future
        with self._lock:
            self._connection.send((number, method, arguments))
        return future

    def _read(self) -> None:
        try:
            while True:
                number, is_well, value = self._connection.recv()
                future = self._waiting.pop(number)
                (future.set_result if is_well else future.set_exception)(value)
        except (EOFError, OSError):
            for future in list(self._waiting.values()):
                future.set_exception(EOFError(f"host {self.task.host} has ended"))

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.wait()
        self._listener.close()
        self._folder.cleanup()


def _start(path: str, num_devices: int, log: pathlib.Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "NPROC": str(2 * num_devices + 4),
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(_CHILD), path], env=environment, stdout=output, stderr=output
        )


@dataclass
class Hosts:
    """All processes of a run, taken through the phases together."""

    clients: Sequence[HostClient]

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for client in self.clients:
            client.end()

    def all(self, method: str, *arguments) -> list:
        """Ask all, and give all answers; the first error is raised."""
        asked = [client.ask(method, *arguments) for client in self.clients]
        return [future.result(PATIENCE_S) for future in asked]

    def prepare(self) -> list[HostReady]:
        """Open all, and bring them to where they could train."""
        return self.all("prepare", self.all("open"))

    def train(self) -> list[HostEnd]:
        """Train to the end, after `prepare`."""
        return self.all("train")

    def stop(self) -> int:
        """Have all stop after the same step, and give it."""
        last = max(self.all("hold"))
        self.all("stop_after", last)
        return last

    def beats(self) -> list[HostBeat]:
        return self.all("beat")

    def rows(self) -> list[dict]:
        """All rows so far that have not been given before."""
        return [event.row for beat in self.beats() for event in rows_of(beat.events)]


def rows_of(events: Sequence[HostEvent]) -> list[HostEvent]:
    return [event for event in events if event.kind == "row"]


def start_hosts(task_of: Callable[[int], HostTask], folder: pathlib.Path) -> Hosts:
    """Start one process for each host of a cluster; their logs go into the folder."""
    first = task_of(0)
    widths = [k.devices_per_host for k in first.cluster.kinds for _ in range(k.num_hosts)]
    clients = [
        HostClient(task_of(host), width, folder / f"host-{host}.log")
        for host, width in enumerate(widths)
    ]
    try:
        for client in clients:
            client.connect()
    except BaseException:
        Hosts(clients).__exit__()
        raise
    return Hosts(clients)
