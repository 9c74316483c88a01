"""Which losses are worth a warning."""

import math
import random

import pytest

from launcher.runtime.records.loss_watch import FEWEST, LossWatch


def spikes(losses):
    watch = LossWatch()
    return [index for index, loss in enumerate(losses) if watch.spike(loss)]


def falling(number, seed=0):
    noise = random.Random(seed)
    return [3 * math.exp(-i / 200) + noise.gauss(0, 0.05) for i in range(number)]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_noise_is_no_spike(seed):
    assert spikes(falling(1000, seed)) == []


def test_a_jump_is_told_once():
    losses = falling(100, seed=1)
    losses[60:63] = [9.0, 8.5, 8.0]
    assert spikes(losses) == [60]


def test_a_loss_that_hardly_varies_may_move_a_little():
    assert spikes([2.0] * 50 + [2.1] + [2.0] * 10) == []
    assert spikes([2.0] * 50 + [2.3] + [2.0] * 10) == [50]


def test_nothing_is_said_before_there_is_something_to_compare_with():
    assert spikes([2.0] * (FEWEST - 1) + [99.0]) == []
    assert spikes([2.0] * FEWEST + [99.0]) == [FEWEST]


def test_the_spike_says_what_it_is_compared_with():
    watch = LossWatch()
    for loss in [2.0, math.nan] * 20:
        watch.spike(loss)
    found = watch.spike(5.0)
    assert (found.loss, found.median, found.window) == (5.0, 2.0, 20)
