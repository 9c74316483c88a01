"""English text without a download, or any UTF-8 text files, as windows of token ids.

Without `data.path` the text is the language reference that Python carries for its own help():
half a megabyte of English on every machine. With it, the text is a file, all files of a folder, or
what a glob finds, in the order of their paths.
"""

import glob
import logging
import os
from pathlib import Path

from launcher.config import TextDataConfig
from launcher.data.dataset import Dataset
from launcher.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, train_bpe
from launcher.data.windows import TokenWindows, cut_windows, window_length
from launcher.errors import ConfigError
from launcher.models.model import Model
from launcher.regular_file import open_regular

# Between two texts: a blank line, as between two paragraphs.
SEPARATOR = "\n\n"

_COPIES = 4

# About a minute of training and encoding on two cores: from here on we name the better way.
_LONG_BPE_CHARACTERS = 50_000_000

_log = logging.getLogger(__name__)


def build_text(config: TextDataConfig, model: Model, seed: int) -> Dataset:
    """Read and encode the text, and cut it into windows for the model."""
    length, dtypes = window_length("text", model)
    source = "Python's own documentation" if config.path is None else config.path
    text = own_english() if config.path is None else read_files(find_files(config.path))
    tokenizer = _tokenizer(config, model, text)
    ids = tokenizer.encode(text)
    train, valid = cut_windows(ids, length, config.valid_fraction, f"data=text ({source})")
    return TokenWindows(
        name=f"{source}, {len(ids):,} tokens ({config.tokenizer}): {len(train):,} windows of "
        f"{length} to train on, {len(valid):,} held out",
        source=source,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        dtypes=dtypes,
        train=train,
        valid=valid,
        tokenizer=tokenizer,
    )


def own_english() -> str:
    """Give the texts behind Python's help(), sorted by topic."""
    try:
        from pydoc_data import topics  # optional: slim Python builds leave it out
    except ImportError as error:
        raise ConfigError(
            "this Python comes without its documentation (pydoc_data), the default of data=text: "
            "give data.path=<text files>, or take data=synthetic"
        ) from error
    return SEPARATOR.join(text for _, text in sorted(topics.topics.items()))


def find_files(path: str, key: str = "data.path") -> tuple[Path, ...]:
    """Find the files of a path: itself, all in the folder but hidden ones, or what it globs."""
    try:
        found = _found(Path(path).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: of a ~user who is not known
        raise ConfigError(f"cannot look up {key}={path} ({error}): correct the path") from error
    if not found:
        raise ConfigError(
            f"{key}={path} is no file, no folder with files and no glob that finds any, seen from "
            f"{Path.cwd()}: correct the path"
        )
    return tuple(found)


def _found(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if place.is_dir():
        return sorted(entry for entry in place.rglob("*") if _is_visible_file(entry, place))
    found = sorted(map(Path, glob.glob(str(place), recursive=True)))
    return [entry for entry in found if entry.is_file()]


def read_files(paths: tuple[Path, ...]) -> str:
    """Read UTF-8 files and join them with a blank line."""
    return SEPARATOR.join(map(read_file, paths))


def read_file(path: Path, key: str = "data.path") -> str:
    """Read one UTF-8 file with its line ends as they are."""
    try:
        with open_regular(path) as file:
            _check_size(path, os.fstat(file.fileno()).st_size, key)
            return file.read().decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read the text file {path}: {error.strerror}: correct {key}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the text file {path} is not UTF-8: byte number {error.start} is "
            f"0x{error.object[error.start]:02x}: convert it, or leave it out with a glob such as "
            f"{key}='folder/**/*.txt'"
        ) from error


def _check_size(path: Path, num_bytes: int, key: str) -> None:
    """A text is held as bytes, as characters and as ids at the same time."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory_bytes // _COPIES:
        raise ConfigError(
            f"the text file {path} has {num_bytes} bytes, and this machine's memory of {memory_bytes} "
            f"takes texts of {memory_bytes // _COPIES}: cut it into files, convert them with `python -m "
            f"launcher.data.convert`, and take data=tokens (or correct {key})"
        )


def _tokenizer(config: TextDataConfig, model: Model, text: str) -> Tokenizer:
    """Build the tokenizer of data.tokenizer; a BPE learns from the training part alone."""
    vocab_size = model.vocab_size
    if vocab_size is not None and vocab_size < NUM_BYTES:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is below {NUM_BYTES}, the values of a byte, which "
            f"data.tokenizer={config.tokenizer} needs: give model.vocab_size={NUM_BYTES} or more"
        )
    match config.tokenizer:
        case "bytes":
            return ByteTokenizer()
        case "bpe" if vocab_size is None:
            raise ConfigError(
                f"data.tokenizer=bpe is trained to the model's vocab_size, and "
                f"model={model.name} has none: take data.tokenizer=bytes"
            )
        case "bpe":
            if len(text) > _LONG_BPE_CHARACTERS:
                _log.warning(
                    "training a BPE on %d characters takes minutes at every start: convert them "
                    "once with `python -m launcher.data.convert`, and take data=tokens",
                    len(text),
                )
            head = text[: round(len(text) * (1 - config.valid_fraction))]
            return train_bpe((head,), vocab_size)
        case _:
            raise ConfigError(
                f"data.tokenizer={config.tokenizer} is unknown: take data.tokenizer=bytes or bpe"
            )


def _is_visible_file(entry: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in entry.relative_to(folder).parts)
    return entry.is_file() and not is_hidden
