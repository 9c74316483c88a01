"""Tokenizers: lossless, of any text, and saved so that ids can be decoded."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import tokenizer as module
from launcher.data.tokenizer import (
    ByteTokenizer,
    id_dtype,
    load_tokenizer,
    pieces,
    train_bpe,
)
from launcher.errors import ConfigError, StorageError

TEXTS = ("the theory of the thing\n" * 30, "another text, with other words\n" * 30)


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_bpe_knows_every_text(text: str) -> None:
    bpe = train_bpe(TEXTS, 280)
    assert bpe.backend.decode(bpe.encode(text).tolist()) == text


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_ids_are_turned_back_into_bytes_piece_by_piece(text: str) -> None:
    for tokenizer in (train_bpe(TEXTS, 280), ByteTokenizer()):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text.encode()
        # Also where a piece ends within a character.
        assert b"".join(tokenizer.decode([i]) for i in ids) == text.encode()


def test_bpe_is_a_function_of_text_and_size() -> None:
    saved = {train_bpe(TEXTS, 300).backend.to_str() for _ in range(3)}
    assert len(saved) == 1


def test_a_small_text_has_fewer_ids_than_asked() -> None:
    assert train_bpe(("ab",), 5000).vocab_size == 256


def test_bytes_are_utf8() -> None:
    np.testing.assert_array_equal(ByteTokenizer().encode("é"), [0xC3, 0xA9])
    assert ByteTokenizer().encode("").size == 0


@settings(deadline=None)
@given(text=st.text(alphabet="ab\n", max_size=100))
def test_pieces_join_to_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 7)
        cut = tuple(pieces(text))
    assert "".join(cut) == text
    assert all(piece.endswith("\n") for piece in cut[:-1])
    assert all(cut)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (2**32, "u4")]
)
def test_ids_take_the_least_room(vocab_size: int, dtype: str) -> None:
    assert id_dtype(vocab_size) == np.dtype(dtype)


def test_a_saved_tokenizer_reads_back(tmp_path: Path) -> None:
    bpe = train_bpe(TEXTS, 300)
    bpe.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocab_size == bpe.vocab_size
    np.testing.assert_array_equal(again.encode(TEXTS[0]), bpe.encode(TEXTS[0]))
    assert isinstance(again.backend, tokenizers.Tokenizer)


def test_a_tokenizer_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write the tokenizer .*no/t\.json: No such"):
        train_bpe(TEXTS, 300).save(tmp_path / "no/t.json")


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*t\.json: No such file"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe"])
def test_a_foreign_tokenizer_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.json is no tokenizer\.json of the tokenizers pack"):
        load_tokenizer(path)
