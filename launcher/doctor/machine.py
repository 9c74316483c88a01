"""Ask this machine: its limits, its mounts, and whether a server answers. Nothing is judged here."""

import os
import resource
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

from launcher.doctor.limits import Limits
from launcher.machine_limits import (
    CGROUPS,
    PROC,
    available_memory,
    cgroup_cpus,
    cgroup_memory,
    text_of,
)

_SHM = Path("/dev/shm")


def read_limits() -> Limits:
    """Read the limits of this process."""
    own = text_of(PROC / "self" / "cgroup")
    limit_bytes, used_bytes = cgroup_memory(CGROUPS, own)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        available_bytes=available_memory(text_of(PROC / "meminfo")),
        cgroup_memory_bytes=limit_bytes,
        cgroup_used_bytes=used_bytes,
        num_cpus=_num_cpus(),
        cgroup_cpus=cgroup_cpus(CGROUPS, own),
        open_files=_count(soft),
        open_files_most=_count(hard),
        shm_bytes=_free_bytes(_SHM),
    )


def reach(server: str, limit_s: float) -> str | None:
    """Ask a web server for any answer at all; return what is in the way, or None.

    A proxy of the environment is used, as W&B does. Looking a name up has no time limit of its own, so
    all of it happens in a thread that may be left behind.
    """
    obstacles = [f"no answer within {limit_s:.0f} s"]
    thread = threading.Thread(target=_ask, args=(server, limit_s, obstacles), daemon=True)
    thread.start()
    thread.join(limit_s)
    return obstacles[-1] or None


def connect(host: str, port: int, limit_s: float) -> str | None:
    """Open a connection and close it again; return what is in the way, or None."""
    try:
        with socket.create_connection((host, port), timeout=limit_s):
            return None
    except OSError as error:
        return str(error)


def _ask(server: str, limit_s: float, obstacles: list[str]) -> None:
    try:
        with urllib.request.urlopen(server, timeout=limit_s):
            obstacles.append("")
    except urllib.error.HTTPError:  # it answers, if only that there is no such page
        obstacles.append("")
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        obstacles.append(" ".join(str(reason).split()))


def _num_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no such thing
        return os.cpu_count() or 1


def _count(limit: int) -> int:
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def _free_bytes(folder: Path) -> int | None:
    try:
        stats = os.statvfs(folder)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize
