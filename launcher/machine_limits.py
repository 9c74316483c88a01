"""What the kernel and the cgroups of this process leave to it of memory and CPUs."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def free_memory_bytes(cgroups: Path = CGROUPS, proc: Path = PROC) -> int | None:
    """Return what this process could still take; None where the system does not tell."""
    left = available_memory(text_of(proc / "meminfo"))
    limit, used = cgroup_memory(cgroups, text_of(proc / "self" / "cgroup"))
    known = [] if left is None else [left]
    if limit is not None:
        known.append(max(0, limit - (used or 0)))
    return min(known, default=None)


def text_of(path: Path) -> str:
    """Return what a file of the kernel says; "" on systems that have none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def cgroup_memory(root: Path, own: str) -> tuple[int | None, int | None]:
    """Return the limit of the cgroup that binds most, and what is used of it.

    Args:
        root: where cgroups are mounted, /sys/fs/cgroup.
        own: the text of /proc/self/cgroup.
    """
    found = [
        (limit, _used(place, used_file))
        for place, limit_file, used_file in _memory_places(root, own)
        if (limit := _number(place / limit_file)) is not None and limit < 1 << 60
    ]
    return min(found, key=lambda pair: pair[0], default=(None, None))


def cgroup_cpus(root: Path, own: str) -> float | None:
    """Return how many CPUs the cgroup's quota is worth."""
    quotas = []
    for place in _ancestors(root, _path(own, "")):
        words = text_of(place / "cpu.max").split()
        if len(words) == 2 and words[0].isdecimal():
            quotas.append(int(words[0]) / int(words[1]))
    for place in _ancestors(root / "cpu", _path(own, "cpu")):
        quota, period = _number(place / "cpu.cfs_quota_us"), _number(place / "cpu.cfs_period_us")
        if quota is not None and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _memory_places(root: Path, own: str) -> Iterator[tuple[Path, str, str]]:
    """Yield the folders that may hold a limit on memory, of both versions of cgroups."""
    for place in _ancestors(root, _path(own, "")):
        yield place, "memory.max", "memory.current"
    for place in _ancestors(root / "memory", _path(own, "memory")):
        yield place, "memory.limit_in_bytes", "memory.usage_in_bytes"


def _path(own: str, controller: str) -> str:
    """Return the cgroup of a controller ("": version 2), as /proc/self/cgroup names it."""
    for line in own.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            return path
    return "/"


def _ancestors(root: Path, path: str) -> list[Path]:
    """The cgroup and those around it; a container often sees its own as the root."""
    place = root / path.lstrip("/")
    return [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]


def _used(place: Path, used_file: str) -> int | None:
    """Memory in use without the files that are kept in it and would be dropped for a run."""
    used = _number(place / used_file)
    if used is None:
        return None
    rows = (line.split() for line in text_of(place / "memory.stat").splitlines())
    dropped = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return used - dropped.get("total_inactive_file", dropped.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if text.isdecimal() else None


def available_memory(meminfo: str) -> int | None:
    """Read what the kernel says is left, from the text of /proc/meminfo."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
