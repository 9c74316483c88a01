"""Windows of tokens: cut without overlap between the splits, and refused where none fits."""

from collections.abc import Callable

import numpy as np
import pytest

from launcher.data.windows import TokenWindows, cut_windows, window_length
from launcher.errors import ConfigError


def _dataset(ids: np.ndarray, length: int, valid_fraction: float = 0.2) -> TokenWindows:
    train, valid = cut_windows(ids, length, valid_fraction, "the test")
    dtypes = {"tokens": np.dtype(np.int32), "targets": np.dtype(np.int32)}
    return TokenWindows(
        name="test",
        source="the test",
        seed=1,
        vocab_size=1000,
        dtypes=dtypes,
        train=train,
        valid=valid,
    )


def test_targets_are_the_tokens_one_further_on() -> None:
    batch = _dataset(np.arange(1000, dtype=np.uint16), 10).batch(3, 8)
    assert batch["tokens"].shape == batch["targets"].shape == (8, 10)
    assert batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])
    assert (batch["tokens"][:, 0] % 10 == 0).all()


@pytest.mark.parametrize("valid_fraction", [0.001, 0.2, 0.999])
@pytest.mark.parametrize("num_ids", [22, 23, 100, 1000])
def test_no_held_out_token_is_seen_in_training(num_ids: int, valid_fraction: float) -> None:
    dataset = _dataset(np.arange(num_ids, dtype=np.uint16), 10, valid_fraction)
    assert len(dataset.train) > 0
    assert len(dataset.valid) > 0
    assert not set(dataset.train.flat) & set(dataset.valid.flat)
    # An epoch reads every window: all tokens but what is left over at the ends of the two parts.
    epoch = dataset.batch(0, len(dataset.train))["tokens"]
    assert sorted(epoch.flat) == list(range(10 * len(dataset.train)))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    ids = np.arange(1000, dtype=np.uint16)
    first, again = _dataset(ids, 10), _dataset(ids, 10)
    first.batch(0, 8)
    np.testing.assert_array_equal(first.batch(7, 8)["tokens"], again.batch(7, 8)["tokens"])


def test_the_held_out_order_is_the_same_for_every_seed() -> None:
    train, valid = cut_windows(np.arange(1000, dtype=np.uint16), 10, 0.2, "the test")
    by_seed = [
        TokenWindows(
            name="test",
            source="the test",
            seed=seed,
            vocab_size=1000,
            dtypes={"tokens": np.dtype(np.int32)},
            train=train,
            valid=valid,
        )
        for seed in (1, 2)
    ]
    held_out = [dataset.batch(0, 8, "valid")["tokens"] for dataset in by_seed]
    trained_on = [dataset.batch(0, 8)["tokens"] for dataset in by_seed]
    np.testing.assert_array_equal(*held_out)
    assert (trained_on[0] != trained_on[1]).any()


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives 21 tokens.*model\.seq_len=10 take 22: give more"):
        cut_windows(np.zeros(21, np.uint8), 10, 0.2, "data=text")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.valid_fraction={fraction} is not between 0"):
        cut_windows(np.zeros(1000, np.uint8), 10, fraction, "data=text")


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_read() -> None:
    dataset = _dataset(np.full(100, 1000, np.uint16), 10)
    with pytest.raises(ConfigError, match="the test holds the token 1000, and its vocab.* of 1000"):
        dataset.batch(0, 2)


def test_a_model_may_take_the_tokens_alone(custom_model: Callable) -> None:
    length, dtypes = window_length("text", custom_model(tokens=((7,), "int16")))
    assert length == 7
    assert dtypes == {"tokens": np.int16}


@pytest.mark.parametrize(
    ("leaves", "named"),
    [
        ({"tokens": ((7,), "float32")}, r"tokens float32\[B,7\]"),
        ({"tokens": ((7, 2), "int32")}, r"tokens int32\[B,7,2\]"),
        ({"tokens": ((7,), "int32"), "targets": ((8,), "int32")}, r"tokens int32\[B,7\]"),
    ],
)
def test_leaves_of_another_shape_are_refused(
    custom_model: Callable, leaves: dict, named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"wants {named}, and data=text gives .* take data=synt"):
        window_length("text", custom_model(**leaves))
