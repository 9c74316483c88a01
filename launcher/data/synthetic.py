"""Random numbers in the shape of any model's batch: for rehearsals, measurements and tests.

Floats are standard normal, integers uniform below the model's `vocab_size`. Every sample has a
generator of its own, keyed by (seed, number of the sample), so a sample does not depend on how the
batches are cut. There is nothing to learn, and no end.
"""

from dataclasses import dataclass

import jax
import numpy as np

from launcher.data.dataset import Dataset, describe_leaves
from launcher.data.order import SPLITS
from launcher.errors import ConfigError
from launcher.models.model import Model

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic(Dataset):
    """The shapes to fill."""

    name: str
    seed: int
    num_values: int  # integers are drawn below it
    leaves: tuple[tuple[str, tuple[int, ...], np.dtype], ...]  # name, shape of a sample, dtype

    def batch(self, step: int, batch_size: int, split: str = "train") -> dict[str, np.ndarray]:
        batch = {name: np.empty((batch_size, *shape), dtype) for name, shape, dtype in self.leaves}
        for row in range(batch_size):
            generator = self._generator(step * batch_size + row, split)
            for name, shape, dtype in self.leaves:
                batch[name][row] = _draw(generator, shape, dtype, self.num_values)
        return batch

    def _generator(self, number: int, split: str) -> np.random.Generator:
        # The highest counter word separates the splits: no sample draws 2^192 blocks.
        counter = np.asarray([0, 0, 0, SPLITS.index(split)], np.uint64)
        key = np.asarray([self.seed & _MASK, number], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def build_synthetic(model: Model, seed: int) -> Dataset:
    """Take the shapes from the model's example batch."""
    wanted = model.example_batch(1)
    for name, leaf in wanted.items():
        _check(name, leaf)
    num_values = 2 if model.vocab_size is None else model.vocab_size
    return Synthetic(
        name=f"random numbers: {describe_leaves(wanted)}",
        seed=seed,
        num_values=num_values,
        # Sorted: the order of the draws must not hang on the order of a dict.
        leaves=tuple(
            (name, tuple(leaf.shape[1:]), np.dtype(leaf.dtype))
            for name, leaf in sorted(wanted.items())
        ),
    )


def _check(name: str, leaf: jax.ShapeDtypeStruct) -> None:
    is_number = any(
        jax.numpy.issubdtype(leaf.dtype, kind) for kind in (np.floating, np.integer, np.bool_)
    )
    if not leaf.shape or not is_number:
        raise ConfigError(
            f"the model wants {name} {leaf.dtype}{list(leaf.shape)}, and data=synthetic fills "
            f"numbers with a leading batch dim: change the model's example_batch"
        )


def _draw(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, num_values: int
) -> np.ndarray:
    if jax.numpy.issubdtype(dtype, np.integer):
        return generator.integers(num_values, size=shape)
    if dtype == np.bool_:
        return generator.integers(2, size=shape)
    return generator.standard_normal(shape, np.float64 if dtype == np.float64 else np.float32)
