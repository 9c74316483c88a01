"""Real images without a download: the 1,797 handwritten digits that scikit-learn carries.

They are 8x8 and grey; each is enlarged to the model's size by repeating pixels, and its one channel
is repeated. (UCI Machine Learning Repository, Optical Recognition of Handwritten Digits, 1998.)
"""

from dataclasses import dataclass

import numpy as np

from launcher.config import DigitsDataConfig
from launcher.data.dataset import Dataset, held_out, missing_package
from launcher.data.images import ImageShape, check_num_classes, image_shape
from launcher.data.order import sample_indices
from launcher.models.model import Model

_NUM_CLASSES = 10
_LARGEST_PIXEL = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits(Dataset):
    """The digits, in the order of scikit-learn; the last ones are held out."""

    name: str
    seed: int
    shape: ImageShape
    pixels: np.ndarray  # (images, 8, 8) float32 in [-1, 1]
    labels: np.ndarray  # (images,)
    num_train: int

    def batch(self, step: int, batch_size: int, split: str = "train") -> dict[str, np.ndarray]:
        parts = {"train": (0, self.num_train), "valid": (self.num_train, len(self.labels))}
        first, end = parts[split]
        indices = first + sample_indices(self.seed, split, step, batch_size, end - first)
        return self.shape.leaves(self._enlarged(indices), self.labels[indices])

    def _enlarged(self, indices: np.ndarray) -> np.ndarray:
        _, height, width = self.pixels.shape
        rows = np.arange(self.shape.height) * height // self.shape.height
        columns = np.arange(self.shape.width) * width // self.shape.width
        grey = self.pixels[indices[:, None, None], rows[:, None], columns]
        return np.repeat(grey[..., None], self.shape.channels, axis=-1)


def build_digits(config: DigitsDataConfig, model: Model, seed: int) -> Dataset:
    """Load the digits for a model that reads images."""
    shape = image_shape("digits", model)
    check_num_classes("digits", _NUM_CLASSES, model)
    try:
        from sklearn.datasets import load_digits  # a second to import, for this data only
    except ImportError as error:
        raise missing_package("data=digits", "scikit-learn") from error
    digits = load_digits()
    num_valid = held_out(len(digits.target), config.valid_fraction)
    num_train = max(1, len(digits.target) - num_valid)
    return Digits(
        name=f"scikit-learn's handwritten digits: {num_train:,} images to train on, "
        f"{len(digits.target) - num_train:,} held out",
        seed=seed,
        shape=shape,
        pixels=(digits.images / (_LARGEST_PIXEL / 2) - 1).astype(np.float32),
        labels=digits.target,
        num_train=num_train,
    )
