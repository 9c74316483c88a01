"""Images from a folder of class folders, and what every image dataset shares with the models.

The classes are the sub-folders, numbered in the order of their names; a class's last images, by
name, are held out, so that every class is in both parts. An image is turned upright, scaled until
it covers the model's size, cropped about its centre, and given as floats in [-1, 1]. Nothing is
random but the order, and nothing is decoded before a batch needs it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.config import ImagesDataConfig
from launcher.data.dataset import (
    IMAGE_LEAVES,
    Dataset,
    held_out,
    missing_package,
    wanted_leaves,
    wrong_leaf,
)
from launcher.data.order import sample_indices
from launcher.errors import ConfigError
from launcher.models.model import Model
from launcher.regular_file import open_regular

_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_LARGEST_PIXEL = 255.0
_MODES = {1: "L", 3: "RGB"}  # Pillow's names, by number of channels


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShape:
    """The size of a model's images, and the dtypes of the leaves that it takes."""

    height: int
    width: int
    channels: int
    dtypes: dict[str, np.dtype]

    def leaves(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Give the batch's leaves, of these images and labels, that the model takes."""
        parts = {"images": images, "labels": labels}
        return {name: parts[name].astype(dtype) for name, dtype in self.dtypes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFolder(Dataset):
    """Image files with their labels, by split."""

    name: str
    seed: int
    shape: ImageShape
    train: tuple[tuple[Path, int], ...]
    valid: tuple[tuple[Path, int], ...]

    def batch(self, step: int, batch_size: int, split: str = "train") -> dict[str, np.ndarray]:
        samples = {"train": self.train, "valid": self.valid}[split]
        indices = sample_indices(self.seed, split, step, batch_size, len(samples))
        chosen = tuple(samples[index] for index in indices)
        # Pillow decodes and scales without Python's lock, so threads help; `map` keeps the order.
        with ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as threads:
            images = tuple(threads.map(lambda sample: _decode(sample[0], self.shape), chosen))
        return self.shape.leaves(np.stack(images), np.asarray([label for _, label in chosen]))


def build_images(config: ImagesDataConfig, model: Model, seed: int) -> Dataset:
    """List the class folders under data.path for a model that reads images."""
    shape = image_shape("images", model)
    if shape.channels not in _MODES:
        raise ConfigError(
            f"the model wants images of {shape.channels} channels, and data=images gives 1 or 3: "
            f"change the model's example_batch, or take data=synthetic"
        )
    try:
        import PIL.Image  # noqa: F401 (asked for now, so that its absence is told before training)
    except ImportError as error:
        raise missing_package("data=images", "pillow") from error
    classes = find_classes(config.path)
    check_num_classes("images", len(classes), model)
    train, valid = _split(classes, config.valid_fraction)
    for files in classes:  # what none can read is said before planning, the rest when it is met
        _decode(files[0], shape)
    return ImageFolder(
        name=f"{config.path}, {len(classes)} classes: {len(train):,} images to train on, "
        f"{len(valid):,} held out",
        seed=seed,
        shape=shape,
        train=train,
        valid=valid,
    )


def image_shape(option: str, model: Model) -> ImageShape:
    """Give the image size of a model that reads images and labels."""
    leaves = wanted_leaves(option, IMAGE_LEAVES, model)
    images = leaves["images"]
    if len(images.shape) != 4 or not np.issubdtype(images.dtype, np.floating):
        raise wrong_leaf(option, "images", images, "float32[B,H,W,C]")
    labels = leaves.get("labels")
    if labels is not None and (
        len(labels.shape) != 1 or not np.issubdtype(labels.dtype, np.integer)
    ):
        raise wrong_leaf(option, "labels", labels, "int32[B]")
    _, height, width, channels = images.shape
    dtypes = {name: np.dtype(leaf.dtype) for name, leaf in leaves.items()}
    return ImageShape(height=height, width=width, channels=channels, dtypes=dtypes)


def check_num_classes(option: str, num_classes: int, model: Model) -> None:
    """Refuse labels that the model has no output for: JAX would not notice.

    A model's `vocab_size` bounds the integers of its batches, so here the labels.
    """
    if model.vocab_size is not None and num_classes > model.vocab_size:
        raise ConfigError(
            f"data={option} has {num_classes} classes, and model={model.name} takes labels below "
            f"{model.vocab_size}: give model.num_classes={num_classes} or more"
        )


def find_classes(path: str | None) -> tuple[tuple[Path, ...], ...]:
    """Give the image files of every class folder, both in the order of their names."""
    if path is None:
        raise ConfigError(
            "data=images reads a folder, and data.path=null: give data.path=<a folder with a "
            "folder of images per class>"
        )
    try:
        folders = _folders(Path(path).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: of a ~user who is not known
        raise ConfigError(f"cannot look up data.path={path} ({error}): correct it") from error
    if not folders:
        raise ConfigError(
            f"data.path={path} is no folder with a folder of images per class: correct data.path"
        )
    classes = tuple(_image_files(folder) for folder in folders)
    for folder, files in zip(folders, classes, strict=True):
        if not files:
            raise ConfigError(
                f"the class folder {folder} has no images ({' '.join(sorted(_SUFFIXES))}): "
                f"fill it or remove it"
            )
    return classes


def _folders(root: Path) -> tuple[Path, ...]:
    entries = sorted(_visible(root)) if root.is_dir() else ()
    return tuple(entry for entry in entries if entry.is_dir())


def _image_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in _visible(folder) if file.suffix.lower() in _SUFFIXES))


def _visible(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _split(
    classes: tuple[tuple[Path, ...], ...], valid_fraction: float
) -> tuple[tuple[tuple[Path, int], ...], tuple[tuple[Path, int], ...]]:
    """Hold out the last images of every class that has more than one."""
    train: list[tuple[Path, int]] = []
    valid: list[tuple[Path, int]] = []
    for label, files in enumerate(classes):
        num_train = max(1, len(files) - held_out(len(files), valid_fraction))
        train += ((file, label) for file in files[:num_train])
        valid += ((file, label) for file in files[num_train:])
    if not valid:
        raise ConfigError(
            f"data=images finds {len(train)} images in {len(classes)} classes, one each, and none "
            f"is left to hold out: give two images or more in some class of data.path"
        )
    return tuple(train), tuple(valid)


def _decode(path: Path, shape: ImageShape) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with open_regular(path) as bytes_of_file, Image.open(bytes_of_file) as file:
            upright = ImageOps.exif_transpose(file).convert(_MODES[shape.channels])
        image = ImageOps.fit(upright, (shape.width, shape.height), Image.Resampling.BICUBIC)
    # Pillow reports damaged files as any of these, by format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"cannot read the image {path}: {error}: repair it, or remove it from data.path"
        ) from error
    pixels = np.asarray(image, np.float32) / (_LARGEST_PIXEL / 2) - 1
    return pixels.reshape(shape.height, shape.width, shape.channels)
