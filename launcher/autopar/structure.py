"""Structural identity: when two ops, or two runs of ops, do the same thing to different values.

The launcher plans and compiles a repeated layer once. Two ops are alike when they apply the same
primitive with the same parameters to operands of the same shapes, dtypes and literal values.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jax.extend import core
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graph import Op


def op_signature(op: Op) -> Hashable:
    """Equal for two ops exactly when they are alike.

    A custom_vjp call is like no other: its rules are functions, whose equality cannot be decided.
    """
    if op.primitive is prim.custom_vjp_call_p:
        return ("unique", id(op.eqn))
    params = tuple((name, _frozen(value)) for name, value in sorted(op.eqn.params.items()))
    operands = tuple(
        ("literal", str(operand.val), str(operand.aval))
        if isinstance(operand, Literal)
        else str(atom.aval)
        for operand, atom in zip(op.operands, op.eqn.invars, strict=True)
    )
    return (str(op.primitive), params, operands, tuple(str(v.aval) for v in op.eqn.outvars))


def _frozen(value) -> Hashable:
    """A parameter as something comparable. Functions (the rule of a custom_jvp) count by their name."""
    if isinstance(value, core.ClosedJaxpr):
        return (str(value.jaxpr), tuple(str(const) for const in value.consts))
    return str(value) if not callable(value) or isinstance(value, type) else "function"


@dataclass(frozen=True, slots=True)
class Run:
    """Positions `start` to `end` repeat with a period; the last repetition may be cut short."""

    start: int
    period: int
    end: int

    @property
    def count(self) -> int:
        """Whole repetitions."""
        return (self.end - self.start) // self.period


def find_repeats(signatures: Sequence[Hashable], minimum_period: int = 8) -> tuple[Run, ...]:
    """The repeated runs of a sequence, longest first found, without overlaps, in order.

    For every period the longest stretch that equals itself shifted by the period is looked up; the run
    that covers the most positions wins (the shortest period at a tie), and the search goes on left and
    right of it.
    """
    numbers: dict[Hashable, int] = {}
    sequence = np.array([numbers.setdefault(s, len(numbers)) for s in signatures], np.int64)
    runs: list[Run] = []

    def search(start: int, end: int) -> None:
        run = _longest_run(sequence[start:end], minimum_period)
        if run is None:
            return
        run = Run(start + run.start, run.period, start + run.end)
        runs.append(run)
        search(start, run.start)
        search(run.end, end)

    search(0, len(sequence))
    return tuple(sorted(runs, key=lambda run: run.start))


def _longest_run(sequence: np.ndarray, minimum_period: int) -> Run | None:
    best: Run | None = None
    for period in range(minimum_period, len(sequence) // 2 + 1):
        if best is not None and best.period * best.count >= len(sequence):
            break
        stretch_start, stretch = _longest_true(sequence[:-period] == sequence[period:])
        count = stretch // period + 1
        if count < 2 or not _has_variety(sequence[stretch_start : stretch_start + period]):
            continue
        if best is None or count * period > best.count * best.period:
            best = Run(stretch_start, period, stretch_start + stretch + period)
    return best


def _longest_true(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(np.argmax(lengths))
    return int(edges[2 * longest]), int(lengths[longest])


def _has_variety(period: np.ndarray) -> bool:
    """A run of one op repeated is no layer."""
    return len(np.unique(period)) > 2
