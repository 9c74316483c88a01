"""The seeded order: a permutation per epoch, the same however it is read."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import batch_number, sample_indices


@settings(deadline=None)
@given(
    seed=st.integers(-(2**40), 2**40),
    num_samples=st.integers(1, 500),
    epoch=st.integers(0, 2**40),
)
def test_every_epoch_reads_every_sample_once(seed: int, num_samples: int, epoch: int) -> None:
    indices = sample_indices(seed, "train", epoch, num_samples, num_samples)
    assert sorted(indices) == list(range(num_samples))


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 60),
    factor=st.integers(1, 5),
    step=st.integers(0, 50),
)
def test_a_sample_does_not_depend_on_the_batch_size(
    num_samples: int, batch_size: int, factor: int, step: int
) -> None:
    large = sample_indices(3, "train", step, batch_size * factor, num_samples)
    small = [
        sample_indices(3, "train", step * factor + part, batch_size, num_samples)
        for part in range(factor)
    ]
    np.testing.assert_array_equal(large, np.concatenate(small))


def _orders(split: str) -> set[tuple[int, ...]]:
    return {
        tuple(sample_indices(seed, split, epoch, 100, 100))
        for seed in range(4)
        for epoch in range(4)
    }


def test_seeds_epochs_and_splits_give_different_orders() -> None:
    train, valid = _orders("train"), _orders("valid")
    assert len(train) == 16
    assert len(valid) == 4  # by epoch alone: held-out samples do not follow the seed
    assert not train & valid


@pytest.mark.parametrize("by", ["seed", "epoch"])
def test_all_permutations_are_equally_likely(by: str) -> None:
    orders = (
        sample_indices(n if by == "seed" else 0, "train", n if by == "epoch" else 0, 4, 4)
        for n in range(4800)
    )
    counts = Counter(map(tuple, orders))
    # 4! = 24 orders, 200 times each; the standard deviation is 14.
    assert len(counts) == 24
    assert min(counts.values()) > 130
    assert max(counts.values()) < 270


def test_a_trillion_samples_need_no_table() -> None:
    indices = sample_indices(0, "train", 10**15, 1000, 10**12)
    assert len(set(indices)) == 1000
    assert 0 <= indices.min() < 10**11 < 9 * 10**11 < indices.max() < 10**12


def test_batches_that_are_left_out_move_the_others_up() -> None:
    assert [batch_number(step, (2, 3, 6)) for step in range(6)] == [0, 1, 4, 5, 7, 8]
    assert [batch_number(step, ()) for step in range(3)] == [0, 1, 2]


@given(left_out=st.sets(st.integers(0, 60)))
def test_no_batch_is_read_twice_and_none_but_those_is_missed(left_out: set[int]) -> None:
    read = [batch_number(step, left_out) for step in range(50)]
    assert read == sorted(set(range(read[-1] + 1)) - left_out)
