"""Folders that are roomy, full, read-only, slow or far away, and the limits of a process."""

import dataclasses
import errno
import os
import pathlib

import pytest
from doctor_fakes import only, statuses

from launcher.doctor import limits
from launcher.doctor.filesystems import Kind, filesystem_of, kind_of
from launcher.doctor.findings import Status
from launcher.doctor.limits import Limits
from launcher.doctor.storage import (
    FILE_BYTES,
    Speed,
    check_cache,
    check_space,
    check_speed,
    existing,
    measure_speed,
)

GIB = 1 << 30
MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
fileserver:/home /home nfs4 rw 0 0
scratch@tcp:/fs /scratch lustre rw 0 0
tmpfs /home/me/in\\040memory tmpfs rw 0 0
"""
ROOMY = Limits(
    available_bytes=64 * GIB,
    cgroup_memory_bytes=None,
    cgroup_used_bytes=None,
    num_cpus=16,
    cgroup_cpus=None,
    open_files=65_536,
    open_files_most=1 << 20,
    shm_bytes=32 * GIB,
)


def space(folder: str, *, free_bytes=500 * GIB, inodes=1 << 20, flag=0, mounts=MOUNTS):
    blocks = free_bytes // 4096
    stats = os.statvfs_result(
        (4096, 4096, 1 << 40, blocks, blocks, 1 << 21, inodes, inodes, flag, 255)
    )
    return list(check_space(pathlib.Path(folder), lambda _: stats, mounts))


def limited(**changes) -> Limits:
    return dataclasses.replace(ROOMY, **changes)


def raises(number: int):
    def measure(folder):
        raise OSError(number, os.strerror(number))

    return measure


def test_a_roomy_folder():
    assert statuses(space("/data")) == ["ok", "ok"]
    assert "500.0 GiB of" in space("/data")[0].what


def test_a_folder_with_little_space():
    low = space("/data", free_bytes=5 * GIB)[0]
    assert low.status is Status.WARNING
    assert "19.4 GiB" in low.meaning
    full = space("/data", free_bytes=GIB // 2)[0]
    assert full.status is Status.FAILED
    assert "1.0 GiB is the least" in full.what


def test_a_folder_with_few_inodes():
    inodes = space("/data", inodes=12)[1]
    assert inodes.status is Status.WARNING
    assert inodes.what.startswith("/data has room for 12 more files")


def test_a_read_only_mount():
    finding = only(space("/data", flag=os.ST_RDONLY))
    assert finding.status is Status.FAILED
    assert finding.what == "/data is mounted read-only"


@pytest.mark.parametrize(
    ("folder", "kind", "status"),
    [
        ("/home/you", "nfs4", "warning"),
        ("/home/me/in memory/runs", "tmpfs", "warning"),
        ("/scratch/runs", "lustre", "ok"),
        ("/homes", "ext4", "ok"),
    ],
)
def test_kinds_of_filesystems(folder, kind, status):
    assert filesystem_of(pathlib.Path(folder), MOUNTS) == kind
    finding = space(folder)[-1]
    assert finding.status == status
    assert kind in finding.what


def test_other_kinds_of_filesystems():
    assert kind_of("fuse.sshfs") is Kind.NETWORK
    assert kind_of(filesystem_of(pathlib.Path("/x"), "")) is Kind.UNKNOWN
    assert "does not tell" in space("/x", mounts="")[-1].what


def test_the_later_mount_hides_the_earlier():
    mounts = "a /x nfs rw 0 0\nb /x ext4 rw 0 0\n"
    assert filesystem_of(pathlib.Path("/x/y"), mounts) == "ext4"


def test_a_measured_speed(tmp_path):
    speed = measure_speed(tmp_path)
    assert speed.written_bytes == FILE_BYTES
    assert speed.write_s > 0
    assert speed.sync_s > 0
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_is_not_waited_for(tmp_path):
    seconds = iter(range(0, 1000, 4))
    speed = measure_speed(tmp_path, clock=lambda: float(next(seconds)))
    assert speed.written_bytes == 8_000_000


@pytest.mark.parametrize(
    ("write_s", "sync_s", "status"),
    [(0.1, 0.001, "ok"), (6.4, 0.001, "warning"), (0.1, 0.5, "warning")],
)
def test_speeds(write_s, sync_s, status):
    speed = Speed(written_bytes=FILE_BYTES, write_s=write_s, sync_s=sync_s)
    assert only(check_speed(pathlib.Path("/data"), lambda _: speed)).status == status


def test_the_time_of_a_checkpoint():
    speed = Speed(written_bytes=FILE_BYTES, write_s=6.4, sync_s=0.001)
    finding = only(check_speed(pathlib.Path("/data"), lambda _: speed))
    assert "/data takes 10 MB/s" in finding.what
    assert "would take 35 minutes" in finding.meaning  # 20.8 GB at 10 MB/s


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "/data is full, or your quota is: No space left on device"),
        (errno.EDQUOT, "/data is full, or your quota is: Disk quota exceeded"),
        (errno.EROFS, "/data is read-only: Read-only file system"),
        (errno.EACCES, "/data cannot be written: Permission denied"),
        (errno.EIO, "/data cannot be written: Input/output error"),
    ],
)
def test_folders_that_cannot_be_written(number, what):
    finding = only(check_speed(pathlib.Path("/data"), raises(number)))
    assert finding.status is Status.FAILED
    assert finding.what == what
    assert "hydra.run.dir" in finding.cure


def test_a_disk_that_fills_up_keeps_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: raises(errno.ENOSPC)(None))
    finding = only(check_speed(tmp_path, measure_speed))
    assert "is full" in finding.what
    assert not list(tmp_path.iterdir())


def test_the_cache(tmp_path, monkeypatch):
    assert only(check_cache(tmp_path / "not" / "yet")).status is Status.OK
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "open", lambda *_: raises(errno.EACCES)(None))
    finding = only(check_cache(tmp_path / "not" / "yet"))
    assert finding.status is Status.WARNING
    assert "Permission denied" in finding.what


def test_the_folder_that_exists(tmp_path):
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path


def all_limits(found: Limits) -> list:
    checks = (limits.check_memory, limits.check_cpus, limits.check_files, limits.check_shm)
    return [only(check(found)) for check in checks]


def test_limits_that_are_wide():
    assert statuses(all_limits(ROOMY)) == ["ok"] * 4
    unknown = limited(available_bytes=None)
    assert "does not tell" in only(limits.check_memory(unknown)).what


@pytest.mark.parametrize(
    ("changes", "index", "status", "text"),
    [
        ({"available_bytes": GIB // 2}, 0, "failed", "512 MiB of memory are left"),
        ({"available_bytes": 2 * GIB}, 0, "warning", "2.0 GiB of memory are left"),
        (
            {"cgroup_memory_bytes": 8 * GIB, "cgroup_used_bytes": 6 * GIB},
            0,
            "warning",
            "2.0 GiB of memory are left; the limit of this job or container is 8.0 GiB",
        ),
        ({"cgroup_cpus": 0.5}, 1, "warning", "16 CPUs (this job or container may use 0.5)"),
        ({"num_cpus": 1}, 1, "warning", "1 CPU"),
        (
            {"open_files": 1024},
            2,
            "warning",
            "may have 1024 files open (it may raise that to 1048576)",
        ),
        ({"shm_bytes": 64 << 20}, 3, "warning", "/dev/shm has 64 MiB free"),
        ({"shm_bytes": None}, 3, "warning", "there is no /dev/shm"),
    ],
)
def test_limits_that_are_narrow(changes, index, status, text):
    finding = all_limits(limited(**changes))[index]
    assert finding.status == status
    assert text in finding.what


def test_who_can_raise_the_limit_on_files():
    (finding,) = limits.check_files(limited(open_files=256, open_files_most=1024))
    assert finding.cure.startswith("ulimit -n 1024 before the run; the administrators")
