"""Synthetic batches: any leaves, addressed by (seed, number of the sample)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import data
from launcher.config import SyntheticDataConfig
from launcher.data.dataset import Dataset
from launcher.errors import ConfigError


@pytest.fixture
def build(custom_model: Callable) -> Callable[..., Dataset]:
    def build(seed: int = 0, vocab_size: int | None = None, **leaves: tuple) -> Dataset:
        return data.build(SyntheticDataConfig(), custom_model(vocab_size, **leaves), seed)

    return build


def test_floats_are_normal_and_integers_uniform(build: Callable) -> None:
    batch = build(vocab_size=7, x=((50, 3), "float32"), n=((40,), "int32")).batch(0, 100)
    assert abs(batch["x"].mean()) < 0.05
    assert abs(batch["x"].std() - 1) < 0.05
    counts = np.bincount(batch["n"].ravel())
    assert len(counts) == 7
    assert counts.min() > 450
    assert counts.max() < 700


def test_integers_are_bits_without_a_vocabulary(build: Callable) -> None:
    assert set(build(n=((), "int32")).batch(0, 100)["n"]) == {0, 1}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", jnp.bfloat16, "uint8", "bool"])
def test_dtypes_are_the_models(dtype: object, build: Callable) -> None:
    batch = build(x=((2, 3), dtype)).batch(0, 5)
    assert batch["x"].shape == (5, 2, 3)
    assert batch["x"].dtype == dtype


def test_a_sample_does_not_depend_on_the_batch_size(build: Callable) -> None:
    dataset = build(seed=-3, x=((4,), "float32"), n=((2,), "int32"))
    large = dataset.batch(1, 6)
    small = [dataset.batch(step, 2) for step in (3, 4, 5)]
    for name in ("x", "n"):
        np.testing.assert_array_equal(large[name], np.concatenate([batch[name] for batch in small]))


def test_seeds_steps_and_splits_differ(build: Callable) -> None:
    batches = {
        build(seed=seed, x=((4,), "float32")).batch(step, 2, split)["x"].tobytes()
        for seed in (0, 1)
        for step in (0, 1)
        for split in ("train", "valid")
    }
    assert len(batches) == 8


@pytest.mark.parametrize(
    "dtype",
    [jnp.complex64, jax.eval_shape(lambda: jax.random.key(0)).dtype],
    ids=["complex", "key"],
)
def test_what_is_no_number_is_refused(dtype: object, build: Callable) -> None:
    with pytest.raises(ConfigError, match="the model wants x .* data=synthetic fills numbers"):
        build(x=((3,), dtype))
