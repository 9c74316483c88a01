"""Rates that depend on size: how fast a device multiplies small and large matrices, how fast a link carries
short and long messages.

A curve is a list of measured points. Between them the rate is linear in the logarithm of the size; above
the last it stays; below the first the time stays, since what is small takes as long as what is a little
less small. Left out: what is measured, and how (a cluster file says it under `sources`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from launcher.autopar.text.strict_reader import Node

Curves = Mapping[str, "Curve"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (size, rate), sizes ascending; `seconds(size)` is size / rate where the rate is per second."""

    points: tuple[tuple[float, float], ...]

    def seconds(self, size):
        """How long a job of this size takes, in the unit in which rates are per 1; arrays are welcome."""
        sizes, rates = np.array(self.points).T
        size = np.maximum(size, sizes[0])
        return size / np.interp(np.log(size), np.log(sizes), rates)


def read_curve(node: Node, *, size_unit: float, rate_unit: float, maximum: float = 1e30) -> Curve:
    """A list of [size, rate] in the units of the file, rates at most `maximum`."""
    points = tuple(_pair(point, maximum) for point in node.items())
    if not points:
        node.fail("has no points", "list at least one as [size, figure], or drop the key")
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)):
        node.fail("does not ascend", "order its points by size, each size once")
    return Curve(tuple((size * size_unit, rate * rate_unit) for size, rate in points))


def read_curves(
    node: Node, names, *, size_unit: float, rate_unit: float, maximum: float = 1e30
) -> dict[str, Curve]:
    """The curves of an object, by name; none where it is left out."""
    found = {} if node.is_null else node.fields((), tuple(names))
    return {
        name: read_curve(curve, size_unit=size_unit, rate_unit=rate_unit, maximum=maximum)
        for name, curve in found.items()
        if not curve.is_null
    }


def _pair(node: Node, maximum: float) -> tuple[float, float]:
    values = node.items()
    if len(values) != 2:
        node.fail("is no pair", "write [size, figure]")
    return values[0].positive(), values[1].positive(maximum=maximum)
