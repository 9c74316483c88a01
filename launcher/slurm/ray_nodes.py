"""Ray over the nodes of a job: its head on the first, a worker on each other one.

Each is a process of `ray start --block`, which ends with what it has started. Nothing here imports Ray, and
the run that uses it (`runtime.address`) knows nothing of Slurm. Slurm sends the warning ahead of a job's end
to all processes of a node: Ray's ignore it, as the run needs them to write its checkpoint.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError
from launcher.slurm.job_folder import read_ends
from launcher.slurm.meeting import (
    HEAD_NAME,
    Head,
    Watch,
    announce,
    note_joined,
    wait_for_all,
    wait_for_head,
)
from launcher.slurm.step import Step, own_address

START_LIMIT_S, JOIN_LIMIT_S, _END_LIMIT_S = 120.0, 300.0, 20.0
_LOOK_EVERY_S = 0.5
_STARTED = "Ray runtime started"  # what `ray start` says when it is
_OBJECT_STORE_BYTES = 128 * 2**20  # runs move their data by themselves
_QUIETLY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# The signals that warn of an end, ignored by this shell, are ignored by all that it becomes and starts.
_DEAF = ("/bin/sh", "-c", 'trap "" USR1 USR2 INT; exec "$@"', "ray")
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(kw_only=True)
class RayNode:
    """A process of `ray start --block`, what it has said, and its folder of temporary files."""

    process: subprocess.Popen
    log: Path
    folder: Path

    def wait_until_started(self) -> None:
        """Wait until this node is part of the cluster, or raise ClusterError with Ray's words."""
        until_s = time.monotonic() + START_LIMIT_S
        while _STARTED not in self.said():
            self.check()
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"Ray has not started on {socket.gethostname()} within {START_LIMIT_S:.0f} s "
                    f"(runtime=ray): see {self.log}, and `python -m launcher.doctor` there"
                )
            time.sleep(_LOOK_EVERY_S)

    def check(self) -> None:
        """Raise ClusterError if it has ended."""
        status = self.process.poll()
        if status is not None:
            words = " ".join(self.said().split()[-40:])
            raise ClusterError(
                f"Ray has ended on {socket.gethostname()} with status {status}: {words}: see {self.log}"
            )

    def said(self) -> str:
        """What it has written so far."""
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")
        return ""

    def end(self) -> None:
        """End it, with all that it has started; asked nicely, it would wait half a minute for its tasks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def head(step: Step, meeting: Path, num_cpus: int) -> Iterator[str]:
    """Within the context Ray runs on all nodes of the step; gives its address.

    Args:
        num_cpus: for how many emulated hosts each node has room.
    """
    ip = own_address(os.environ)
    address = f"{ip}:{_free_port(ip)}"
    token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    node = _start(
        ("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"),
        ip, num_cpus, meeting / "ray-0.log",
    )  # fmt: skip
    try:
        node.wait_until_started()
        announce(meeting, Head(address=address, token=token, num_cpus=num_cpus))
        wait_for_all(meeting, step.num_nodes, JOIN_LIMIT_S, node.check)
        yield address
    finally:
        node.end()
        (meeting / HEAD_NAME).unlink(missing_ok=True)  # it has the token


def work(step: Step, meeting: Path) -> None:
    """Be a worker of the first node's Ray until that has ended.

    Raises:
        ClusterError: the first node cannot be joined, is lost, or Ray has ended here.
    """
    found = wait_for_head(meeting, lambda: _first_has_ended(meeting))
    if found is None:
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": found.token}
    ip = own_address(os.environ)
    log = meeting / f"ray-{step.node}.log"
    node = _start((f"--address={found.address}",), ip, found.num_cpus, log)
    try:
        node.wait_until_started()
        note_joined(meeting, step.node)
        _stay(node, meeting)
    except ClusterError:
        # Ray ends here too when the first node's does, which may be before that says so.
        if not _first_ends_soon(meeting):
            raise
    finally:
        node.end()


def _stay(node: RayNode, meeting: Path) -> None:
    watch = Watch(meeting)
    while not _first_has_ended(meeting):
        node.check()
        watch.look()
        time.sleep(_LOOK_EVERY_S)


def _first_has_ended(meeting: Path) -> bool:
    return any(one.rank == 0 for one in read_ends(meeting))


def _first_ends_soon(meeting: Path) -> bool:
    until_s = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < until_s:
        if _first_has_ended(meeting):
            return True
        time.sleep(_LOOK_EVERY_S)
    return False


def _start(arguments: tuple[str, ...], ip: str, num_cpus: int, log: Path) -> RayNode:
    # Short, because Ray's sockets lie in it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = (
        *_DEAF, *_RAY, "start", *arguments,
        f"--node-ip-address={ip}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats", "--block",
    )  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | _QUIETLY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RayNode(process=process, log=log, folder=folder)


def _free_port(ip: str) -> int:
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return probe.getsockname()[1]
