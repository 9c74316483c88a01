"""What a dataset is, and the check that a model can be fed from it.

A `Dataset` is a pure function of (seed, step): it holds no cursor, so every plan, every host and
every restart reads the same samples in the same order. What it gives is a dict of NumPy arrays with
the names, shapes and dtypes of the model's `example_batch`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import jax
import numpy as np

from launcher.errors import ConfigError
from launcher.models.model import Model

TOKEN_LEAVES = ("tokens", "targets")
IMAGE_LEAVES = ("images", "labels")


class Dataset(ABC):
    """Batches addressed by step; `name` says in a few words what the data is."""

    __slots__ = ()

    name: str

    @abstractmethod
    def batch(self, step: int, batch_size: int, split: str = "train") -> dict[str, np.ndarray]:
        """Give samples number step*batch_size up to (step+1)*batch_size of a split.

        "train" is shuffled anew by the seed in every epoch; "valid" are the held-out samples, in
        one order for every seed, so that runs can be compared.
        """


def wanted_leaves(
    option: str, offered: tuple[str, ...], model: Model
) -> dict[str, jax.ShapeDtypeStruct]:
    """Give the leaves of the model's batch, if they are the first offered and perhaps others."""
    wanted = model.example_batch(1)
    if _are_among(offered, wanted):
        return dict(wanted)
    raise ConfigError(
        f"model={model.name} wants {describe_leaves(wanted)}, and data={option} gives "
        f"{', '.join(offered)}: take {_fitting_options(wanted)}"
    )


def describe_leaves(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Write leaves as `images float32[B,32,32,3], labels int32[B]`."""
    return ", ".join(f"{name} {_describe(leaf)}" for name, leaf in leaves.items()) or "no leaves"


def wrong_leaf(option: str, name: str, leaf: jax.ShapeDtypeStruct, gives: str) -> ConfigError:
    """Say that the data has a leaf of this name, but of another shape or dtype."""
    return ConfigError(
        f"the model wants {name} {_describe(leaf)}, and data={option} gives {name} {gives}: "
        f"change the model's example_batch, or take data=synthetic"
    )


def missing_package(option: str, package: str) -> ConfigError:
    """Say that the package that this kind of data needs cannot be imported."""
    return ConfigError(
        f"{option} needs the package {package}, which is not installed: "
        f"`pip install {package}`, or take another data="
    )


def held_out(num_samples: int, valid_fraction: float) -> int:
    """Give how many of the samples are held out: the fraction, but one at the least."""
    if not 0 < valid_fraction < 1:
        raise ConfigError(
            f"data.valid_fraction={valid_fraction} is not between 0 and 1: "
            f"give the share of the samples to hold out, such as data.valid_fraction=0.1"
        )
    return max(1, round(num_samples * valid_fraction))


def _describe(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(('B', *map(str, leaf.shape[1:])))}]"


def _fitting_options(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    if _are_among(TOKEN_LEAVES, wanted):
        return "data=text or data=tokens"
    if _are_among(IMAGE_LEAVES, wanted):
        return "data=digits or data=images"
    return "data=synthetic"


def _are_among(offered: tuple[str, ...], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    return offered[0] in wanted and set(wanted) <= set(offered)
