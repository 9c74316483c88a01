"""The converter: text and arrays to token files that training reads, and its exit statuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher import data
from launcher.config import TextDataConfig, TokensDataConfig
from launcher.data.convert import convert, main
from launcher.data.tokenizer import load_tokenizer
from launcher.data.tokens import open_tokens
from launcher.errors import ConfigError

TEXT = "some words, and some more words to learn from\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "1.txt").write_text(TEXT)
    (folder / "2.txt").write_text(TEXT.upper())
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.tokens"


def test_converted_text_trains_on_the_same_batches(
    folder: Path, out: Path, language_model: Callable
) -> None:
    assert main([str(folder), "--out", str(out)]) == 0
    datasets = [
        data.build(config, language_model(seq_len=16), 3)
        for config in (TextDataConfig(path=str(folder)), TokensDataConfig(path=str(out)))
    ]
    for split in ("train", "valid"):
        batches = [dataset.batch(5, 4, split)["targets"] for dataset in datasets]
        np.testing.assert_array_equal(*batches)


def test_a_bpe_is_saved_beside_its_ids(folder: Path, out: Path) -> None:
    arguments = [str(folder), "--out", str(out), "--tokenizer", "bpe", "--vocab-size", "300"]
    assert main(arguments) == 0
    file = open_tokens(out)
    tokenizer = load_tokenizer(out.with_name("out.tokens.tokenizer.json"))
    assert file.vocab_size == tokenizer.vocab_size == 300
    assert tokenizer.backend.decode(file.ids.read().tolist()) == TEXT + "\n\n" + TEXT.upper()


def test_a_given_tokenizer_is_used(folder: Path, out: Path, tmp_path: Path) -> None:
    convert([str(folder)], out, "bpe", 280)
    saved = str(out) + ".tokenizer.json"
    convert([str(folder / "1.txt")], tmp_path / "again", saved)
    np.testing.assert_array_equal(
        open_tokens(tmp_path / "again").ids.read(), load_tokenizer(Path(saved)).encode(TEXT)
    )


@pytest.mark.parametrize(("vocab_size", "expected"), [(None, 10), (500, 500)])
def test_arrays_are_joined(
    vocab_size: int | None, expected: int, tmp_path: Path, out: Path
) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int64).reshape(2, 3))
    np.save(tmp_path / "b.npy", np.asarray([9, 8], np.uint16))
    convert([str(tmp_path / "*.npy")], out, vocab_size=vocab_size)
    file = open_tokens(out)
    assert file.ids.read().tolist() == [0, 1, 2, 3, 4, 5, 9, 8]
    assert file.vocab_size == expected


@pytest.mark.parametrize(
    ("array", "vocab_size", "message"),
    [
        (np.asarray([1, -4]), None, "holds the id -4: token ids are 0 or more"),
        (np.asarray([1.5]), None, "holds float64, and token ids are integers"),
        (np.zeros(0, np.int32), None, "holds 0 ids: give one with 1 or more"),
        (np.asarray([7]), 7, "the largest id is 7, and --vocab-size=7: give one from 8"),
        (np.asarray([2**32]), None, "the largest id is 4294967296"),
        (np.asarray([None]), None, r"cannot read the array .*ids\.npy: .*save it with np\.save"),
    ],
)
def test_arrays_that_are_no_ids_are_refused(
    array: np.ndarray, vocab_size: int | None, message: str, tmp_path: Path, out: Path
) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match=message):
        convert([str(tmp_path / "ids.npy")], out, vocab_size=vocab_size)
    assert not out.exists()


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("bytes", 300, "--vocab-size=300 is for --tokenizer=bpe, and --tokenizer=bytes has its"),
        ("bpe", None, "--tokenizer=bpe needs a --vocab-size of 256 or more, and it is None"),
        ("bpe", 255, "of 256 or more, and it is 255"),
        ("absent.json", None, r"cannot read the tokenizer absent\.json"),
    ],
)
def test_options_that_contradict_are_refused(
    tokenizer: str, vocab_size: int | None, message: str, folder: Path, out: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert([str(folder)], out, tokenizer, vocab_size)


def test_arrays_take_no_tokenizer(tmp_path: Path, out: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3))
    with pytest.raises(ConfigError, match=r"--tokenizer=bytes is for text, and .*ids\.npy holds"):
        convert([str(tmp_path / "ids.npy")], out, "bytes")


def test_two_kinds_of_input_are_refused(folder: Path, tmp_path: Path, out: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3))
    with pytest.raises(ConfigError, match=r"INPUT is 1 \.npy files and 2 of text"):
        convert([str(folder), str(tmp_path / "ids.npy")], out)


def test_statuses_are_the_launchers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "missing"), "--out", str(tmp_path / "x")]) == 2
    assert main([str(folder), "--out", str(tmp_path / "no/folder")]) == 6
    assert "error: INPUT=" in caplog.text
    assert "error: cannot write the token file" in caplog.text
