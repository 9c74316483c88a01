"""One run in a folder at a time.

Two runs in one folder would mix their rows, and remove one another's checkpoints. Who works in a
folder holds `.lock`, which says who that is:

- On one host, and wherever the file system tells all hosts of locks, the kernel's lock on the file
  decides. It ends with its process, however that ends, so a killed run blocks nobody.
- Where locks are not told to other hosts (NFS mounted with nolock, some parallel file systems), the
  file's time decides, which its holder moves every few seconds: a file of another host that stands
  still while it is watched was left behind. No clocks are compared.
- Where there are no locks at all, a holder of the same host is looked for by its process.

Left out: two hosts that begin in the same second, on a file system that keeps their locks apart; and
a process that stands still for long (SIGSTOP) on another host, which looks like one that has died.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.errors import ConfigError

LOCK_NAME = ".lock"
BEAT_S = 5.0  # between two signs of life
PATIENCE_S = 20.0  # for which a file of another host is watched
_RETRY_S, _TRIES = 0.1, 5  # whoever asks about a lock holds it for a moment
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who works in a folder.

    Attributes:
        started: When the process began, as the kernel counts it: process ids are used again.
        since_s: Of the world's clock.
    """

    host: str
    pid: int
    started: str
    since_s: float

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether the process is there, if it is of this host."""
        return self.started == _started(self.pid)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
        return f"process {self.pid} on {self.host}, since {since}"


class RunLock:
    """A folder that is held until `release`."""

    def __init__(self, folder: Path, file: BinaryIO, left_by: Holder | None) -> None:
        """`left_by` is whose lock it was that has died in the folder."""
        self.folder, self.left_by = folder, left_by
        self._file = file
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._live, name="run-lock", daemon=True)
        self._beat.start()

    def release(self) -> None:
        """Let go of the folder, and leave nothing in it; the second time nothing happens."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            (self.folder / LOCK_NAME).unlink()
        self._file.close()

    def _live(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())


def take(folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> RunLock:
    """Hold a folder.

    Raises:
        ConfigError: another process works in it.
        OSError: the file cannot be made.
    """
    if folder.exists() and not folder.is_dir():  # or the error would name the file of the lock
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    file = _open_locked(folder / LOCK_NAME, sleep)
    try:
        left_by = _read(file)
        if left_by is not None and _is_at_work(folder / LOCK_NAME, file, left_by, sleep):
            raise in_use(folder, left_by)
        _write(file)
    except BaseException:
        file.close()
        raise
    return RunLock(folder, file, left_by)


def in_use(folder: Path, holder: Holder | None) -> ConfigError:
    """What to say of a folder that another process works in."""
    who = f"by {holder}" if holder else "by another process that has just begun"
    return ConfigError(
        f"{folder} is in use {who} (hydra.run.dir={folder}): wait for its end or stop it, and run this "
        f"again; or take another hydra.run.dir"
    )


def holder_of(folder: Path) -> tuple[Holder | None, bool]:
    """Who has held a folder last without letting go of it, and whether that process still does.

    It only looks: of another host that a lock says nothing of, the file's age decides, by this host's clock.
    """
    try:
        with (folder / LOCK_NAME).open("rb") as file:
            holder, age_s = _read(file), time.time() - os.fstat(file.fileno()).st_mtime
            is_free = _lock(file, fcntl.LOCK_SH)
    except OSError:
        return None, False
    if holder is None or is_free is False:
        return holder, is_free is False
    if holder.is_here:
        return holder, is_free is None and holder.lives
    return holder, age_s < PATIENCE_S


def _open_locked(path: Path, sleep: Callable[[float], None]) -> BinaryIO:
    for _ in range(_TRIES):
        file = path.open("a+b")
        is_free = _lock(file, fcntl.LOCK_EX)
        # Who held it may have removed the file between these two lines.
        if is_free is not False and _is_same(path, file):
            return file
        holder = _read(file)
        file.close()
        sleep(_RETRY_S)
    raise in_use(path.parent, holder)


def _lock(file: BinaryIO, kind: int) -> bool | None:
    """Lock a file; False: another process has; None: there are no locks here."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_at_work(path: Path, file: BinaryIO, holder: Holder, sleep: Callable[[float], None]) -> bool:
    """Whether who wrote into the file works on, though its lock was not in the way."""
    if holder.is_here:
        # Where there are locks, ours is proof that it does not.
        return _lock(file, fcntl.LOCK_EX) is None and holder.lives
    before = _time(path)
    for _ in range(round(PATIENCE_S)):
        sleep(1.0)
        if _time(path) != before:
            return True
    return False


def _time(path: Path) -> int:
    # Opened anew, for NFS remembers the times of an open file for a minute.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _read(file: BinaryIO) -> Holder | None:
    file.seek(0)
    try:
        told = json.loads(file.read(4096))
        return Holder(
            host=str(told["host"]),
            pid=int(told["pid"]),
            started=str(told["started"]),
            since_s=float(told["since_s"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: BinaryIO) -> None:
    pid = os.getpid()
    holder = Holder(host=socket.gethostname(), pid=pid, started=_started(pid), since_s=time.time())
    file.truncate(0)
    file.write(json.dumps(asdict(holder)).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; "" if there is none."""
    try:
        # The name in brackets may hold blanks and brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
