"""Text to token ids: as UTF-8 bytes, or by a byte-pair encoding trained on the text at hand.

Both are lossless. Training a BPE is a pure function of the text and the vocabulary size (whatever
the number of threads), so nothing is stored: the same text gives the same ids in every process of a
run and after every restart. Hours-long training wants the ids fixed once, as a token file
(`launcher.data.convert`), which also keeps its tokenizer beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launcher.data.dataset import missing_package
from launcher.errors import ConfigError, StorageError
from launcher.regular_file import open_regular

if TYPE_CHECKING:
    import tokenizers

NUM_BYTES = 256

# Long texts are encoded in pieces, cut at line ends: one piece per thread, and bounded memory.
_PIECE_CHARACTERS = 1 << 20


class Tokenizer(ABC):
    """Turns text into token ids below `vocab_size`."""

    __slots__ = ()

    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Give the ids of a text, in the smallest unsigned dtype that holds `vocab_size`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> bytes:
        """Give the bytes that ids stand for: those of the text, or a piece of it within a character."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write what is needed to decode the ids again, if anything is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte."""

    vocab_size: int = NUM_BYTES

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def save(self, path: Path) -> None:
        del path  # bytes decode themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class BpeTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package; ours are trained on bytes, so no text is unknown."""

    backend: "tokenizers.Tokenizer"
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        dtype = id_dtype(self.vocab_size)
        encodings = self.backend.encode_batch(list(pieces(text)), add_special_tokens=False)
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(e.ids, dtype) for e in encodings)])

    def decode(self, ids: Sequence[int]) -> bytes:
        # Not the backend's own way, which gives text, and U+FFFD for a character that is cut in two.
        return bytes(_BYTE_OF[letter] for i in ids for letter in self.backend.id_to_token(i))

    def save(self, path: Path) -> None:
        try:
            path.write_text(self.backend.to_str(), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write the tokenizer {path}: {error.strerror}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Train a byte-level BPE; small texts end in fewer ids than `vocab_size`, never in more."""
    tokenizers = _package()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once would only memorise the text
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return BpeTokenizer(backend=backend, vocab_size=backend.get_vocab_size())


def load_tokenizer(path: Path) -> BpeTokenizer:
    """Read a tokenizer.json, ours or anyone's."""
    tokenizers = _package()
    try:
        with open_regular(path) as file:
            backend = tokenizers.Tokenizer.from_str(file.read().decode())
    except OSError as error:
        raise ConfigError(
            f"cannot read the tokenizer {path}: {error.strerror}: give bytes, bpe or its path"
        ) from error
    except Exception as error:  # the package raises bare Exceptions for what it cannot parse
        raise ConfigError(
            f"{path} is no tokenizer.json of the tokenizers package: {error}: give one that is"
        ) from error
    return BpeTokenizer(backend=backend, vocab_size=backend.get_vocab_size())


def id_dtype(vocab_size: int) -> np.dtype:
    """Give the smallest unsigned integer type for ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1)


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces that join to the same text."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level BPE writes for each byte: itself, or one from U+0100 on.

    Radford et al. 2019 (GPT-2), `bytes_to_unicode` in their encoder.py: bytes that print, and no
    spaces, stand for themselves.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def _package() -> "tokenizers":
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("data.tokenizer=bpe", "tokenizers") from error
    return tokenizers
