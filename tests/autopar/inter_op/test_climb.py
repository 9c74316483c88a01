"""Climbing from number to number, on step times that are known."""

import math

import pytest

from launcher.autopar.inter_op.climb import climb


class Times:
    """Step times by count, and which were asked for."""

    def __init__(self, step_s, *tried):
        self._step_s, self.tried = step_s, {}
        for count in tried:
            self.ask(count)

    def ask(self, count):
        return self.tried.setdefault(count, self._step_s(count))

    def climbed(self, counts, worth=0.005):
        before = len(self.tried)
        climb(self.ask, lambda: self.tried, counts, worth)
        return list(self.tried)[before:]


POWERS = tuple(2**k for k in range(10, -1, -1))


@pytest.mark.parametrize("best", POWERS)
@pytest.mark.parametrize("start", POWERS)
def test_with_one_valley_its_bottom_is_found_from_everywhere(start, best):
    times = Times(lambda count: 1.0 + abs(math.log2(count / best)), start)
    times.climbed(POWERS)
    assert min(times.tried, key=times.tried.get) == best


def test_from_the_end_of_a_fall_it_goes_on_falling():
    times = Times(
        lambda count: {1024: 9.0, 256: 5.0, 64: 3.0, 32: 2.9}.get(count, 8.0), 1024, 256, 64
    )
    assert times.climbed(POWERS)[0] == 32


def test_of_two_sides_the_better_one_is_first():
    step_s = {1024: 5.0, 512: 3.9, 256: 4.0, 128: 4.5, 64: 9.0}
    assert Times(lambda count: step_s.get(count, 9.0), 1024, 256, 64).climbed(POWERS) == [512]


def test_counts_close_by_promise_less():
    """From 95 to 80 is a quarter of an octave, and on to 76 a thirteenth."""
    counts, step_s = (1520, 380, 95, 80, 76, 40), {1520: 11.0, 380: 7.5, 95: 6.8, 80: 6.72, 40: 6.0}
    assert Times(lambda count: step_s.get(count, 6.71), 1520, 380, 95).climbed(counts) == [80]


def test_what_is_gained_little_is_not_gone_on_for():
    step_s = {512: 1.0, 256: 0.999, 128: 0.9}
    assert 128 not in Times(lambda count: step_s.get(count, 2.0), 512).climbed(POWERS, worth=0.005)
    assert 128 in Times(lambda count: step_s.get(count, 2.0), 512).climbed(POWERS, worth=0.0005)


def test_where_nothing_fits_further_on_the_other_side_is_first():
    step_s = {1024: 2.0, 256: 1.0, 512: 0.5}
    times = Times(lambda count: step_s.get(count, math.inf), 1024, 256, 64)
    assert times.climbed(POWERS)[0] == 512
