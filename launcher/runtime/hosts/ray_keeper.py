"""The process that has to do with Ray; started by `ray_pool.py`, as `python -m` of this module.

It starts a Ray of its own or joins a cluster, places an actor for every host, hands calls to them and
answers back, over one connection. It is a process of its own for three reasons: whatever Ray prints,
catches or leaves behind stays out of the run's process; no signal that a terminal or a scheduler sends to
the run's process group reaches Ray; and when the run's process is gone, however that came, the connection
ends, and this process ends every other one that it brought up, to the last child, and removes their
folder. (Left alone, some of Ray's own survive their driver.)

The only module that imports ray. It knows nothing of plans, nor of what the hosts do.
"""

import contextlib
import ctypes
import faulthandler
import os
import pathlib
import pickle
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_END_LIMIT_S, _LEAVE_LIMIT_S = 10.0, 5.0
_LOOK_EVERY_S = 0.1
_OBJECT_STORE_BYTES = 100_000_000  # what hosts and run say to each other is small
OWN_IP = "127.0.0.1"

# Answers, by the number of the request: the value; words of what went wrong; a dead actor, with a reason.
OK, FAILED, DIED = "ok", "failed", "died"


class Held:
    """What lives in an actor: an object, made and used by pickled callables."""

    def __init__(self, log_path: str, folder: str, paths: Sequence[str]) -> None:
        """Write to a log of its own, in the folder and with the modules of the run's process."""
        pathlib.Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:
            for standard in (1, 2):
                os.dup2(log.fileno(), standard)
        faulthandler.enable()
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        sys.path += [path for path in paths if path not in sys.path]
        self._object: object = None

    def where(self) -> tuple[int, str, str]:
        import ray

        return os.getpid(), ray.util.get_node_ip_address(), socket.gethostname()

    def make(self, pickled: bytes) -> bytes:
        def make() -> None:
            factory, task = pickle.loads(pickled)
            self._object = factory(task)

        return _outcome(make)

    def call(self, pickled: bytes) -> bytes:
        return _outcome(lambda: pickle.loads(pickled)(self._object))


def _outcome(action: Callable[[], object]) -> bytes:
    """The pickled (value, None) or (None, exception); an exception that does not pickle keeps its words."""
    try:
        return pickle.dumps((action(), None))
    except BaseException as error:
        traceback.print_exc()
        try:
            pickled = pickle.dumps((None, error))
            pickle.loads(pickled)
        except Exception:
            words = f"{type(error).__name__}: {error}"
            return pickle.dumps((None, RuntimeError(words)))
        return pickled


class Keeper:
    """Does what the connection asks, until it ends."""

    def __init__(self, connection: Connection, folder: str) -> None:
        self._connection, self._folder = connection, folder
        self._requests: queue.Queue[tuple] = queue.Queue()
        self._sending = threading.Lock()
        self._actors: list = []
        self._pids: dict[int, int] = {}
        self._group = None
        self._order: list[int] = []  # the bundle of each host
        self._is_own = False

    def read(self) -> None:
        """Take in requests. When the connection ends, everything ends, whatever is being done."""
        with contextlib.suppress(EOFError, OSError):
            while (request := self._connection.recv()) is not None:
                self._requests.put(request)
        try:
            self.end()
        finally:
            os._exit(0)  # Ray's threads may hold up the end of a process whose Ray is gone

    def serve(self) -> None:
        """Do what is asked; most answers come later, from other threads."""
        verbs = {
            "connect": self._connect,
            "nodes": self._nodes,
            "place": self._place,
            "kill": self._kill,
        }
        later = {"start": self._start, "make": self._make, "call": self._call}
        while True:
            number, verb, *arguments = self._requests.get()
            if verb in later:
                status, words = _attempt(later[verb], [number, *arguments])
                if status == FAILED:
                    self._answer(number, status, words)
            else:
                self._answer(number, *_attempt(verbs[verb], arguments))

    def end(self) -> None:
        """Leave nothing behind; of a cluster whose head is gone, which would wait for it, only in time."""
        if self._is_own and sys.platform == "linux":
            kill_descendants()
        else:
            leaving = threading.Thread(target=self._leave, name="leaving", daemon=True)
            leaving.start()
            leaving.join(_LEAVE_LIMIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _leave(self) -> None:
        import ray

        self._kill()
        ray.shutdown()

    def _connect(self, address: str | None, num_hosts: int, with_gpus: bool) -> list:
        import ray

        self._is_own = address is None
        if self._is_own:
            ray.init(
                address="local",
                num_cpus=num_hosts,
                num_gpus=None if with_gpus else 0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=self._folder,
                _node_ip_address=OWN_IP,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has set its own
        return self._nodes()

    def _nodes(self) -> list[tuple[str, str, Mapping[str, float]]]:
        """(machine, IP, resources) of every machine that is up."""
        import ray

        return [
            (node["NodeManagerHostname"], node["NodeManagerAddress"], node["Resources"])
            for node in ray.nodes()
            if node["Alive"]
        ]

    def _place(self, bundles: Sequence[Mapping[str, float]], strategy: str, limit_s: float) -> bool:
        """Reserve what the hosts need, or say that it is not to be had in time."""
        import ray

        self._group = ray.util.placement_group(list(bundles), strategy=strategy)
        ready, until_s = self._group.ready(), time.monotonic() + limit_s
        while time.monotonic() < until_s:
            if ray.wait([ready], timeout=_LOOK_EVERY_S)[0]:
                self._order = neighbours(bundles, self._addresses())
                return True
        self._kill()
        return False

    def _addresses(self) -> list[str]:
        """That of every bundle's machine."""
        import ray

        places = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [addresses[node] for _, node in sorted(places.items())]

    def _start(
        self, number: int, environment: Mapping[str, str], num_gpus: int, log_path: str,
        folder: str, paths: Sequence[str],
    ) -> None:  # fmt: skip
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        host = len(self._actors)
        actor = ray.remote(concurrency_groups={"quick": 4})(Held).options(
            num_cpus=1,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
            runtime_env={"env_vars": dict(environment)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=self._order[host]
            ),
        )  # fmt: skip
        self._actors.append(actor.remote(log_path, folder, tuple(paths)))
        where = self._actors[host].where.remote()
        where.future().add_done_callback(lambda done: self._started(number, host, done))

    def _started(self, number: int, host: int, done: Future) -> None:
        status, value = _result(done)
        if status == OK:
            self._pids[host] = value[0]
        self._answer(number, status, value)

    def _make(self, number: int, host: int, pickled: bytes) -> None:
        done = self._actors[host].make.remote(pickled).future()
        done.add_done_callback(lambda done: self._answer(number, *_result(done)))

    def _call(self, number: int, host: int, pickled: bytes, quick: bool) -> None:
        group = {"concurrency_group": "quick"} if quick else {}
        done = self._actors[host].call.options(**group).remote(pickled).future()
        done.add_done_callback(lambda done: self._answer(number, *_result(done)))

    def _kill(self) -> None:
        """End the actors; those of this machine by the system, which a stopped process does not outlive."""
        import ray

        if self._is_own and sys.platform == "linux":
            ours = descendants()
            for pid in self._pids.values():
                if pid in ours:
                    _kill_process(pid)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        self._actors, self._pids, self._group = [], {}, None

    def _answer(self, number: int, status: str, value: object) -> None:
        with self._sending, contextlib.suppress(OSError):  # nobody there: `serve` ends
            self._connection.send((number, status, value))


def _attempt(action: Callable[..., object], arguments: Sequence) -> tuple[str, object]:
    try:
        return OK, action(*arguments)
    except Exception as error:  # Ray raises what it likes
        traceback.print_exc()
        words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        # Ray's words for a cause end in the innermost one, at times below a traceback.
        inner = str(error.__cause__ or "").strip().splitlines()[-1:]
        return FAILED, "; ".join((words, *inner))


def _result(done: Future) -> tuple[str, object]:
    import ray

    error = done.exception()
    if error is None:
        return OK, done.result()
    sys.stderr.write(f"{error}\n")
    if not isinstance(error, ray.exceptions.RayError):
        return FAILED, f"{type(error).__name__}: {error}"
    return DIED, reason(str(error))


def neighbours(bundles: Sequence[Mapping[str, float]], addresses: Sequence[str]) -> list[int]:
    """The bundle of each host, so that hosts with neighbouring numbers have neighbouring addresses.

    A submesh is hosts in a row, and so are the machines behind one switch, as a rule. Only bundles that ask
    for the same are exchanged.
    """
    order = list(range(len(bundles)))
    for kind in {tuple(sorted(bundle.items())) for bundle in bundles}:
        alike = [i for i, bundle in enumerate(bundles) if tuple(sorted(bundle.items())) == kind]
        near = sorted(alike, key=lambda i: (_numbers(addresses[i]), i))
        for host, bundle in zip(alike, near, strict=True):
            order[host] = bundle
    return order


def _numbers(address: str) -> list[tuple[int, str]]:
    """An address as what sorts by its numbers."""
    return [
        (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", address)
    ]


def reason(text: str) -> str:
    """What Ray's paragraphs on a dead actor say."""
    if "low on memory" in text or "OutOfMemory" in text:
        return "Ray ended its process, because its machine ran low on memory"
    if "its node" in text:
        return "its machine left the Ray cluster"
    if "creation task" in text:
        return f"its process did not start: {text.strip().splitlines()[-1]}"
    return "its process ended"


def descendants() -> set[int]:
    """The processes that this one has started, and theirs."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = pathlib.Path("/proc", entry, "stat").read_text()
                # After the name, which may hold anything: state, parent.
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def kill_descendants() -> None:
    """End them all. Whose parent ends becomes a child of this process, so that none is lost."""
    until_s = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < until_s:
        left = descendants()
        if not left:
            return
        for pid in left:
            _kill_process(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Serve the connection of that file number; the folder is for Ray's files."""
    descriptor, folder = arguments
    # Inherited by all that is started here. Those that handle SIGTERM themselves do so still.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    keeper = Keeper(Connection(int(descriptor)), folder)
    threading.Thread(target=keeper.read, name="requests", daemon=True).start()
    try:
        keeper.serve()
    finally:
        keeper.end()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
