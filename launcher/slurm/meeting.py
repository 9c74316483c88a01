"""How the processes of a job step find each other: small files in a folder that all nodes share.

    head.json       where the first process can be joined, and with which token: readable by its owner alone
    alive           which the first process touches every few seconds, so that it is missed when it dies
    rank-N.joined   the process of node N is part of it
    rank-N.done ... how it ended (`job_folder`)

No clocks are compared: a file that does not change while it is watched stands still.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import ClusterError

HEAD_NAME, ALIVE_NAME = "head.json", "alive"
BEAT_S, PATIENCE_S = 2.0, 60.0
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where the first process is, the token that lets others join, and what a node has room for."""

    address: str
    token: str
    num_cpus: int


class SignsOfLife:
    """Touches `alive` until the end of the context."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ALIVE_NAME
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="alive", daemon=True)

    def __enter__(self) -> "SignsOfLife":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            self._path.write_text(str(count))


def announce(folder: Path, head: Head) -> None:
    """Say where the first process can be joined."""
    beside = folder / f".{HEAD_NAME}.{os.getpid()}"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(head)))
    beside.replace(folder / HEAD_NAME)


def wait_for_head(folder: Path, has_ended: Callable[[], bool]) -> Head | None:
    """Wait for the first process; None: it has ended without needing anybody.

    Raises:
        ClusterError: it is not there, or has died.
    """
    watch = Watch(folder)
    while not has_ended():
        try:
            return Head(**json.loads((folder / HEAD_NAME).read_text()))
        except (FileNotFoundError, ValueError):
            watch.look()
            time.sleep(_LOOK_EVERY_S)
    return None


class Watch:
    """Notices when the first process gives no sign of life any more."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ALIVE_NAME
        self._seen, self._at_s = None, time.monotonic()

    def look(self) -> None:
        """Raise ClusterError when there was none for too long."""
        try:
            sign = self._path.read_text()
        except OSError:
            sign = None
        now_s = time.monotonic()
        if sign != self._seen:
            self._seen, self._at_s = sign, now_s
        elif now_s - self._at_s > PATIENCE_S:
            raise ClusterError(
                f"the launcher process of the job's first node has given no sign of life for "
                f"{PATIENCE_S:.0f} s (in {self._path.parent}, which all nodes must share): see its output"
            )


def note_joined(folder: Path, node: int) -> None:
    """Say that the process of this node is part of it."""
    (folder / f"rank-{node}.joined").write_text("")


def wait_for_all(folder: Path, num_nodes: int, limit_s: float, check: Callable[[], None]) -> None:
    """Wait until all other nodes have joined.

    Args:
        check: raises when waiting makes no sense any more.

    Raises:
        ClusterError: some have not in time; the message says which.
    """
    until_s = time.monotonic() + limit_s
    while True:
        missing = [n for n in range(1, num_nodes) if not (folder / f"rank-{n}.joined").exists()]
        if not missing:
            return
        check()
        if time.monotonic() > until_s:
            raise ClusterError(
                f"{len(missing)} of {num_nodes} nodes have not joined within {limit_s:.0f} s (node "
                f"{', '.join(map(str, missing))} of the job): see their output beside this one, and that no "
                f"firewall is between the nodes"
            )
        time.sleep(_LOOK_EVERY_S)
