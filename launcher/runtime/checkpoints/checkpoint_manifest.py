"""What a checkpoint says of itself: `manifest.json`, with a checksum of every array, and of itself.

Reading is strict: a manifest of which one byte has changed is none.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

FORMAT_VERSION = 1
ARRAYS_NAME = "arrays"
_FOLDER = re.compile(rf"{ARRAYS_NAME}(-\d{{4,}})?")


def host_folder(host: int) -> str:
    """Where a host has its arrays, of those that write one checkpoint together."""
    return f"{ARRAYS_NAME}-{host:04d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceEntry:
    """A block of an array of which several hosts have written parts; `start` is its first index."""

    folder: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str

    def stored_name(self, array: str) -> str:
        """Its name among the arrays of its folder."""
        return f"{array}@{','.join(map(str, self.start))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayEntry:
    """One array as it was meant to be written.

    Attributes:
        folder: where it is whole.
        pieces: of one that is not; its checksum is that of theirs.
    """

    dtype: str
    shape: tuple[int, ...]
    checksum: str
    folder: str = ARRAYS_NAME
    pieces: tuple[PieceEntry, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file as it was when its arrays had been read back from it."""

    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """Whose arrays they are."""

    name: str
    size: str
    dtype: str
    fingerprint: str
    overrides: Mapping[str, Any]  # model.* key -> value, of the size


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the record of a run has gathered so far; rows and the summary go on from it."""

    loss: float | None = None
    best_loss: float | None = None
    eval_loss: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    step_s: float = 0.0  # of all steps so far
    left_out: tuple[int, ...] = ()  # batches that no step reads, since they made numbers not finite


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """What stays the same in all checkpoints of a run.

    Attributes:
        seed: with the step it is the state of everything that is drawn.
        global_batch: with the step it is the position in the data.
        origin: the checkpoint that the run was told to begin from.
        config: the composed config.
        plan: the text of plan.json.
    """

    model: ModelEntry
    seed: int
    dataset: str
    global_batch: int
    origin: str | None
    config: Mapping[str, Any]
    plan: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of it.

    Attributes:
        step: how many steps are done.
        samples: how many samples they have read: where the data goes on.
        eval_loss: of the evaluation after this step; None where there was none.
        files: all others, by their path in the checkpoint's folder.
    """

    version: int = FORMAT_VERSION
    step: int
    samples: int
    eval_loss: float | None
    progress: Progress
    run: RunEntry
    arrays: Mapping[str, ArrayEntry]
    files: Mapping[str, FileEntry] = field(default_factory=dict)


def to_text(manifest: Manifest) -> str:
    """Write a manifest as JSON."""
    # Once to JSON and back: a config may hold what JSON writes otherwise, such as dates.
    body = json.loads(json.dumps(dataclasses.asdict(manifest), default=str))
    return json.dumps({"checksum": _checksum(body), "manifest": body}, indent=1) + "\n"


def from_text(text: str) -> Manifest:
    """Read a manifest; ValueError says in what way it is none."""
    try:
        top = json.loads(text)
        body, checksum = top["manifest"], top["checksum"]
        version = body["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no manifest ({error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"its format has version {version}, and this launcher reads {FORMAT_VERSION}"
        )
    if checksum != _checksum(body):
        raise ValueError(f"it does not have the checksum {checksum} that it names")
    try:
        manifest = _manifest(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no manifest ({error})") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for what no launcher has written, whatever its checksum says."""
    progress = manifest.progress
    pieces = [piece for entry in manifest.arrays.values() for piece in entry.pieces]
    numbers = (progress.loss, progress.best_loss, progress.eval_loss, manifest.eval_loss)
    counts = (
        manifest.step, manifest.samples, progress.skipped_steps, progress.skipped_in_a_row,
        *progress.left_out, *(length for entry in manifest.arrays.values() for length in entry.shape),
        *(entry.num_bytes for entry in manifest.files.values()),
        *(count for piece in pieces for count in (*piece.start, *piece.shape)),
    )  # fmt: skip
    folders = [entry.folder for entry in (*manifest.arrays.values(), *pieces)]
    texts = (manifest.run.plan, manifest.run.dataset, *(e.dtype for e in manifest.arrays.values()))
    checks = {
        "a number": all(v is None or type(v) in (int, float) for v in (*numbers, progress.step_s)),
        "a count": all(type(count) is int and count >= 0 for count in counts),
        "a text": all(isinstance(text, str) for text in texts),
        "a folder of arrays": all(isinstance(f, str) and _FOLDER.fullmatch(f) for f in folders),
        "a path inside it": all(map(_is_inside, (*manifest.files, *manifest.arrays))),
    }
    wrong = [what for what, holds in checks.items() if not holds]
    if wrong:
        raise ValueError(f"it is no manifest (it has something else in place of {wrong[0]})")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts


def _manifest(body: dict[str, Any]) -> Manifest:
    run = body["run"]
    arrays = {name: array_entry(entry) for name, entry in body["arrays"].items()}
    files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
    run_entry = RunEntry(**run | {"model": ModelEntry(**run["model"])})
    progress = Progress(**body["progress"] | {"left_out": tuple(body["progress"]["left_out"])})
    return Manifest(
        **body | {"run": run_entry, "progress": progress, "arrays": arrays, "files": files}
    )


def array_entry(body: dict[str, Any]) -> ArrayEntry:
    """An entry that JSON has made lists of."""
    pieces = tuple(
        PieceEntry(**piece | {key: tuple(piece[key]) for key in ("start", "shape")})
        for piece in body.get("pieces", ())
    )
    return ArrayEntry(**body | {"shape": tuple(body["shape"]), "pieces": pieces})


def dtype_of(entry: ArrayEntry) -> np.dtype:
    """The dtype that an entry names, which may be one of JAX's own, such as bfloat16."""
    return np.dtype(jnp.dtype(entry.dtype))


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
