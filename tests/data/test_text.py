"""Text: what is read, how it is encoded, and every reason to refuse it."""

import timeit
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher import data
from launcher.config import TextDataConfig
from launcher.data import text
from launcher.data.text import find_files, own_english, read_file
from launcher.errors import ConfigError

ENGLISH = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40


@pytest.fixture
def english_file(tmp_path: Path) -> Path:
    path = tmp_path / "english.txt"
    path.write_text(ENGLISH)
    return path


def test_the_default_is_english_that_python_carries(language_model: Callable) -> None:
    dataset = data.build(TextDataConfig(), language_model(), 0)
    assert len(own_english()) > 300_000
    assert "Python's own documentation" in dataset.name
    batch = dataset.batch(0, 16)
    english = bytes(batch["tokens"].astype(np.uint8).ravel()).decode(errors="replace")
    assert english.count(" the ") > 3


def test_bytes_are_the_file_itself(english_file: Path, language_model: Callable) -> None:
    config = TextDataConfig(path=str(english_file), valid_fraction=0.1)
    batch = data.build(config, language_model(seq_len=32), 5).batch(2, 4)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        window = bytes(tokens.astype(np.uint8)) + bytes([targets[-1]])
        assert window.decode() in ENGLISH


def test_held_out_text_is_the_end(english_file: Path, language_model: Callable) -> None:
    english_file.write_text("a" * 900 + "b" * 100)
    config = TextDataConfig(path=str(english_file), valid_fraction=0.1)
    dataset = data.build(config, language_model(seq_len=10), 0)
    assert set(dataset.batch(0, 200)["targets"].flat) == {ord("a")}
    assert set(dataset.batch(0, 200, "valid")["tokens"].flat) == {ord("b")}


def test_bpe_ids_are_below_the_vocabulary_and_the_same_every_time(
    english_file: Path, language_model: Callable
) -> None:
    config = TextDataConfig(path=str(english_file), tokenizer="bpe")
    model = language_model(seq_len=8, vocab_size=300)
    first, again = (data.build(config, model, 0).batch(0, 16) for _ in range(2))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert 256 <= first["tokens"].max() < 300


def test_bpe_learns_from_the_training_part_alone(tmp_path: Path, language_model: Callable) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcd " * 500 + "wxyz " * 500)
    config = TextDataConfig(path=str(path), tokenizer="bpe", valid_fraction=0.5)
    dataset = data.build(config, language_model(seq_len=8, vocab_size=300), 0)
    assert dataset.batch(0, 50)["tokens"].max() >= 256
    # Nothing in the held-out half was seen, so nothing but its single bytes are known.
    assert dataset.batch(0, 50, "valid")["tokens"][-1].max() < 256


def test_a_batch_takes_well_under_a_millisecond(language_model: Callable) -> None:
    dataset = data.build(TextDataConfig(), language_model(), 0)
    fastest_s = min(timeit.repeat(lambda: dataset.batch(11, 32), number=20, repeat=5)) / 20
    assert fastest_s < 1e-3


def test_a_folder_gives_its_visible_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert find_files(str(tmp_path)) == (tmp_path / "a/z.md", tmp_path / "b.txt")


def test_a_glob_gives_what_it_finds_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found = find_files(str(tmp_path / "*.txt"))
    assert [path.name for path in found] == ["a.txt", "b.txt"]


def test_files_are_joined_by_a_blank_line(tmp_path: Path, language_model: Callable) -> None:
    (tmp_path / "1.txt").write_text("x" * 15)
    (tmp_path / "2.txt").write_text("y" * 15)
    dataset = data.build(
        TextDataConfig(path=str(tmp_path), valid_fraction=0.1), language_model(seq_len=15), 0
    )
    batch = dataset.batch(0, 1)
    assert bytes(batch["tokens"][0].astype(np.uint8)) == b"x" * 15
    assert bytes(dataset.batch(0, 1, "valid")["targets"][0].astype(np.uint8)) == b"y" * 15


def test_line_ends_and_other_scripts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("één\r\nдва\n三".encode())
    assert read_file(path) == "één\r\nдва\n三"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_vocabulary_below_the_bytes_is_refused(tokenizer: str, language_model: Callable) -> None:
    config = TextDataConfig(tokenizer=tokenizer)
    message = rf"model\.vocab_size=255 is below 256, .* data\.tokenizer={tokenizer} needs"
    with pytest.raises(ConfigError, match=message):
        data.build(config, language_model(vocab_size=255), 0)


def test_bpe_needs_a_model_with_a_vocabulary(language_model: Callable) -> None:
    with pytest.raises(ConfigError, match=r"model=gpt has none: take data\.tokenizer=bytes"):
        data.build(TextDataConfig(tokenizer="bpe"), language_model(vocab_size=None), 0)


def test_a_long_bpe_training_is_announced(
    language_model: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text, "_LONG_BPE_CHARACTERS", 1000)
    data.build(TextDataConfig(tokenizer="bpe"), language_model(vocab_size=260), 0)
    assert "takes minutes at every start: convert them once" in caplog.text


def test_an_unknown_tokenizer_is_refused(language_model: Callable) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=words is unknown: take .*bytes or bpe"):
        data.build(TextDataConfig(tokenizer="words"), language_model(), 0)


def test_too_short_a_text_is_refused(english_file: Path, language_model: Callable) -> None:
    english_file.write_text("short")
    with pytest.raises(ConfigError, match=r"english\.txt\) gives 5 tokens, .* take 130"):
        data.build(TextDataConfig(path=str(english_file)), language_model(), 0)


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", ""])
def test_a_path_that_gives_no_file_is_refused(
    name: str, tmp_path: Path, language_model: Callable
) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(ConfigError, match=r"data\.path=\S+ is no file, no folder .*: correct the"):
        data.build(TextDataConfig(path=path), language_model(), 0)


def test_an_unreadable_file_is_named(english_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text, "open_regular", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*english\.txt: Permission denied: "):
        read_file(english_file)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, language_model: Callable) -> None:
    (tmp_path / "good.txt").write_text(ENGLISH)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8: byte number 3 is 0xe9: conv"):
        data.build(TextDataConfig(path=str(tmp_path)), language_model(), 0)
