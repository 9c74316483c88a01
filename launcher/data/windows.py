"""Batches of windows cut from one long array of token ids: what `text` and `tokens` both give.

The array is cut once, into a head for training and a tail that is held out; each part is read in
windows of S inputs and their S targets, one token further on, so windows are S + 1 long and lie S
apart. No token of the tail is ever seen in training, as input or as target. The array may lie in a
file of any size: only the rows of a batch are read.
"""

from dataclasses import dataclass

import numpy as np

from launcher.data.dataset import TOKEN_LEAVES, Dataset, held_out, wanted_leaves, wrong_leaf
from launcher.data.order import sample_indices
from launcher.data.stored_ids import StoredIds, StoredWindows
from launcher.data.tokenizer import Tokenizer
from launcher.errors import ConfigError
from launcher.models.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows(Dataset):
    """A cut array of token ids and how to read it."""

    name: str
    source: str  # the file or text, as errors name it
    seed: int
    vocab_size: int  # of the data: every id is below it
    dtypes: dict[str, np.dtype]  # of the leaves that the model takes
    train: np.ndarray | StoredWindows  # (windows, S + 1) overlapping view
    valid: np.ndarray | StoredWindows  # (windows, S + 1) overlapping view
    tokenizer: Tokenizer | None = None  # that the ids are from, where it is known

    def batch(self, step: int, batch_size: int, split: str = "train") -> dict[str, np.ndarray]:
        windows = {"train": self.train, "valid": self.valid}[split]
        rows = windows[sample_indices(self.seed, split, step, batch_size, len(windows))]
        self.check_ids(rows)
        parts = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        return {name: parts[name].astype(dtype) for name, dtype in self.dtypes.items()}

    def check_ids(self, rows: np.ndarray) -> None:
        """Raise `ConfigError` if a token is beyond the vocabulary.

        Looking it up is no error in JAX: it would train on rubbish.
        """
        largest = int(rows.max())
        if largest >= self.vocab_size:
            raise ConfigError(
                f"{self.source} holds the token {largest}, and its vocabulary of "
                f"{self.vocab_size} ends at {self.vocab_size - 1}: the file is damaged; "
                f"convert it again"
            )


def window_length(option: str, model: Model) -> tuple[int, dict[str, np.dtype]]:
    """Give the sequence length and the leaf dtypes of a model that reads token windows."""
    leaves = wanted_leaves(option, TOKEN_LEAVES, model)
    lengths = {leaf.shape[1:] for leaf in leaves.values()}
    for name, leaf in leaves.items():
        is_integer = np.issubdtype(leaf.dtype, np.integer)
        if len(leaf.shape) != 2 or not is_integer or len(lengths) > 1:
            raise wrong_leaf(option, name, leaf, "int32[B,S] with one S")
    (length,) = lengths.pop()
    return length, {name: np.dtype(leaf.dtype) for name, leaf in leaves.items()}


def cut_windows(
    ids: np.ndarray | StoredIds, length: int, valid_fraction: float, source: str
) -> tuple[np.ndarray | StoredWindows, np.ndarray | StoredWindows]:
    """Cut token ids into training and held-out windows, at least one of each."""
    needed = 2 * (length + 1)
    num_valid = max(held_out(len(ids), valid_fraction), length + 1)
    if len(ids) < needed:
        raise ConfigError(
            f"{source} gives {len(ids)} tokens, and one training and one held-out window of "
            f"model.seq_len={length} take {needed}: give more text, or a smaller model.seq_len"
        )
    cut = max(len(ids) - num_valid, length + 1)
    return _windows(ids[:cut], length), _windows(ids[cut:], length)


def _windows(ids: np.ndarray | StoredIds, length: int) -> np.ndarray | StoredWindows:
    if isinstance(ids, StoredIds):
        return StoredWindows(ids=ids, length=length)
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]
