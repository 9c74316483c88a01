"""Curves: what stands between their points, beyond them, and below."""

import re

import numpy as np
import pytest

from launcher.autopar.clusters.curves import Curve, read_curve, read_curves
from launcher.autopar.text.strict_reader import Node
from launcher.errors import ConfigError

RISING = Curve(((10.0, 0.1), (1000.0, 0.5)))


def test_the_rate_is_linear_in_the_logarithm_of_the_size():
    assert RISING.seconds(10.0) == pytest.approx(10 / 0.1)
    assert RISING.seconds(100.0) == pytest.approx(100 / 0.3)
    assert RISING.seconds(1000.0) == pytest.approx(1000 / 0.5)


def test_above_the_last_point_the_rate_stays_and_below_the_first_the_time():
    assert RISING.seconds(1e6) == pytest.approx(1e6 / 0.5)
    assert RISING.seconds(1.0) == RISING.seconds(1e-9) == RISING.seconds(10.0)


def test_an_array_of_sizes_is_an_array_of_seconds():
    sizes = [1.0, 100.0, 1e6]
    assert RISING.seconds(np.array(sizes)) == pytest.approx([RISING.seconds(s) for s in sizes])


def test_a_curve_is_read_in_the_units_of_its_file():
    found = read_curve(Node(value=[[1, 0.5], [4, 1]], place="c"), size_unit=1e9, rate_unit=2.0)
    assert found == Curve(((1e9, 1.0), (4e9, 2.0)))


def test_curves_that_are_left_out_are_none():
    for value in (None, {}, {"fp32": None}):
        assert read_curves(Node(value=value, place="c"), ["fp32"], size_unit=1, rate_unit=1) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "c=an object of 0 is no list: write one in brackets"),
        ([], "c=a list of 0 has no points: list at least one as [size, figure], or drop the key"),
        ([[1, 0.5, 2]], "c[0]=a list of 3 is no pair: write [size, figure]"),
        ([[2, 0.5], [1, 0.5]], "c=a list of 2 does not ascend: order its points by size"),
        ([[1, 0.5], [1, 0.6]], "c=a list of 2 does not ascend: order its points by size"),
        ([[0, 0.5]], "c[0][0]=0 is not above 0"),
        ([[1, 1.5]], "c[0][1]=1.5 is not in"),
    ],
)
def test_a_mistake_in_a_curve_is_named(value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_curve(Node(value=value, place="c"), size_unit=1.0, rate_unit=1.0, maximum=1.0)
