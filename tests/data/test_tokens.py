"""Token files: what is written reads back, and no damaged file is read as if it were whole."""

import errno
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from launcher import data
from launcher.config import TokensDataConfig
from launcher.data import tokens
from launcher.data.tokens import HEADER_BYTES, open_tokens, write_tokens
from launcher.data.windows import cut_windows
from launcher.errors import ConfigError, StorageError

VOCAB_SIZES = (1, 255, 256, 257, 65536, 65537, 2**31)

# `tmp_path` is shared by the examples of a test; each writes its file anew.
_property = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _header(**changed: object) -> bytes:
    """A header with the right checksum, written by the documented layout and not by our code."""
    values = {"magic": b"LAUNCHTK", "version": 1, "id_bytes": 1, "count": 0, "vocab": 256}
    values.update(changed)
    fields = struct.pack("<8sIIQQ", *values.values()) + bytes(28)
    return fields + struct.pack("<I", zlib.crc32(fields))


@_property
@given(vocab_size=st.sampled_from(VOCAB_SIZES), draw=st.data())
def test_ids_read_back(vocab_size: int, draw: st.DataObject, tmp_path: Path) -> None:
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=20)
    chunks = draw.draw(st.lists(ids, max_size=4))
    path = tmp_path / "ids.tokens"
    count = write_tokens(path, (np.asarray(chunk, np.int64) for chunk in chunks), vocab_size)
    file = open_tokens(path)
    assert file.vocab_size == vocab_size
    assert file.ids.read().tolist() == [value for chunk in chunks for value in chunk]
    assert count == len(file.ids)


@_property
@given(num_ids=st.integers(22, 200), length=st.integers(1, 10), cut=st.floats(0.01, 0.9))
def test_windows_of_a_file_are_those_of_an_array(num_ids, length, cut, tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(num_ids),), 300)
    stored = cut_windows(open_tokens(path).ids, length, cut, "file")
    for ours, known in zip(
        stored, cut_windows(np.arange(num_ids), length, cut, "array"), strict=True
    ):
        assert len(ours) == len(known)
        np.testing.assert_array_equal(ours[np.arange(len(known))], known)


def test_a_file_that_is_cut_short_under_a_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(100),), 300)
    train, _ = cut_windows(open_tokens(path).ids, 10, 0.2, "file")
    os.truncate(path, 64 + 2 * 35)
    assert train[np.array([2])].tolist() == [list(range(20, 31))]
    with pytest.raises(
        StorageError,
        match=r"ids\.tokens was cut short while it was read: it has 134 bytes, and ids are wanted at byte "
        r"134 \(data\.path=.*goes on from its last checkpoint",
    ):
        train[np.array([2, 3])]


def test_a_file_that_cannot_be_read_any_more_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(100),), 300)
    ids = open_tokens(path).ids

    def preadv(*_: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(
        StorageError, match=r"ids\.tokens at byte 64, Stale file handle \(data\.path="
    ):
        ids.read()


@_property
@given(num_ids=st.integers(0, 50), keep=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(num_ids: int, keep: float, tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(num_ids),), 300)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ConfigError, match=r"ids\.tokens"):
        open_tokens(path)


@_property
@given(extra=st.binary(min_size=1, max_size=9))
def test_a_file_with_more_behind_it_is_refused(extra: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(10),), 300)
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(ConfigError, match=rf"has {84 + len(extra)} bytes, .* promises 84: "):
        open_tokens(path)


@_property
@given(bit=st.integers(0, 8 * HEADER_BYTES - 1))
def test_any_flipped_bit_of_the_header_is_noticed(bit: int, tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(10),), 300)
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ids\.tokens"):
        open_tokens(path)


@_property
@given(content=st.binary(max_size=200))
def test_foreign_bytes_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    assume(not content.startswith(b"LAUNCHTK"))
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"foreign is no token file: it begins with .*LAUNCHTK"):
        open_tokens(path)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    path.write_bytes(_header(id_bytes=2, count=3, vocab=700) + struct.pack("<3H", 5, 600, 1))
    file = open_tokens(path)
    assert file.ids.read().tolist() == [5, 600, 1]
    write_tokens(tmp_path / "ours", (np.asarray([5, 600, 1]),), 700)
    assert (tmp_path / "ours").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header()[:20], "ends after 20 bytes, inside its header of 64"),
        (_header(version=2), "has version 2, and this launcher reads 1"),
        (_header(id_bytes=8), "has 8 bytes per id and a vocabulary of .*: convert it again"),
        (_header(count=5), "has 64 bytes, and its header promises 69"),
        (_header()[:-1] + b"!", "is damaged: its checksum is 0x.* and should be 0x21"),
    ],
)
def test_the_reason_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.tokens"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_tokens(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the token file .*ids: No such .*data\."):
        open_tokens(tmp_path / "ids")


def test_a_path_is_needed(language_model: Callable) -> None:
    with pytest.raises(ConfigError, match=r"data=tokens reads a token file, and data\.path=null"):
        data.build(TokensDataConfig(), language_model(), 0)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> object:
        yield np.arange(3)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="cannot write the token file .*: No space left"):
        write_tokens(tmp_path / "ids.tokens", chunks(), 300)
    assert list(tmp_path.iterdir()) == []


def test_batches_are_windows_of_the_file(tmp_path: Path, language_model: Callable) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(50_000),), 50_257)
    model = language_model(seq_len=10, vocab_size=50_257)
    dataset = data.build(TokensDataConfig(path=str(path)), model, 0)
    batch = dataset.batch(4, 8)
    assert type(batch["tokens"]) is np.ndarray  # no map of the file leaves the dataset
    assert batch["tokens"].shape == (8, 10)
    assert batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])
    assert "50,000 tokens of 50257" in dataset.name


def test_a_file_for_a_larger_vocabulary_is_refused(
    tmp_path: Path, language_model: Callable
) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.arange(200),), 300)
    message = r"ids\.tokens was made for 300 tokens, and model\.vocab_size=256: give .*=300 or more"
    with pytest.raises(ConfigError, match=message):
        data.build(TokensDataConfig(path=str(path)), language_model(vocab_size=256), 0)


def test_a_damaged_id_is_refused(
    tmp_path: Path, language_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (np.full(200, 999),), 300)
    config, message = (
        TokensDataConfig(path=str(path)),
        r"ids\.tokens holds the token 999, and .* of 300",
    )
    with pytest.raises(ConfigError, match=message):
        data.build(config, language_model(vocab_size=300), 0)
    monkeypatch.setattr(tokens, "_CHECKED_IDS", 1)  # as in a file too large to look at all of it
    path.write_bytes(path.read_bytes()[:64] + struct.pack("<200H", 5, *[999] * 199))
    dataset = data.build(config, language_model(vocab_size=300), 0)
    with pytest.raises(ConfigError, match=message):
        dataset.batch(0, 1)


def test_an_empty_file_is_too_short(tmp_path: Path, language_model: Callable) -> None:
    path = tmp_path / "ids.tokens"
    write_tokens(path, (), 256)
    with pytest.raises(ConfigError, match="gives 0 tokens"):
        data.build(TokensDataConfig(path=str(path)), language_model(), 0)
