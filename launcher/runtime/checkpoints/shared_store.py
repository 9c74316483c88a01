"""A checkpoint that several hosts write together, and that is whole or not there.

Every host writes what it has into a folder of its own, verifies it, and then says so in a file. The first
host waits for the files of all, writes the manifest, and gives the checkpoint its name. So every byte is
written once, by who has it, and nothing goes between the hosts but through the file system that they share.
No host holds more of the model than its devices. An array that lies on several hosts is in pieces; it is read
like any other.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from launcher.autopar.text.atomic_file import storage_error, write_atomically
from launcher.errors import StorageError
from launcher.runtime.checkpoints.checkpoint_arrays import checksum, write_own_arrays
from launcher.runtime.checkpoints.checkpoint_manifest import (
    ArrayEntry,
    FileEntry,
    Manifest,
    PieceEntry,
    array_entry,
    host_folder,
)
from launcher.runtime.checkpoints.checkpoint_store import (
    Checkpoint,
    CheckpointStore,
    cannot_write,
    entries_of,
    files_in,
    read_verified,
    read_whole,
    sync,
    sync_all,
    write_manifest,
)
from launcher.runtime.checkpoints.host_copies import Piece, own_pieces

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.02
_PATIENCE_S = 1800.0  # for hosts that write more, or to slower disks


@dataclass(frozen=True, slots=True, kw_only=True)
class Writers:
    """Who writes: this host, of so many; `token` is the same on all, and in no other start of the run."""

    host: int
    num_hosts: int
    token: str


class SharedStore:
    """One host's side of a `CheckpointStore` that all share."""

    def __init__(self, store: CheckpointStore, writers: Writers, patience_s: float = _PATIENCE_S):
        self._store, self._writers, self._patience_s = store, writers, patience_s
        self._is_abandoned = threading.Event()

    def best(self) -> tuple[int, float] | None:
        return self._store.best()

    def newest_intact(self) -> Checkpoint | None:
        return self._store.newest_intact()

    def take(self, arrays: Mapping[str, jax.Array]) -> list[Piece]:
        """Copy what this process has to the host; returns when the devices may overwrite it."""
        return own_pieces(arrays)

    def abandon(self) -> None:
        """Wait for no other host any more."""
        self._is_abandoned.set()

    def save(self, manifest: Manifest, pieces: Sequence[Piece], *, keep: int) -> Path:
        """Write this host's part; returns when the checkpoint is whole and has its name."""
        final = self._store.path(manifest.step)
        temporary = final.with_name(f".{final.name}.{self._writers.token}.tmp")
        num_bytes = sum(piece.data.nbytes for piece in pieces)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self._write_part(temporary, pieces)
            if self._writers.host == 0:
                self._commit(manifest, temporary, final, keep)
            else:
                self._wait(lambda: not temporary.exists(), "host 0", "given it its name")
        except OSError as error:
            raise cannot_write(final, error, num_bytes) from error
        if not final.exists():
            raise StorageError(
                f"the checkpoint {final} has not been finished by host 0 (checkpoint.dir="
                f"{self._store.folder}): look at the log of that host"
            )
        return final

    def gather(self, folder: Path, pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
        """Bring all arrays to the first host, through a folder that is gone afterwards; {} on others."""
        temporary = folder / f".arrays.{self._writers.token}.tmp"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self._write_part(temporary, pieces)
            if self._writers.host == 0:
                entries, _ = _merged(self._all_parts(temporary))
                return read_whole(temporary, entries)
        except OSError as error:
            num_bytes = sum(piece.data.nbytes for piece in pieces)
            raise storage_error(temporary, error, needed_bytes=num_bytes) from error
        finally:
            if self._writers.host == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        return {}

    def _write_part(self, temporary: Path, pieces: Sequence[Piece]) -> None:
        place = temporary / host_folder(self._writers.host)
        stored = {_stored_name(piece): piece.data for piece in pieces}
        if stored:
            write_own_arrays(place, stored)
            sync_all(place)
            entries = {
                name: dataclasses.replace(entry, folder=place.name)
                for name, entry in entries_of(stored).items()
            }
            read_verified(place, entries)
        part = {
            "arrays": [_described(piece, place.name) for piece in pieces],
            "files": {n: dataclasses.asdict(e) for n, e in files_in(temporary, place).items()},
        }
        write_atomically(_part_file(temporary, self._writers.host), json.dumps(part))
        sync(temporary)

    def _commit(self, manifest: Manifest, temporary: Path, final: Path, keep: int) -> None:
        try:
            arrays, files = _merged(self._all_parts(temporary))
            write_manifest(temporary, dataclasses.replace(manifest, arrays=arrays, files=files))
            self._store.commit(temporary, final, keep=keep)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _all_parts(self, temporary: Path) -> list[dict]:
        """What all hosts have written, when they have; their files are not needed any more."""
        parts = []
        for host in range(self._writers.num_hosts):
            path = _part_file(temporary, host)
            self._wait(path.exists, f"host {host}", "written its part")
            parts.append(json.loads(path.read_text()))
            path.unlink()
        return parts

    def _wait(self, happened, who: str, what: str) -> None:
        until_s = time.monotonic() + self._patience_s
        while not happened():
            if self._is_abandoned.is_set() or time.monotonic() > until_s:
                waited = "" if self._is_abandoned.is_set() else f" in {self._patience_s:.0f} s"
                raise StorageError(
                    f"{who} has not {what}{waited}, of a checkpoint in {self._store.folder} "
                    f"(checkpoint.dir): it must be a folder that all hosts share; look at that host's log"
                )
            time.sleep(_LOOK_EVERY_S)


def _part_file(temporary: Path, host: int) -> Path:
    return temporary / f"part-{host:04d}.json"


def _stored_name(piece: Piece) -> str:
    if piece.start is None:
        return piece.name
    return _piece_entry(piece, "").stored_name(piece.name)


def _piece_entry(piece: Piece, folder: str) -> PieceEntry:
    return PieceEntry(
        folder=folder, start=piece.start, shape=piece.data.shape, checksum=checksum(piece.data)
    )


def _described(piece: Piece, folder: str) -> dict:
    """An array's entry, as far as this host knows it."""
    pieces = () if piece.start is None else (_piece_entry(piece, folder),)
    entry = ArrayEntry(
        dtype=np.dtype(piece.data.dtype).name, shape=piece.whole_shape,
        checksum=checksum(piece.data), folder=folder, pieces=pieces,
    )  # fmt: skip
    return {"name": piece.name, "entry": dataclasses.asdict(entry)}


def _merged(
    parts: Sequence[Mapping],
) -> tuple[dict[str, ArrayEntry], dict[str, FileEntry]]:
    """Arrays and files of all hosts; of what several have whole, the first one's counts."""
    arrays: dict[str, ArrayEntry] = {}
    for described in (item for part in parts for item in part["arrays"]):
        name, entry = described["name"], array_entry(described["entry"])
        if name not in arrays:
            arrays[name] = entry
        elif entry.pieces:
            arrays[name] = dataclasses.replace(
                arrays[name], pieces=(*arrays[name].pieces, *entry.pieces)
            )
    files = {n: FileEntry(**entry) for part in parts for n, entry in part["files"].items()}
    return {name: _sealed(entry) for name, entry in sorted(arrays.items())}, files


def _sealed(entry: ArrayEntry) -> ArrayEntry:
    """An array in pieces has the checksum of theirs, in their order."""
    if not entry.pieces:
        return entry
    pieces = tuple(sorted(entry.pieces, key=lambda piece: piece.start))
    text = " ".join(piece.checksum for piece in pieces)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return dataclasses.replace(entry, pieces=pieces, checksum=digest)
