"""A folder of checkpoints: each written whole or not at all, verified, and kept for as long as it is of use.

    checkpoints/
        step-00000050/      50 steps are done
            manifest.json   what it is, with a checksum of every array (`checkpoint_manifest`)
            plan.json       the plan that ran
            arrays/         parameters, optimizer state, ... by tree path (`checkpoint_arrays`)
        best.json           which one has the lowest evaluation loss, for people and scripts

One is written under a temporary name, brought to the disk, read back and compared with what was meant, and
only then renamed; only after that may others go. So whenever the process or the machine dies, the newest
checkpoint that has a name is whole. The newest `keep` stay, and the best by evaluation loss.
"""

import dataclasses
import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from functools import partial
from pathlib import Path

import jax
import numpy as np

from launcher.autopar.text.atomic_file import write_atomically
from launcher.errors import StorageError
from launcher.regular_file import open_regular, read_regular
from launcher.runtime.checkpoints.checkpoint_arrays import checksum, read_arrays, write_arrays
from launcher.runtime.checkpoints.checkpoint_manifest import (
    ARRAYS_NAME,
    ArrayEntry,
    FileEntry,
    Manifest,
    dtype_of,
    from_text,
    to_text,
)
from launcher.runtime.checkpoints.host_copies import to_host
from launcher.runtime.records.metrics import to_json

log = logging.getLogger(__name__)

MANIFEST_NAME, PLAN_NAME, BEST_NAME = "manifest.json", "plan.json", "best.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,}|best\.json)\.\d+\.tmp")
_KEY = "checkpoint.dir"
_LARGEST_MANIFEST_BYTES = 2**28  # of a million arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One that has been found to be whole; `arrays` are on the host until `release`."""

    path: Path
    manifest: Manifest
    arrays: dict[str, np.ndarray]

    def release(self) -> None:
        """Let go of the arrays, which are on the devices by now."""
        self.arrays.clear()


def entries_of(arrays: Mapping[str, np.ndarray]) -> dict[str, ArrayEntry]:
    """Describe arrays as they are meant to be written."""
    return {
        name: ArrayEntry(dtype=array.dtype.name, shape=array.shape, checksum=checksum(array))
        for name, array in sorted(arrays.items())
    }


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint says of itself; StorageError if it says nothing that can be trusted."""
    path = folder / MANIFEST_NAME
    try:
        data = read_regular(path, _LARGEST_MANIFEST_BYTES)
        if data is None:
            raise ValueError(f"it has more than {_LARGEST_MANIFEST_BYTES} bytes")
        return from_text(data.decode())
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except ValueError as error:  # also of a text that is no UTF-8
        raise _damaged(path, str(error)) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare every array with its checksum; StorageError names what is damaged."""
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    return Checkpoint(path=folder, manifest=manifest, arrays=read_whole(folder, manifest.arrays))


def read_whole(folder: Path, entries: Mapping[str, ArrayEntry]) -> dict[str, np.ndarray]:
    """Read arrays, whole or in pieces, from the folders that they are in."""
    stored: dict[str, np.ndarray] = {}
    for name, there in _by_folder(entries).items():
        stored |= read_verified(folder / name, there)
    return {name: _whole(folder, name, entry, stored) for name, entry in entries.items()}


def _by_folder(arrays: Mapping[str, ArrayEntry]) -> dict[str, dict[str, ArrayEntry]]:
    """What each folder has, whole arrays and pieces, under the names that they have there."""
    found: dict[str, dict[str, ArrayEntry]] = defaultdict(dict)
    for name, entry in arrays.items():
        if not entry.pieces:
            found[entry.folder][name] = entry
        for piece in entry.pieces:
            found[piece.folder][piece.stored_name(name)] = ArrayEntry(
                dtype=entry.dtype, shape=piece.shape, checksum=piece.checksum, folder=piece.folder
            )
    return found


def read_verified(place: Path, entries: Mapping[str, ArrayEntry]) -> dict[str, np.ndarray]:
    """Read the arrays of a folder, and compare each with its checksum."""
    shapes = {name: (dtype_of(entry), entry.shape) for name, entry in entries.items()}
    try:
        arrays = dict(read_arrays(place, shapes))
    except Exception as error:  # Orbax has no type of its own for what it cannot read
        raise _damaged(place, _first_line(error)) from error
    for name, entry in entries.items():
        array = arrays[name]
        found = ArrayEntry(
            dtype=array.dtype.name, shape=array.shape, checksum=checksum(array), folder=entry.folder
        )
        if found != entry:
            raise _damaged(place, f"{name} is {found} with checksum {found.checksum}, and {entry} "
                           f"with {entry.checksum} was written")  # fmt: skip
    return arrays


def _whole(folder: Path, name: str, entry: ArrayEntry, stored: dict[str, np.ndarray]) -> np.ndarray:
    """An array, of its pieces if it has some; these are let go."""
    if not entry.pieces:
        return stored[name]
    size = sum(math.prod(piece.shape) for piece in entry.pieces)
    if size != math.prod(entry.shape):
        raise _damaged(folder / MANIFEST_NAME, f"the pieces of {name} have {size} entries, and it "
                       f"has {math.prod(entry.shape)}")  # fmt: skip
    whole = np.empty(entry.shape, dtype_of(entry))
    for piece in entry.pieces:
        block = tuple(slice(b, b + n) for b, n in zip(piece.start, piece.shape, strict=True))
        whole[block] = stored.pop(piece.stored_name(name))
    return whole


def _check_files(folder: Path, manifest: Manifest) -> None:
    """That each file is as it was: the library below Orbax does not like what is damaged."""
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            found = file_entry(path)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if found.num_bytes != entry.num_bytes:
            raise _damaged(
                path, f"it has {found.num_bytes} bytes, and {entry.num_bytes} were written"
            )
        if found != entry:
            raise _damaged(path, f"its checksum is {found.checksum}, and was {entry.checksum}")


def file_entry(path: Path) -> FileEntry:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16))
        return FileEntry(num_bytes=file.tell(), checksum=digest.hexdigest())


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the checkpoint is damaged at {path}: {why}: give another one with resume=PATH"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of a run, or of another one."""

    folder: Path

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or damaged, the oldest first."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(
                f"cannot read {self.folder} ({error.strerror}); {_KEY}={self.folder}: "
                f"give a folder that can be read"
            ) from error
        return sorted(int(found[1]) for found in map(_NAME.fullmatch, names) if found)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def newest_intact(self) -> Checkpoint | None:
        """The newest one that is whole, None of an empty folder; a warning for each that is not."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read_checkpoint(self.path(step))
            except StorageError as error:
                log.warning("%s: going back to the checkpoint before it", error)
        if steps:
            raise StorageError(
                f"none of the {len(steps)} checkpoints in {self.folder} is intact, the last of step "
                f"{steps[-1]} (the log says why): restore the folder from a copy, or start anew with "
                f"another hydra.run.dir"
            )
        return None

    def check_writable(self) -> None:
        """Make the folder, and raise StorageError now if nothing can be written there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise StorageError(
                f"no checkpoint can be written in {self.folder}: {error.strerror or error} "
                f"(checkpoint.dir): give a folder that can be written to"
            ) from error

    def remove_leftovers(self) -> None:
        """Remove what saves that were killed have left."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                log.info("removing %s, which a save that was killed has left", path)
                _remove(path)

    def take(self, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Copy whole arrays to the host; returns when the devices are free to overwrite them."""
        return to_host(arrays)

    def abandon(self) -> None:
        """There is nobody to wait for."""

    def save(self, manifest: Manifest, arrays: Mapping[str, np.ndarray], *, keep: int) -> Path:
        """Write and verify a checkpoint, then remove those that are not to be kept."""
        final = self.path(manifest.step)
        temporary = self._temporary(final)
        num_bytes = sum(array.nbytes for array in arrays.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _check_room(temporary, num_bytes)
            _write_into(temporary, manifest, arrays)
            self.commit(temporary, final, keep=keep)
        except OSError as error:
            raise cannot_write(final, error, num_bytes) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def commit(self, temporary: Path, final: Path, *, keep: int) -> None:
        """Give a checkpoint that is whole and on the disk its name; then others may go."""
        if final.exists():  # damaged, or of a past that the run has gone back from
            shutil.rmtree(final)
        temporary.rename(final)
        sync(self.folder)
        self._remove_old(keep)

    def best(self) -> tuple[int, float] | None:
        """The step with the lowest evaluation loss and that loss; the first of equal ones."""
        found = []
        for step in self.steps():
            try:
                loss = read_manifest(self.path(step)).eval_loss
            except StorageError:
                continue
            if loss is not None and math.isfinite(loss):
                found.append((loss, step))
        return (min(found)[1], min(found)[0]) if found else None

    def _remove_old(self, keep: int) -> None:
        best = self.best()
        kept = {*self.steps()[-keep:], *(best or ())[:1]}
        if best is not None:
            step, loss = best
            row = {"best": self.path(step).name, "step": step, "eval_loss": loss}
            write_atomically(self.folder / BEST_NAME, to_json(row, indent=2) + "\n")
        for step in self.steps():
            if step in kept:
                continue
            # Under its own name it would look whole while it is being removed.
            path = self.path(step)
            doomed = path.rename(self._temporary(path))
            shutil.rmtree(doomed)

    def _temporary(self, path: Path) -> Path:
        return self.folder / f".{path.name}.{os.getpid()}.tmp"


def _check_room(folder: Path, num_bytes: int) -> None:
    """Raise OSError before anything is written: the library below Orbax litters stderr on a full disk."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(ENOSPC, os.strerror(ENOSPC))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_into(folder: Path, manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Write all files, bring them to the disk, and read them back."""
    _store_arrays(folder / ARRAYS_NAME, arrays)
    described = dataclasses.replace(
        manifest, arrays=entries_of(arrays), files=files_in(folder, folder / ARRAYS_NAME)
    )
    write_manifest(folder, described)
    read_checkpoint(folder)


def _store_arrays(place: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a folder that is not there yet, and bring them to the disk."""
    try:
        write_arrays(place, arrays)
    except OSError:
        raise
    except Exception as error:  # of the library below Orbax, which has no type for a full disk
        why = _first_line(error)
        code = ENOSPC if "RESOURCE_EXHAUSTED" in why else EIO
        raise OSError(code, why) from error
    sync_all(place)


def sync_all(place: Path) -> None:
    """Bring all that is below a place to the disk."""
    for path in [*sorted(place.rglob("*")), place]:
        sync(path)


def files_in(folder: Path, place: Path) -> dict[str, FileEntry]:
    """The files below a place, by their path in a checkpoint's folder."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write what a checkpoint says of itself beside its arrays, bring it to the disk, and read it back."""
    plan = folder / PLAN_NAME
    plan.write_text(manifest.run.plan)
    files = {**manifest.files, PLAN_NAME: file_entry(plan)}
    meant = to_text(dataclasses.replace(manifest, files=files))
    (folder / MANIFEST_NAME).write_text(meant)
    for path in (plan, folder / MANIFEST_NAME, folder):
        sync(path)
    if (folder / MANIFEST_NAME).read_text() != meant:
        raise _damaged(folder / MANIFEST_NAME, "it is not what was written")


def sync(path: Path) -> None:
    """Bring a file, or the list of a folder's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError, num_bytes: int) -> StorageError:
    why = error.strerror or str(error)
    cure = f"set {_KEY} to a folder that can be written"
    if error.errno in (ENOSPC, EDQUOT, EFBIG):
        why += f"; {num_bytes} bytes needed, {shutil.disk_usage(path.parent).free} free"
        cure = f"free some space there, set {_KEY} to a folder on another disk, or lower checkpoint.keep"
    return StorageError(f"cannot write the checkpoint {path} ({why}); {_KEY}={path.parent}: {cure}")
