"""Where runs are written: space, inodes, and how fast data gets to the disk; and the compilation cache."""

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.filesystems import Kind, filesystem_of, kind_of
from launcher.doctor.findings import Finding, failed, ok, warning
from launcher.doctor.wording import GIB_BYTES, size

FILE_BYTES = 64_000_000
CHUNK_BYTES = 4_000_000
WRITE_LIMIT_S = 10.0  # what is written by then is enough for a speed
NUM_SYNCS = 8
LEAST_FREE_BYTES = 1 * GIB_BYTES
# The training state of a model of 1.3 billion parameters, 16 bytes each: one checkpoint.
CHECKPOINT_BYTES = 16 * 1_300_000_000
LEAST_INODES = 10_000
SLOW_BYTES_PER_S = 50e6
SLOW_SYNC_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ANOTHER = "give runs another folder: hydra.run.dir=<folder>, and look at it with dir=<folder>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a file was written."""

    written_bytes: int
    write_s: float  # until the data was in the system's hands and synchronised
    sync_s: float  # of one small write that is synchronised


def existing(folder: Path) -> Path:
    """Return the folder, or the innermost one around it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def check_space(
    folder: Path, statvfs: Callable[[Path], os.statvfs_result], mounts: str
) -> Iterator[Finding]:
    """Look at the free space, the inodes and the kind of filesystem."""
    stats = statvfs(folder)
    if stats.f_flag & os.ST_RDONLY:
        yield failed(
            f"{folder} is mounted read-only",
            "a run cannot write its files there and ends with status 6",
            _ANOTHER,
        )
        return
    yield _space(folder, stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize)
    # Some filesystems make inodes as they need them, and count none.
    if stats.f_files and stats.f_favail < LEAST_INODES:
        yield warning(
            f"{folder} has room for {stats.f_favail} more files of {stats.f_files}",
            "writing fails with 'no space left' while there still is space",
            "remove old runs and caches there (`df -i` shows the inodes)",
        )
    yield _filesystem(folder, filesystem_of(folder.resolve(), mounts))


def _space(folder: Path, free_bytes: int, total_bytes: int) -> Finding:
    what = f"{folder} has {size(free_bytes)} of {size(total_bytes)} free"
    if free_bytes < LEAST_FREE_BYTES:
        return failed(
            f"{what}; {size(LEAST_FREE_BYTES)} is the least",
            "logs, metrics and W&B's files fill it, and the run ends with status 6",
            f"remove what is no longer needed there, or {_ANOTHER}",
        )
    if free_bytes < CHECKPOINT_BYTES:
        return warning(
            what,
            f"one checkpoint of a model of 1.3 billion parameters takes {size(CHECKPOINT_BYTES)}",
            f"enough for small models; for larger ones {_ANOTHER}",
        )
    return ok(what)


def _filesystem(folder: Path, filesystem: str) -> Finding:
    match kind_of(filesystem):
        case Kind.NETWORK:
            return warning(
                f"{folder} is on a network filesystem ({filesystem})",
                "writing many small files is slow there, and every job of the cluster feels it",
                "if there is a scratch filesystem, use that: hydra.run.dir=<folder>",
            )
        case Kind.MEMORY:
            return warning(
                f"{folder} is in memory ({filesystem})",
                "what is written there takes the memory of runs, and is gone after a restart",
                _ANOTHER,
            )
        case Kind.PARALLEL:
            return ok(f"{folder} is on a parallel filesystem ({filesystem})")
        case Kind.LOCAL:
            return ok(f"{folder} is on a local filesystem ({filesystem})")
        case Kind.UNKNOWN:
            return ok(f"{folder}: this system does not tell its kind of filesystem")


def check_speed(folder: Path, measure: Callable[[Path], Speed]) -> Iterator[Finding]:
    """Write a file into the folder and remove it again."""
    try:
        speed = measure(folder)
    except OSError as error:
        yield _cannot_write(folder, error)
        return
    bytes_per_s = speed.written_bytes / speed.write_s
    what = (
        f"{folder} takes {bytes_per_s / 1e6:.0f} MB/s ({speed.written_bytes / 1e6:.0f} MB written "
        f"and synchronised), a small synchronised write takes {speed.sync_s * 1e3:.1f} ms"
    )
    if bytes_per_s < SLOW_BYTES_PER_S or speed.sync_s > SLOW_SYNC_S:
        yield warning(
            what,
            f"a checkpoint of {size(CHECKPOINT_BYTES)} (1.3 billion parameters) would take "
            f"{CHECKPOINT_BYTES / bytes_per_s / 60:.0f} minutes",
            f"see who else writes there (`iotop`, `nfsiostat`), or {_ANOTHER}",
        )
    else:
        yield ok(what)


def _cannot_write(folder: Path, error: OSError) -> Finding:
    if error.errno in _FULL:
        return failed(
            f"{folder} is full, or your quota is: {error.strerror}",
            f"not even {FILE_BYTES / 1e6:.0f} MB fit, so a run ends with status 6",
            f"remove what is no longer needed (`df -h`, `quota`), or {_ANOTHER}",
        )
    if error.errno == errno.EROFS:
        return failed(
            f"{folder} is read-only: {error.strerror}",
            "a run cannot write its files there and ends with status 6",
            f"a disk with errors is often made read-only: see `dmesg`; meanwhile {_ANOTHER}",
        )
    return failed(
        f"{folder} cannot be written: {error.strerror or error}",
        "a run cannot write its files there and ends with status 6",
        f"see its owner and rights (`ls -ld`), or {_ANOTHER}",
    )


def measure_speed(folder: Path, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Write a file of 64 MB, synchronise it, then a few small writes; the file is removed in any case.

    Raises:
        OSError: the folder cannot be written.
    """
    chunk = os.urandom(CHUNK_BYTES)  # some filesystems compress, and zeros would cost nothing
    descriptor, path = tempfile.mkstemp(prefix=".launcher-doctor-", dir=folder)
    try:
        written_bytes, start = 0, clock()
        while written_bytes < FILE_BYTES and clock() - start < WRITE_LIMIT_S:
            written_bytes += os.write(descriptor, chunk)
        os.fsync(descriptor)
        write_s = clock() - start
        start = clock()
        for _ in range(NUM_SYNCS):
            os.write(descriptor, chunk[:4096])
            os.fsync(descriptor)
        sync_s = (clock() - start) / NUM_SYNCS
    finally:
        os.close(descriptor)
        os.unlink(path)
    return Speed(written_bytes=written_bytes, write_s=write_s, sync_s=sync_s)


def check_cache(folder: Path) -> Iterator[Finding]:
    """See that compiled programs can be kept; the folder itself is made by the first run."""
    place = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(prefix=".launcher-doctor-", dir=place):
            pass
    except OSError as error:
        yield warning(
            f"compiled programs cannot be kept in {folder}: {place}: {error.strerror or error}",
            "every run compiles anew, which takes minutes for large models",
            "runtime.compilation_cache=<folder that can be written>, or JAX_COMPILATION_CACHE_DIR",
        )
        return
    yield ok(f"compiled programs are kept in {folder}")
