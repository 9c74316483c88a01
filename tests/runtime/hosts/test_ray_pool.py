"""Processes by a real Ray on this machine: asked, lost, stopped, ended, and nothing left of them."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from operator import methodcaller

import pytest
from ray_things import (
    Thing,
    UnpicklableError,
    family,
    is_alive,
    ray_folder,
    two_machines,
    wait_until,
)

from launcher.errors import ClusterError, StorageError
from launcher.runtime.hosts import ray_pool
from launcher.runtime.hosts.host_pool import HostDiedError, Seat, TooFewHostsError
from launcher.runtime.hosts.ray_pool import RayPool, ray_address

pytestmark = pytest.mark.ray
LIMIT_S = 60.0


def seats(folder: pathlib.Path, number: int = 2, *, gpus: int = 0) -> list[Seat]:
    return [
        Seat(
            environment={"NPROC": str(10 + host)}, num_gpus=gpus,
            log_path=folder / "hosts" / f"host-{host}.log",
        )
        for host in range(number)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with RayPool(None, 2, tmp_path_factory.mktemp("pool") / "ray.log") as pool:
        pool.connect(with_gpus=False)
        yield pool
        processes = family(os.getpid()) - {os.getpid()}
        folder = ray_folder(processes)
        assert len(processes) > 5
        assert folder.is_dir()
    assert not any(map(is_alive, processes))
    assert not folder.exists()


@pytest.fixture
def started(pool, tmp_path):
    """Two processes that hold a `Thing` each, and where they are."""
    where = [future.result(LIMIT_S) for future in pool.start(seats(tmp_path), LIMIT_S)]
    for host in range(2):
        pool.make(host, Thing, f"task {host}").result(LIMIT_S)
    yield where
    pool.kill()
    wait_until(lambda: not any(is_alive(place.pid) for place in where))


def test_processes_answer_while_they_work(pool, started, tmp_path):
    works = pool.call(1, methodcaller("waits", 600.0), quick=False)
    found = pool.call(1, methodcaller("about"), quick=True).result(LIMIT_S)
    assert found == {
        "task": "task 1", "pid": started[1].pid, "folder": os.getcwd(), "NPROC": "11",
        "ignores": True, "nice": os.nice(0),
    }  # fmt: skip
    assert not works.done()
    assert [place.ip for place in started] == ["127.0.0.1", "127.0.0.1"]
    assert str(started[0]) == f"{socket.gethostname()}, 127.0.0.1, process {started[0].pid}"


def test_what_an_object_raises_arrives(pool, started, tmp_path):
    call = pool.call(0, methodcaller("raises", StorageError("disk full")), quick=False)
    with pytest.raises(StorageError, match="disk full"):
        call.result(LIMIT_S)
    call = pool.call(0, methodcaller("unknown"), quick=False)
    with pytest.raises(AttributeError, match="unknown"):
        call.result(LIMIT_S)
    assert "disk full" in (tmp_path / "hosts" / "host-0.log").read_text()


def test_an_exception_that_does_not_pickle_keeps_its_words(pool, started):
    call = pool.call(0, raise_unpicklable, quick=False)
    with pytest.raises(RuntimeError, match="UnpicklableError: a b"):
        call.result(LIMIT_S)


def raise_unpicklable(thing: Thing) -> None:
    raise UnpicklableError("a", "b")


@pytest.mark.parametrize("how", ["killed", "crashes"])
def test_a_process_that_ends_is_noticed_at_once(pool, started, how, tmp_path):
    works = [pool.call(host, methodcaller("waits", 600.0), quick=False) for host in range(2)]
    began_s = time.monotonic()
    if how == "killed":
        os.kill(started[1].pid, signal.SIGKILL)
    else:
        pool.call(1, methodcaller("crashes"), quick=True)
    with pytest.raises(HostDiedError, match="^its process ended$"):
        works[1].result(LIMIT_S)
    assert time.monotonic() - began_s < 5
    assert not works[0].done()
    with pytest.raises(HostDiedError):
        pool.call(1, methodcaller("about"), quick=True).result(LIMIT_S)
    if how == "crashes":
        assert "Fatal Python error: Aborted" in (tmp_path / "hosts" / "host-1.log").read_text()


def test_a_stopped_process_does_not_outlive_the_others(pool, started):
    os.kill(started[0].pid, signal.SIGSTOP)
    pool.kill()
    assert wait_until(lambda: not any(is_alive(place.pid) for place in started)) < 5


def test_no_room(pool, tmp_path):
    said = (
        r"the plan needs 3 hosts with a CPU each, and this machine has 1: .* 0 GPUs, 2 CPUs "
        r"\(cluster.hosts, runtime.address\); .* cluster.hosts=N; or rehearse"
    )
    with pytest.raises(TooFewHostsError, match=said):
        pool.start(seats(tmp_path, 3), 1.0)
    with pytest.raises(TooFewHostsError, match="needs 2 hosts with 4 GPUs each"):
        pool.start(seats(tmp_path, gpus=4), 1.0)
    assert pool.num_places(seats(tmp_path)[0]) == 2
    assert pool.num_places(seats(tmp_path, gpus=4)[0]) == 0


def test_nobody_at_the_address(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = (
        rf"no Ray cluster answers at {address}: .* \(runtime.address, RAY_ADDRESS\): start one with"
    )
    with pytest.raises(ClusterError, match=said):
        RayPool(address, 2, tmp_path / "ray.log")


KEEPER_OF_A_RAY_THAT_FAILS = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
number, *_ = connection.recv()
connection.send((number, "failed", {words!r}))
connection.recv()
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "ConnectionError: Failed to connect; RpcError: Received http2 header with status: 404",
            "no Ray cluster answers at {address}: {words} (runtime.address, RAY_ADDRESS; more in {log}): "
            "something else may be listening there; see `ray status` on the cluster's head, and give the "
            "address that `ray start --head` says",
        ),
        (
            "ConnectionError: Failed to connect; AuthenticationError: InvalidAuthToken",
            "the Ray cluster at {address} cannot be joined: {words} (runtime.address, RAY_ADDRESS; more in "
            "{log}): Ray and Python must have the versions that they have there, and a cluster that asks "
            "for a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        ),
    ],
)
def test_what_is_said_of_a_cluster_that_cannot_be_joined(tmp_path, monkeypatch, words, says):
    script = KEEPER_OF_A_RAY_THAT_FAILS.format(words=words)
    monkeypatch.setattr(ray_pool, "KEEPER", (sys.executable, "-c", script))
    log = tmp_path / "ray.log"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = re.escape(says.format(address=address, words=words, log=log))
        with RayPool(address, 2, log) as pool, pytest.raises(ClusterError, match=f"^{said}$"):
            pool.connect(with_gpus=False)


def test_an_address_that_swallows_everything_is_given_up_in_time(tmp_path, monkeypatch):
    """As behind a firewall: the queue of a server that accepts nobody is full."""
    monkeypatch.setattr(ray_pool, "REACH_LIMIT_S", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began_s = time.monotonic()
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}: timed out"):
            RayPool(address, 2, tmp_path / "ray.log")
        assert time.monotonic() - began_s < 5


def test_a_keeper_that_ends_takes_everything_along(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "launcher.runtime.hosts.ray_pool.KEEPER", (sys.executable, "-c", "import sys; sys.exit(3)")
    )
    with RayPool(None, 2, tmp_path / "ray.log") as pool:
        said = r"Ray does not start on this machine: the process that keeps Ray has ended \(runtime=ray;"
        with pytest.raises(ClusterError, match=said):
            pool.connect(with_gpus=False)
        with pytest.raises(HostDiedError):
            pool.call(0, methodcaller("about"), quick=True).result(LIMIT_S)
        pool.kill()


OWNER = """
import pathlib, sys, time
from launcher.runtime.hosts.ray_pool import RayPool
from test_ray_pool import seats
from ray_things import Thing
folder = pathlib.Path(sys.argv[1])
pool = RayPool(*sys.argv[2:] or [None], 2, folder / "ray.log")
pool.connect(with_gpus=False)
where = [future.result(60) for future in pool.start(seats(folder), 60)]
print(*(place.pid for place in where), flush=True)
time.sleep(600)
"""


def owner_of_a_ray(folder: pathlib.Path, *address: str) -> subprocess.Popen:
    """A process that has a pool with two processes of it, and prints which."""
    tests = pathlib.Path(__file__).parent
    paths = (str(tests), str(tests.parents[1] / "support"), str(tests.parents[2]))
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), *address], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


def test_nothing_outlives_a_run_that_is_killed(tmp_path):
    """Not even a process that is stopped, and not the folder of Ray's files."""
    owner = owner_of_a_ray(tmp_path)
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    processes = family(owner.pid)
    folder = ray_folder(processes)
    assert processes >= {*pids}
    os.kill(pids[0], signal.SIGSTOP)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert wait_until(lambda: not any(map(is_alive, processes))) < 10
    assert not folder.exists()


def test_nothing_outlives_a_run_that_is_killed_with_the_head_of_its_cluster(tmp_path, monkeypatch):
    """As when Slurm ends all of a job's processes: nobody is there to take leave of."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    with two_machines(tmp_path / "cluster.log") as (address, say):
        owner = owner_of_a_ray(tmp_path, address)
        assert len(owner.stdout.readline().split()) == 2
        processes = family(owner.pid)
        folder = ray_folder(processes)
        say("behead")
        owner.kill()
        owner.wait()
        owner.stdout.close()
        assert wait_until(lambda: not any(map(is_alive, processes))) < 10
        assert not folder.exists()


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        ("auto", {}, None),
        ("auto", {"RAY_ADDRESS": "head:6379"}, "head:6379"),
        ("auto", {"RAY_ADDRESS": "local"}, None),
        ("auto", {"RAY_ADDRESS": "auto"}, "auto"),
        (None, {"RAY_ADDRESS": "head:6379"}, None),
        ("other:1", {"RAY_ADDRESS": "head:6379"}, "other:1"),
    ],
)
def test_whose_ray(asked, environment, found):
    assert ray_address(asked, environment) == found
