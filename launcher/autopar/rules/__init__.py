"""Sharding rules for JAX primitives, one module per kind of op; importing this registers them all."""

from launcher.autopar.rules import (
    contraction,
    elementwise,
    indexing,
    opaque,
    reductions,
    shaping,
)
from launcher.autopar.rules.registry import (
    AxisStrategy,
    OpShapes,
    Strategy,
    axis_choices,
    run_local,
    shapes_of,
    strategies,
)

__all__ = [
    "AxisStrategy",
    "OpShapes",
    "Strategy",
    "axis_choices",
    "contraction",
    "elementwise",
    "indexing",
    "opaque",
    "reductions",
    "run_local",
    "shapes_of",
    "shaping",
    "strategies",
]
