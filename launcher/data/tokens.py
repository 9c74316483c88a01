"""Token files: a 64-byte header and the ids, of which only what a batch needs is read.

    offset  size  field (little-endian)
         0     8  magic, the bytes LAUNCHTK
         8     4  version, 1
        12     4  bytes per id: 1, 2 or 4 (unsigned)
        16     8  number of ids
        24     8  vocabulary size: every id is below it
        32    28  zeros
        60     4  CRC-32 of the 60 bytes before
        64     -  the ids, and nothing after them

A file that is cut short, was damaged in its header, or is something else is refused when it is
opened. The ids have no checksum (it would mean reading a terabyte before the first step); one that
lies beyond the vocabulary is found at once among the first 67 million, else when a batch reads it.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.config import TokensDataConfig
from launcher.data.dataset import Dataset
from launcher.data.stored_ids import OpenFile, StoredIds
from launcher.data.tokenizer import id_dtype
from launcher.data.windows import TokenWindows, cut_windows, window_length
from launcher.errors import ConfigError, StorageError
from launcher.models.model import Model
from launcher.regular_file import open_regular

MAGIC = b"LAUNCHTK"
VERSION = 1
HEADER_BYTES = 64
LARGEST_VOCAB_SIZE = 2**32
# So many are looked at when the file is opened, in less than a second.
_CHECKED_IDS, _READ_IDS = 2**26, 2**22

_FIELDS = struct.Struct("<8sIIQQ28x")
_CHECKSUM = struct.Struct("<I")
_ID_BYTES = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """An open token file."""

    path: Path
    vocab_size: int
    ids: StoredIds


def build_tokens(config: TokensDataConfig, model: Model, seed: int) -> Dataset:
    """Open the token file and cut it into windows for the model."""
    length, dtypes = window_length("tokens", model)
    if config.path is None:
        raise ConfigError(
            "data=tokens reads a token file, and data.path=null: make one with "
            "`python -m launcher.data.convert INPUT... --out FILE` and give data.path=FILE"
        )
    file = open_tokens(Path(config.path).expanduser())
    if model.vocab_size is not None and file.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{file.path} was made for {file.vocab_size} tokens, and model.vocab_size="
            f"{model.vocab_size}: give model.vocab_size={file.vocab_size} or more, or convert the "
            f"text again"
        )
    source = f"data.path={file.path}"
    train, valid = cut_windows(file.ids, length, config.valid_fraction, source)
    windows = TokenWindows(
        name=f"{file.path}, {len(file.ids):,} tokens of {file.vocab_size}: {len(train):,} windows "
        f"of {length} to train on, {len(valid):,} held out",
        source=source,
        seed=seed,
        vocab_size=file.vocab_size,
        dtypes=dtypes,
        train=train,
        valid=valid,
    )
    checked = file.ids[:_CHECKED_IDS]
    for begin in range(0, len(checked), _READ_IDS):
        windows.check_ids(checked[begin : begin + _READ_IDS].read())
    return windows


def open_tokens(path: Path) -> TokenFile:
    """Check a token file's header against the file, and map its ids."""
    try:
        with open_regular(path) as stream:
            header, file = stream.read(HEADER_BYTES), OpenFile(stream)
    except OSError as error:
        raise ConfigError(
            f"cannot read the token file {path}: {error.strerror}: correct data.path"
        ) from error
    id_bytes, num_ids, vocab_size = _read_header(path, header)
    expected_bytes = HEADER_BYTES + num_ids * id_bytes
    if file.num_bytes != expected_bytes:
        raise ConfigError(
            f"the token file {path} has {file.num_bytes} bytes, and its header promises "
            f"{expected_bytes}: it was cut short or added to; copy or convert it again"
        )
    ids = StoredIds(
        path=path,
        file=file,
        dtype=np.dtype(f"<u{id_bytes}"),
        offset_bytes=HEADER_BYTES,
        count=num_ids,
    )
    return TokenFile(path=path, vocab_size=vocab_size, ids=ids)


def write_tokens(path: Path, chunks: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write a token file chunk by chunk, whole or not at all, and give its number of ids."""
    dtype = id_dtype(vocab_size).newbyteorder("<")
    partial = path.with_name(path.name + ".partial")
    num_ids = 0
    try:
        with partial.open("wb") as stream:
            stream.write(bytes(HEADER_BYTES))
            for chunk in chunks:
                stream.write(chunk.astype(dtype).tobytes())
                num_ids += len(chunk)
            stream.seek(0)
            stream.write(_header(dtype.itemsize, num_ids, vocab_size))
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write the token file {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return num_ids


def _header(id_bytes: int, num_ids: int, vocab_size: int) -> bytes:
    fields = _FIELDS.pack(MAGIC, VERSION, id_bytes, num_ids, vocab_size)
    return fields + _CHECKSUM.pack(zlib.crc32(fields))


def _read_header(path: Path, header: bytes) -> tuple[int, int, int]:
    """Give bytes per id, number of ids and vocabulary size, or say why this is no token file."""
    if header[: len(MAGIC)] != MAGIC:
        raise ConfigError(
            f"{path} is no token file: it begins with {header[: len(MAGIC)]!r} and not {MAGIC!r}: "
            f"make one with `python -m launcher.data.convert INPUT... --out FILE`, or take "
            f"data=text for text"
        )
    if len(header) < HEADER_BYTES:
        raise ConfigError(
            f"the token file {path} ends after {len(header)} bytes, inside its header of "
            f"{HEADER_BYTES}: copy or convert it again"
        )
    _, version, id_bytes, num_ids, vocab_size = _FIELDS.unpack_from(header)
    (checksum,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    if version != VERSION:
        raise ConfigError(
            f"the token file {path} has version {version}, and this launcher reads {VERSION}: "
            f"convert it again"
        )
    actual = zlib.crc32(header[: _FIELDS.size])
    if checksum != actual:
        raise ConfigError(
            f"the header of the token file {path} is damaged: its checksum is {actual:#010x} and "
            f"should be {checksum:#010x}: copy or convert it again"
        )
    if id_bytes not in _ID_BYTES or not 0 < vocab_size <= LARGEST_VOCAB_SIZE:
        raise ConfigError(
            f"the header of the token file {path} has {id_bytes} bytes per id and a vocabulary of "
            f"{vocab_size}, and there are 1, 2 or 4 bytes and 1 to {LARGEST_VOCAB_SIZE} tokens: convert "
            f"it again"
        )
    return id_bytes, num_ids, vocab_size
