"""Make a token file: `python -m launcher.data.convert INPUT... --out FILE`.

INPUT is text (files, folders, globs) or NumPy arrays of ids (.npy). Text is encoded as bytes, by a
BPE trained on the inputs (its tokenizer.json is written beside FILE), or by any tokenizer.json.
Inputs are read one at a time, so a corpus need not fit in memory; its largest file must.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from launcher.data.text import SEPARATOR, find_files, read_file
from launcher.data.tokenizer import (
    NUM_BYTES,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from launcher.data.tokens import LARGEST_VOCAB_SIZE, write_tokens
from launcher.errors import ConfigError, LauncherError

_log = logging.getLogger(__name__)

_KEY = "INPUT"
_CHUNK_IDS = 1 << 22


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status, as the launcher's own are."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        convert(options.inputs, options.out, options.tokenizer, options.vocab_size)
    except LauncherError as error:
        _log.error("error: %s", error)
        return error.exit_status
    return 0


def convert(
    inputs: Sequence[str],
    out: Path,
    tokenizer_name: str | None = None,
    vocab_size: int | None = None,
) -> int:
    """Write the token file of the inputs and give its number of ids."""
    files = tuple(file for given in inputs for file in find_files(given, _KEY))
    num_arrays = sum(file.suffix == ".npy" for file in files)
    if num_arrays not in (0, len(files)):
        raise ConfigError(
            f"{_KEY} is {num_arrays} .npy files and {len(files) - num_arrays} of text: "
            f"give one kind at a time"
        )
    if num_arrays:
        return _convert_arrays(files, out, tokenizer_name, vocab_size)
    return _convert_texts(files, out, tokenizer_name or "bytes", vocab_size)


def _convert_texts(
    files: tuple[Path, ...], out: Path, tokenizer_name: str, vocab_size: int | None
) -> int:
    tokenizer = _tokenizer(files, tokenizer_name, vocab_size)
    num_ids = write_tokens(out, map(tokenizer.encode, _joined(files)), tokenizer.vocab_size)
    _log.info("%s: %d ids below %d; files read: %d", out, num_ids, tokenizer.vocab_size, len(files))
    if tokenizer_name == "bpe":
        saved = out.with_name(out.name + ".tokenizer.json")
        tokenizer.save(saved)
        _log.info("%s: the tokenizer, to decode them", saved)
    return num_ids


def _tokenizer(files: tuple[Path, ...], name: str, vocab_size: int | None) -> Tokenizer:
    if name != "bpe" and vocab_size is not None:
        raise ConfigError(
            f"--vocab-size={vocab_size} is for --tokenizer=bpe, and --tokenizer={name} has its "
            f"own: leave --vocab-size out"
        )
    if name == "bytes":
        return ByteTokenizer()
    if name != "bpe":
        return load_tokenizer(Path(name))
    if vocab_size is None or vocab_size < NUM_BYTES:
        raise ConfigError(
            f"--tokenizer=bpe needs a --vocab-size of {NUM_BYTES} or more, and it is "
            f"{vocab_size}: give the model.vocab_size to train with"
        )
    return train_bpe(map(_read, files), vocab_size)


def _joined(files: tuple[Path, ...]) -> Iterator[str]:
    """Give the texts one by one, with what stands between two of them."""
    for index, file in enumerate(files):
        yield (SEPARATOR if index else "") + _read(file)


def _read(file: Path) -> str:
    return read_file(file, _KEY)


def _convert_arrays(
    files: tuple[Path, ...], out: Path, tokenizer_name: str | None, vocab_size: int | None
) -> int:
    if tokenizer_name is not None:
        raise ConfigError(
            f"--tokenizer={tokenizer_name} is for text, and {files[0]} holds ids already: "
            f"leave --tokenizer out"
        )
    largest = max(_largest_id(file) for file in files)
    needed = largest + 1 if vocab_size is None else vocab_size
    if not largest < needed <= LARGEST_VOCAB_SIZE:
        raise ConfigError(
            f"the largest id is {largest}, and --vocab-size={needed}: give one from {largest + 1} "
            f"to {LARGEST_VOCAB_SIZE}"
        )
    num_ids = write_tokens(out, (chunk for file in files for chunk in _chunks(file)), needed)
    _log.info("%s: %d ids below %d; arrays read: %d", out, num_ids, needed, len(files))
    return num_ids


def _largest_id(file: Path) -> int:
    largest = -1
    for chunk in _chunks(file):
        smallest = int(chunk.min())
        if smallest < 0:
            raise ConfigError(f"{file} holds the id {smallest}: token ids are 0 or more")
        largest = max(largest, int(chunk.max()))
    if largest < 0:
        raise ConfigError(f"{file} holds 0 ids: give one with 1 or more")
    return largest


def _chunks(file: Path) -> Iterator[np.ndarray]:
    """Give the ids of an array in the order of its rows, some millions at a time."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read the array {file}: {error}: save it with np.save") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"{file} holds {array.dtype}, and token ids are integers: cast it first")
    flat = array.reshape(-1)
    for start in range(0, len(flat), _CHUNK_IDS):
        yield flat[start : start + _CHUNK_IDS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.data.convert",
        description="Make a token file for data=tokens from text or from .npy arrays of ids.",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or globs")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--tokenizer", metavar="bytes|bpe|FILE.json", help="for text; bytes unless given"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="of a bpe; of .npy, the largest id and one"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
