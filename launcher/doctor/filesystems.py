"""Which kind of filesystem a folder lies on, read off the kernel's list of mounts."""

import re
from enum import StrEnum
from pathlib import Path


class Kind(StrEnum):
    """What matters to a run about a filesystem."""

    LOCAL = "local"
    PARALLEL = "parallel"  # shared by hosts, and made for large files from many of them
    NETWORK = "network"
    MEMORY = "memory"
    UNKNOWN = "unknown"


_KINDS = {
    Kind.PARALLEL: ("lustre", "gpfs", "beegfs", "wekafs", "fhgfs", "pvfs2", "panfs"),
    Kind.NETWORK: (
        "nfs",
        "nfs3",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "afs",
        "9p",
        "ceph",
        "glusterfs",
    ),
    Kind.MEMORY: ("tmpfs", "ramfs"),
}


def filesystem_of(folder: Path, mounts: str) -> str:
    """Return the type of the filesystem that holds an absolute folder; "" if that is not told.

    Args:
        mounts: the text of /proc/self/mounts.
    """
    # Of equally long ones the last is mounted over the others.
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(_unescaped(fields[1]))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def kind_of(filesystem: str) -> Kind:
    """Sort a filesystem's type; those in user space (sshfs, buckets) count as network."""
    if not filesystem:
        return Kind.UNKNOWN
    known = (kind for kind, names in _KINDS.items() if filesystem in names)
    return next(known, Kind.NETWORK if filesystem.startswith("fuse.") else Kind.LOCAL)


def _unescaped(text: str) -> str:
    """Undo the kernel's octal escapes of blanks: `\\040` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
