"""Parameters and state as a safetensors file: written tensor by tensor, checked and read the same way.

    offset  size      content
         0     8      n, the length of the header, little-endian
         8     n      JSON: name -> dtype, shape, [begin, end) in the data; "__metadata__" -> texts
     8 + n     -      the data: each tensor's bytes, little-endian, the last dim fastest

(https://github.com/huggingface/safetensors, "Format".) A tensor's name is its path in the model's tree. No
device and no host ever has to hold more of the model than it does anyway, plus one tensor.
"""

import contextlib
import json
import logging
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from launcher.autopar.graphs.trace import Input, Role
from launcher.autopar.plans.plan import Plan
from launcher.autopar.text.atomic_file import storage_error
from launcher.errors import ConfigError
from launcher.models.model import Model
from launcher.models.origin import Origin, origin_of, overrides_of, overrides_text
from launcher.regular_file import open_regular

log = logging.getLogger(__name__)

METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
# What the format allows; anything longer is no header.
_LONGEST_HEADER_BYTES = 100_000_000
_STEP_DIGITS = 16
_MOST_DIMS, _LARGEST = 32, 2**63 - 1
# Loaders map the file, and want aligned data.
_ALIGNMENT = 8

_NAMES = {
    "F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16,
    "I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8,
    "U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8, "BOOL": jnp.bool_,
}  # fmt: skip
DTYPES: Mapping[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in _NAMES.items()}
CODES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class Held(Protocol):
    """A stage that holds a part of the model on its devices."""

    params: Mapping[str, jax.Array]
    state: Mapping[str, jax.Array]


def held_arrays(owner: Mapping[str, int], stages: Mapping[int, Held]) -> dict[str, jax.Array]:
    """All parameters of these stages, each from the one that owns it, and all state, where they lie."""
    found: dict[str, jax.Array] = {}
    for index, stage in stages.items():
        found |= {path: array for path, array in stage.params.items() if owner[path] == index}
        found |= stage.state
    return found


def write_weights(
    path: Path, arrays: Mapping[str, jax.Array | np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays, whole or not at all; each is gathered to the host by itself."""
    header = _header(arrays, metadata)
    num_bytes = len(header) + sum(array.nbytes for array in arrays.values())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for name in sorted(arrays):
                file.write(_little_endian_bytes(arrays[name]))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error, needed_bytes=num_bytes) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _header(arrays: Mapping[str, jax.Array | np.ndarray], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {METADATA: dict(metadata)}
    begin = 0
    for name in sorted(arrays):
        array = arrays[name]
        end = begin + array.nbytes
        code = CODES[np.dtype(array.dtype)]
        entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _little_endian_bytes(array: jax.Array | np.ndarray) -> bytes:
    if isinstance(array, np.ndarray):
        return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
    # Through an array of its own: the one that the model holds would keep its host copy.
    parts = [shard.data for shard in array.addressable_shards]
    alone = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    host = np.asarray(alone)
    return host.astype(host.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `begin` and `end` count from the begin of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file that has been found to be whole; its tensors are read when they are asked for."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_begin: int

    @property
    def step(self) -> int:
        """After how many steps the weights were written; 0 where the file does not say."""
        step = self.metadata.get("step", "")
        return int(step) if step.isdecimal() and len(step) < _STEP_DIGITS else 0

    def values(self, model: Model) -> Iterator[tuple[Input, np.ndarray]]:
        """Yield every parameter and state variable of a model that the file was checked for."""
        with self.path.open("rb") as file:
            for path in model.abstract_params:
                yield Input(Role.PARAM, path), self.read(file, path)
            for path in model.abstract_state:
                yield Input(Role.STATE, path), self.read(file, path)

    def read(self, file: BinaryIO, name: str) -> np.ndarray:
        """One tensor, from the file that is open."""
        entry = self.entries[name]
        file.seek(self.data_begin + entry.begin)
        data = file.read(entry.end - entry.begin)
        little = np.frombuffer(data, entry.dtype.newbyteorder("<"))
        return little.astype(entry.dtype, copy=False).reshape(entry.shape)


def open_weights(path: Path, model: Model) -> WeightsFile:
    """Check that a file is whole and has exactly the tensors of a model."""
    try:
        with open_regular(path) as file:
            found = _read_header(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ConfigError(
            f"cannot read model.weights={path}: {error.strerror}: give a safetensors file, such as "
            f"weights.safetensors of a run with train.export_weights=true"
        ) from error
    _check_tensors(found, model)
    made_by = found.metadata.get("fingerprint", model.fingerprint)
    if made_by != model.fingerprint:
        there = _origin(found)
        log.warning(
            "model.weights=%s was written by a model of other sizes%s, though its tensors have the same "
            "shapes (fingerprint %s, and here %s): heads, dropout or a model's arguments may differ",
            path, f" ({there})" if there else "", made_by, model.fingerprint,
        )  # fmt: skip
    return found


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file."""
    with open_regular(path) as file:
        found = _read_header(path, file, os.fstat(file.fileno()).st_size)
        return {name: found.read(file, name) for name in found.entries}


def _read_header(path: Path, file: BinaryIO, file_bytes: int) -> WeightsFile:
    start = file.read(_LENGTH.size)
    length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else math.inf
    if length > min(_LONGEST_HEADER_BYTES, file_bytes - _LENGTH.size):
        raise _no_file(path, f"its {file_bytes} bytes do not hold the header that it begins with")
    try:
        header = _object(json.loads(file.read(length)))
        metadata = {name: str(text) for name, text in _object(header.pop(METADATA, {})).items()}
        entries = {name: _entry(fields) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = (
            f"it lacks or cannot have {error}" if isinstance(error, KeyError) else str(error)[:200]
        )
        raise _no_file(path, f"its header cannot be understood ({reason})") from error
    data_begin = _LENGTH.size + length
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.begin != end or entry.end - entry.begin != size:
            raise _no_file(path, f"its tensors do not lie one after the other ({entry})")
        end = entry.end
    if data_begin + end != file_bytes:
        raise _no_file(path, f"it has {file_bytes} bytes, and its header {data_begin + end}")
    return WeightsFile(path, entries, metadata, data_begin)


def _object(value: object) -> dict:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} stands where an object should")
    return value


def _entry(fields: object) -> Entry:
    known = _object(fields)
    begin, end = _naturals(known["data_offsets"])
    return Entry(DTYPES[known["dtype"]], tuple(_naturals(known["shape"])), begin, end)


def _naturals(values: object) -> list[int]:
    """Whole numbers that can be sizes and places; a product of such is an exact integer."""
    if not isinstance(values, list) or len(values) > _MOST_DIMS:
        raise TypeError(
            f"a {type(values).__name__} stands where at most {_MOST_DIMS} numbers should"
        )
    for value in values:
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise ValueError(f"{str(value)[:20]} is no size and no place in the file")
    return values


def _no_file(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"model.weights={path} is no whole safetensors file: {why}: copy or export it again"
    )


def _check_tensors(file: WeightsFile, model: Model) -> None:
    wanted = {
        name: Entry(np.dtype(shape.dtype), shape.shape, 0, 0)
        for name, shape in {**model.abstract_params, **model.abstract_state}.items()
    }
    lacking = sorted(wanted.keys() - file.entries.keys())
    spare = sorted(file.entries.keys() - wanted.keys())
    if lacking or spare:
        parts = [
            f"{what} {len(names)}, such as {names[0]}"
            for what, names in (("lacks", lacking), ("has besides", spare))
            if names
        ]
        raise ConfigError(
            f"model.weights={file.path} {' and '.join(parts)}, of the {len(wanted)} tensors of "
            f"{origin_of(model)}: {_give(file, model)}"
        )
    for name, want in wanted.items():
        _check_tensor(file, name, want, model)


def _check_tensor(file: WeightsFile, name: str, want: Entry, model: Model) -> None:
    have = file.entries[name]
    if have.shape != want.shape:
        cure = _give(file, model)
    elif have.dtype != want.dtype:
        cure = "take the model.dtype that it was written with (fp64 keeps float64, others float32)"
    else:
        return
    raise ConfigError(
        f"model.weights={file.path} has {name} as {have}, and in {origin_of(model)} it is {want}: {cure}"
    )


def _give(file: WeightsFile, model: Model) -> str:
    there = _origin(file)
    if there is None:
        return "give the model that it was written by"
    says_all = "overrides" in file.metadata
    keys = there.keys_instead_of(model) if says_all else there
    return f"give the model that it was written by ({keys})"


def _origin(file: WeightsFile) -> Origin | None:
    """Who a file says that it was written by, if it does."""
    said = file.metadata
    if not {"model", "size"} <= said.keys():
        return None
    overrides = overrides_of(said.get("overrides", ""))
    return Origin(
        name=said["model"], size=said["size"], dtype=said.get("dtype"), overrides=overrides
    )


def describe(model: Model, plan: Plan, step: int) -> dict[str, str]:
    """What a file says of the weights in it: whose they are, after how many steps, by which plan."""
    stages = [
        f"layers {stage.layers[0]}-{stage.layers[1]} on "
        + " x ".join(f"{name}={length}" for name, length in stage.mesh)
        for stage in plan.stages
    ]
    return {
        "format": "flax",
        "model": model.name,
        "size": model.size,
        "dtype": model.dtype,
        "overrides": overrides_text(model),
        "fingerprint": model.fingerprint,
        "step": str(step),
        "plan": f"{plan.schedule}, {plan.num_microbatches} microbatches: {'; '.join(stages)}",
    }
