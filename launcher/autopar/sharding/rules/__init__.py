"""Sharding rules for JAX primitives, one module per kind of op; importing this registers them all."""

from launcher.autopar.sharding.rules import (
    attention,
    contraction,
    convolution,
    elementwise,
    indexing,
    linalg,
    opaque,
    reductions,
    scatter,
    shaping,
    windows,
)
from launcher.autopar.sharding.rules.registry import (
    AxisStrategy,
    OpShapes,
    Strategy,
    axis_choices,
    divides_evenly,
    run_local,
    shapes_of,
    strategies,
)

__all__ = [
    "AxisStrategy",
    "OpShapes",
    "Strategy",
    "attention",
    "axis_choices",
    "divides_evenly",
    "contraction",
    "convolution",
    "elementwise",
    "indexing",
    "linalg",
    "opaque",
    "reductions",
    "run_local",
    "scatter",
    "shapes_of",
    "shaping",
    "strategies",
    "windows",
]
