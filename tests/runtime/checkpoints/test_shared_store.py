"""Checkpoints that hosts write together: whole when all have written, and read like any other."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.errors import StorageError
from launcher.runtime.checkpoints.checkpoint_manifest import (
    Manifest,
    ModelEntry,
    Progress,
    RunEntry,
)
from launcher.runtime.checkpoints.checkpoint_store import CheckpointStore
from launcher.runtime.checkpoints.host_copies import Piece, own_pieces
from launcher.runtime.checkpoints.shared_store import SharedStore, Writers

RUN = RunEntry(
    model=ModelEntry(name="gpt", size="tiny", dtype="fp32", fingerprint="f", overrides={}),
    seed=3, dataset="", global_batch=8, origin=None, config={}, plan="{}",
)  # fmt: skip
SPLIT = np.arange(12.0).reshape(4, 3)
COUNT = np.asarray(5, np.int32)
WHOLE = {"params/a": np.arange(3, dtype=np.float32), "optimizer/0/count": COUNT}
PARTS = (
    [
        Piece("params/split", (0, 0), (4, 3), SPLIT[:2]),
        Piece("optimizer/0/count", None, (), COUNT),
    ],
    [
        Piece("params/split", (2, 0), (4, 3), SPLIT[2:]),
        Piece("params/a", None, (3,), WHOLE["params/a"]),
        Piece("optimizer/0/count", None, (), np.asarray(6, np.int32)),
    ],
    [],
)


def manifest(step: int) -> Manifest:
    return Manifest(
        step=step, samples=8 * step, eval_loss=None, progress=Progress(), run=RUN, arrays={}
    )


def stores(folder, patience_s=30.0) -> list[SharedStore]:
    return [
        SharedStore(
            CheckpointStore(folder), Writers(host=host, num_hosts=3, token="17"), patience_s
        )
        for host in range(3)
    ]


def at_once(*calls) -> list:
    """What each call gives or raises, each in a thread of its own."""
    found = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def save(hosts, step: int, keep: int = 2) -> list:
    calls = [
        lambda host=host, own=own: host.save(manifest(step), own, keep=keep)
        for host, own in zip(hosts, PARTS, strict=False)
    ]
    return at_once(*calls)


def test_a_checkpoint_of_all_hosts_is_read_like_any_other(tmp_path):
    hosts = stores(tmp_path)
    for step in (1, 2, 3):
        assert save(hosts, step) == [tmp_path / f"step-{step:08d}"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = hosts[1].newest_intact()
    assert found.manifest.step == 3
    assert found.arrays.keys() == {"params/split", *WHOLE}
    for name, wanted in {"params/split": SPLIT, **WHOLE}.items():
        assert found.arrays[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found.arrays[name], wanted)


def test_without_a_part_there_is_no_checkpoint(tmp_path):
    ends = save([stores(tmp_path, patience_s=0.3)[0], stores(tmp_path)[1]], 1)
    assert "host 2 has not written its part" in str(ends[0])
    assert "has not been finished by host 0" in str(ends[1])
    assert list(tmp_path.iterdir()) == []


def test_who_ends_waits_for_nobody(tmp_path):
    first, *_ = stores(tmp_path)
    first.abandon()
    with pytest.raises(StorageError, match="host 1 has not written its part, of a checkpoint in"):
        first.save(manifest(1), PARTS[0], keep=1)


@pytest.mark.parametrize("spoil", ["flip", "cut", "missing"])
def test_a_damaged_part_is_noticed(tmp_path, spoil):
    hosts = stores(tmp_path)
    save(hosts, 1)
    save(hosts, 2)
    path = tmp_path / "step-00000002" / "arrays-0001" / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    if spoil == "missing":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data if spoil == "flip" else data[:-1])
    assert hosts[0].newest_intact().manifest.step == 1


def test_arrays_of_all_hosts_come_to_the_first(tmp_path):
    calls = [
        lambda host=host, own=own: host.gather(tmp_path, own)
        for host, own in zip(stores(tmp_path), PARTS, strict=True)
    ]
    first, *others = at_once(*calls)
    assert others == [{}, {}]
    np.testing.assert_array_equal(first["params/split"], SPLIT)
    np.testing.assert_array_equal(first["params/a"], WHOLE["params/a"])
    assert list(tmp_path.iterdir()) == []


def test_an_array_of_this_process_alone_is_one_piece():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    array = jax.device_put(SPLIT, NamedSharding(mesh, PartitionSpec("x")))
    [piece] = own_pieces({"a": array})
    assert (piece.name, piece.start) == ("a", None)
    np.testing.assert_array_equal(piece.data, SPLIT)
