"""Checkpoints on disk: whole or not there, whatever fails in between; and which ones stay."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from launcher.errors import StorageError
from launcher.runtime.checkpoints import checkpoint_store
from launcher.runtime.checkpoints.checkpoint_manifest import (
    Manifest,
    ModelEntry,
    Progress,
    RunEntry,
)
from launcher.runtime.checkpoints.checkpoint_store import (
    CheckpointStore,
    read_checkpoint,
    read_manifest,
)

RUN = RunEntry(
    model=ModelEntry(name="gpt", size="tiny", dtype="fp32", fingerprint="f", overrides={}),
    seed=3,
    dataset="a text",
    global_batch=8,
    origin=None,
    config={"optimizer": {"name": "adamw"}},
    plan='{"version": 1}\n',
)


def manifest(step: int, eval_loss: float | None = None) -> Manifest:
    return Manifest(
        step=step, samples=8 * step, eval_loss=eval_loss, run=RUN, arrays={},
        progress=Progress(loss=2.5, best_loss=2.25, skipped_steps=1),
    )  # fmt: skip


def arrays(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "params/blocks/0/kernel": rng.normal(size=(5, 3)).astype(np.float32),
        "params/double": rng.normal(size=7),
        "params/brief": rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16),
        "params/empty": np.zeros((0, 4), np.float32),
        "optimizer/0/count": np.asarray(step, np.int32),
        "optimizer/0/flags": np.asarray([True, False]),
        "state/a.b/c d": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
    }


def assert_whole(store: CheckpointStore, step: int) -> None:
    found = store.newest_intact()
    assert found.manifest.step == step
    assert found.arrays.keys() == arrays(step).keys()
    for name, wanted in arrays(step).items():
        assert found.arrays[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found.arrays[name], wanted)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store, step, *, keep=3, eval_loss=None) -> Path:
    return store.save(manifest(step, eval_loss), arrays(step), keep=keep)


def data_files(folder: Path) -> list[Path]:
    """The files that hold entries of arrays."""
    return [path for path in (folder / "arrays").rglob("d/*") if path.is_file()]


def test_what_is_saved_is_read_back(store):
    path = save(store, 50)
    assert path == store.folder / "step-00000050"
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-00000050"]
    assert_whole(store, 50)
    found = read_manifest(path)
    assert dataclasses.replace(found, arrays={}, files={}) == manifest(50)
    assert str(found.arrays["params/blocks/0/kernel"]) == "float32[5,3]"
    assert (path / "plan.json").read_text() == RUN.plan


def test_an_empty_folder_has_none(store):
    assert store.newest_intact() is None
    assert store.steps() == []
    store.remove_leftovers()


def test_the_newest_stay_and_the_best(store):
    for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, float("inf"))):
        save(store, step, keep=2, eval_loss=loss)
    assert store.steps() == [20, 40, 50]
    assert store.best() == (20, 1.0)
    best = json.loads((store.folder / "best.json").read_text())
    assert best == {"best": "step-00000020", "step": 20, "eval_loss": 1.0}
    save(store, 60, keep=2, eval_loss=0.5)
    assert store.steps() == [50, 60]
    assert store.best() == (60, 0.5)


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "open", "unlink", "rmdir")


def write_plainly(folder: Path, given: dict[str, np.ndarray]) -> None:
    """In place of Orbax, whose threads do a number of file operations that is never the same."""
    folder.mkdir()
    for index, name in enumerate(sorted(given)):
        (folder / str(index)).write_bytes(given[name].tobytes())


def read_plainly(folder: Path, shapes: dict) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer((folder / str(index)).read_bytes(), dtype).reshape(shape)
        for index, (name, (dtype, shape)) in enumerate(sorted(shapes.items()))
    }


def crashing(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the file operation of this number, and all after it, fail as if the process were gone."""
    done: list[str] = []

    def failing(name, original):
        def operation(*given, **named):
            if len(done) >= number:
                raise KeyboardInterrupt(f"killed before {name}")
            done.append(name)
            return original(*given, **named)

        return operation

    for name in OPERATIONS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    for name in ("write_text", "write_bytes", "open"):
        patch.setattr(Path, name, failing(name, getattr(Path, name)))
    return done


def test_a_crash_between_any_two_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_store, "write_arrays", write_plainly)
    monkeypatch.setattr(checkpoint_store, "read_arrays", read_plainly)

    def begun(folder: Path) -> CheckpointStore:
        store = CheckpointStore(folder)
        save(store, 10, eval_loss=2.0)
        save(store, 20, eval_loss=3.0)
        return store

    store = begun(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        done = crashing(patch, 10_000)
        save(store, 30, keep=1, eval_loss=1.0)
    assert {"fsync", "write_text", "write_bytes", "rename", "rmdir", "unlink"} <= set(done)
    assert store.steps() == [30]
    found = set()
    for number in range(len(done)):
        store = begun(tmp_path / str(number))
        with pytest.MonkeyPatch.context() as patch:
            crashing(patch, number)
            with pytest.raises(KeyboardInterrupt, match="killed before"):
                save(store, 30, keep=1, eval_loss=1.0)
        assert_whole(store, newest := store.steps()[-1])
        found.add(newest)
        store.remove_leftovers()
        names = {path.name for path in store.folder.iterdir()}
        assert names - {"best.json"} == {store.path(step).name for step in store.steps()}
    assert found == {20, 30}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write_arrays", "sync"])
def test_a_full_disk_leaves_the_previous_one(store, monkeypatch, code, where):
    save(store, 10)

    def full(*given):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint_store, where, full)
    with pytest.raises(StorageError, match=r"step-00000020 .*\d+ bytes needed, \d+ free.*"
                       r"checkpoint.dir=.*: free some space there"):  # fmt: skip
        save(store, 20)
    assert [p.name for p in store.folder.iterdir()] == ["step-00000010"]
    assert_whole(store, 10)


def test_a_library_that_fails_is_a_storage_error(store, monkeypatch):
    def fails(*given):
        raise ValueError("RESOURCE_EXHAUSTED: no room\nand a page of stack")

    monkeypatch.setattr(checkpoint_store, "write_arrays", fails)
    with pytest.raises(
        StorageError, match="ValueError: RESOURCE_EXHAUSTED: no room; .* bytes needed"
    ):
        save(store, 20)


def test_nothing_is_written_where_there_is_no_room(store, monkeypatch):
    usage = SimpleNamespace(free=sum(array.nbytes for array in arrays(20).values()) - 1)
    monkeypatch.setattr(checkpoint_store.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(checkpoint_store, "write_arrays", lambda *given: pytest.fail("it is tried"))
    with pytest.raises(StorageError, match=rf"No space left.* bytes needed, {usage.free} free"):
        save(store, 20)
    assert list(store.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="cannot write the checkpoint .*set checkpoint.dir to a"):
        save(CheckpointStore(blocked / "checkpoints"), 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(store):
    store.folder.mkdir()
    store.folder.chmod(0o500)
    with pytest.raises(StorageError, match="set checkpoint.dir to a folder that can be written"):
        save(store, 10)


def test_a_read_only_file_system(store, monkeypatch):
    def read_only(*given, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(StorageError, match="Read-only file system.*set checkpoint.dir to a folder"):
        save(store, 10)


def truncate(folder):
    (path,) = data_files(folder)[:1]
    path.write_bytes(path.read_bytes()[:-3])
    return path.name


def flip(folder):
    """One bit in the midst of the largest file: sizes stay."""
    path = max(data_files(folder), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{path.name}: its checksum is"


def lose_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json"


def flip_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    return "manifest.json: it does not have the checksum"


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    return "manifest.json: it is no manifest"


def later_format(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    return "its format has version 2, and this launcher reads 1"


def lose_file(folder):
    (path,) = data_files(folder)[:1]
    path.unlink()
    return f"{path.name}: No such file"


def change_plan(folder):
    path = folder / "plan.json"
    path.write_text(path.read_text().replace("1", "2"))
    return "plan.json: its checksum is"


DAMAGES = (
    truncate, flip, lose_manifest, flip_manifest, cut_manifest, later_format, lose_file, change_plan,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_left_for_the_one_before(store, caplog, damage):
    save(store, 10)
    damaged = save(store, 20)
    told = damage(damaged)
    assert_whole(store, 10)
    (record,) = caplog.records
    assert str(damaged) in record.getMessage()
    assert told in record.getMessage()
    save(store, 20)  # in place of the damaged one
    assert_whole(store, 20)


def test_none_is_intact(store):
    for step in (10, 20):
        lose_manifest(save(store, step))
    with pytest.raises(StorageError, match="none of the 2 checkpoints in .* is intact, the last of "
                       "step 20 .*: restore the folder from a copy, or start anew"):  # fmt: skip
        store.newest_intact()


def test_arrays_that_are_not_what_was_written(store, monkeypatch):
    """What the checks of the library do not see is seen by ours."""
    path = save(store, 10)
    read = checkpoint_store.read_arrays
    other = np.arange(7.0)
    monkeypatch.setattr(
        checkpoint_store, "read_arrays", lambda *given: read(*given) | {"params/double": other}
    )
    with pytest.raises(StorageError, match=r"params/double is float64\[7\] with checksum"):
        read_checkpoint(path)
    with pytest.raises(StorageError, match="params/double"):  # also before the old one may go
        save(store, 20, keep=1)
    assert store.steps() == [10]


def test_leftovers_are_removed_and_nothing_else(store):
    save(store, 10)
    for name in (".step-00000020.77.tmp", ".step-00000005.1.tmp", ".mine", "notes"):
        (store.folder / name).mkdir()
        (store.folder / name / "x").write_text("")
    (store.folder / ".best.json.77.tmp").write_text("")
    store.remove_leftovers()
    assert sorted(p.name for p in store.folder.iterdir()) == [".mine", "notes", "step-00000010"]
    shutil.rmtree(store.folder)


def test_a_folder_that_cannot_be_listed(store, monkeypatch):
    def refuses(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuses)
    with pytest.raises(StorageError, match="Permission denied.*give a folder that can be read"):
        store.steps()
