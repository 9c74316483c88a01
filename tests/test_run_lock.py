"""A run's folder is held by one process at a time, and by none that has died."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from launcher import run_lock
from launcher.errors import ConfigError
from launcher.run_lock import LOCK_NAME, Holder, holder_of, take

ROOT = pathlib.Path(__file__).parents[1]
HOLDS = "import sys, pathlib; from launcher import run_lock; lock = run_lock.take(pathlib.Path(sys.argv[1]));"


@pytest.fixture
def other(tmp_path):
    """A process of this host that holds the folder."""
    code = f"{HOLDS} print('held', flush=True); sys.stdin.read(); lock.release()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def left(folder: pathlib.Path, **changes) -> Holder:
    """Write what a process leaves that has died."""
    holder = Holder(host="elsewhere", pid=7, started="1", since_s=0.0)
    holder = dataclasses.replace(holder, **changes)
    (folder / LOCK_NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def no_sleep(_: float) -> None:
    pass


def test_who_holds_it_is_named(tmp_path, other):
    with pytest.raises(
        ConfigError, match=rf"in use by process {other.pid} on .*, since 20.* \(hydra.run.dir="
    ):
        take(tmp_path)
    holder, works = holder_of(tmp_path)
    assert (holder.pid, works) == (other.pid, True)


def test_a_killed_process_holds_nothing(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder_of(tmp_path)[1] is False
    lock = take(tmp_path)
    assert lock.left_by.pid == other.pid
    assert holder_of(tmp_path) == (
        dataclasses.replace(holder_of(tmp_path)[0], pid=os.getpid()),
        True,
    )
    lock.release()


def test_what_is_let_go_leaves_nothing(tmp_path, other):
    other.communicate(b"")
    assert list(tmp_path.iterdir()) == []
    lock = take(tmp_path)
    assert lock.left_by is None
    lock.release()
    assert list(tmp_path.iterdir()) == []
    second = take(tmp_path)
    lock.release()  # again
    assert holder_of(tmp_path)[1] is True
    second.release()
    assert holder_of(tmp_path) == (None, False)


def test_whoever_looks_for_a_moment_keeps_nobody_out(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    looks = (tmp_path / LOCK_NAME).open("rb")
    fcntl.flock(looks, fcntl.LOCK_SH)
    take(tmp_path, sleep=lambda _: looks.close()).release()


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    path, real = tmp_path / LOCK_NAME, fcntl.flock
    removed = []

    def flock(file, kind):
        real(file, kind)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = take(tmp_path, sleep=no_sleep)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_another_host_that_gives_signs_of_life_keeps_it(tmp_path):
    holder = left(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(str(holder))):
        take(tmp_path, sleep=lambda _: os.utime(tmp_path / LOCK_NAME))
    assert holder_of(tmp_path) == (holder, True)


def test_another_host_that_gives_none_has_left_it(tmp_path):
    holder, slept = left(tmp_path), []
    lock = take(tmp_path, sleep=slept.append)
    assert lock.left_by == holder
    assert sum(slept) == run_lock.PATIENCE_S
    lock.release()
    left(tmp_path)
    long_ago = time.time() - 2 * run_lock.PATIENCE_S
    os.utime(tmp_path / LOCK_NAME, (long_ago, long_ago))
    assert holder_of(tmp_path) == (holder, False)


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    lock = take(tmp_path)
    os.utime(tmp_path / LOCK_NAME, (0, 0))
    until_s = time.monotonic() + 10
    while (tmp_path / LOCK_NAME).stat().st_mtime == 0:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    lock.release()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def flock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_process_that_lives_keeps_it(tmp_path, other):
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on"):
        take(tmp_path, sleep=no_sleep)
    assert holder_of(tmp_path)[1] is True


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_dead_process_holds_nothing_though_its_number_is_used_again(tmp_path):
    import socket

    left(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="0")
    assert holder_of(tmp_path)[1] is False
    take(tmp_path, sleep=no_sleep).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"pid": "x"}'])
def test_a_damaged_file_is_of_nobody(tmp_path, text):
    (tmp_path / LOCK_NAME).write_text(text)
    assert holder_of(tmp_path) == (None, False)
    lock = take(tmp_path)
    assert lock.left_by is None
    lock.release()


def launch(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launcher", f"hydra.run.dir={folder}", "mode=plan", *arguments],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_second_run_writes_nothing_into_the_folder(tmp_path, other):
    done = launch(tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is in use by process {other.pid}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_a_run_takes_over_from_one_that_was_killed(tmp_path, other):
    other.kill()
    other.wait()
    done = launch(tmp_path, "parallel=single", "model.layers=1", "model.hidden=16")
    assert done.returncode == 0, done.stderr
    assert f"this folder was left by process {other.pid}" in done.stdout
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "planned"
    assert not (tmp_path / LOCK_NAME).exists()
