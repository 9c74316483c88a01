"""Structural identity: when two ops, or two runs of ops, do the same thing to different values.

The launcher differentiates and plans a repeated layer once. Two ops are alike when they apply the same
primitive with the same parameters to operands of the same shapes, dtypes and literal values.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Op, evaluate_op


def op_signature(op: Op) -> Hashable:
    """Equal for two ops exactly when they are alike.

    The rule of a custom derivative counts by what it traces to: it is a function, and whether two of
    them are equal cannot be decided.
    """
    differentiate = _DIFFERENTIATE.get(op.primitive)
    rule = _traced_rule(op, differentiate) if differentiate else ()
    params = tuple((name, _frozen(value)) for name, value in sorted(op.eqn.params.items()))
    operands = tuple(
        ("literal", str(operand.val), str(operand.aval))
        if isinstance(operand, Literal)
        else str(atom.aval)
        for operand, atom in zip(op.operands, op.eqn.invars, strict=True)
    )
    results = tuple(str(var.aval) for var in op.eqn.outvars)
    return (str(op.primitive), params, rule, operands, results)


def _pushed_forward(run: Callable, floats: Sequence, tangents: Sequence) -> Sequence:
    """What a function makes of arguments and their tangents."""
    return jax.jvp(run, tuple(floats), tuple(tangents))


def _pulled_back(run: Callable, floats: Sequence, cotangents: Sequence) -> Sequence:
    """What a function makes of arguments, and of the cotangents of its results."""
    results, pull_back = jax.vjp(run, *floats)
    return results, pull_back(list(cotangents))


_DIFFERENTIATE = {
    prim.custom_jvp_call_p: _pushed_forward,
    prim.custom_vjp_call_p: _pulled_back,
}


def _traced_rule(op: Op, differentiate: Callable) -> Hashable:
    """The derivative of a call with a rule: its equations, and the arrays its rule closes over."""
    avals = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in op.eqn.invars]
    is_float = [_is_float(aval) for aval in avals]

    def derivative(floats, tangents, others):
        def run(*chosen):
            left = {True: iter(chosen), False: iter(others)}
            results = evaluate_op(op, [next(left[kind]) for kind in is_float])
            return [r for r in results if _is_float(r)]

        return differentiate(run, floats, tangents)

    floats = [aval for aval, kind in zip(avals, is_float, strict=True) if kind]
    others = [aval for aval, kind in zip(avals, is_float, strict=True) if not kind]
    results = [var.aval for var in op.eqn.outvars if _is_float(var.aval)]
    cotangents = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in results]
    tangents = floats if differentiate is _pushed_forward else cotangents
    closed = jax.make_jaxpr(derivative)(floats, tangents, others)
    arrays = [np.asarray(const) for const in closed.consts]
    return str(closed.jaxpr), tuple((str(a.dtype), a.shape, a.tobytes()) for a in arrays)


def _is_float(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _frozen(value) -> Hashable:
    """A parameter as something comparable, except for functions."""
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

    For every period the longest stretch that equals itself shifted by the period is looked up (one
    op repeated is no block, and passed over); the run that covers the most positions wins (the
    shortest period at a tie), and the search goes on left and right of it.
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
        for start, length in _true_stretches(sequence[:-period] == sequence[period:]):
            count = length // period + 1
            if count < 2 or (best is not None and count * period <= best.count * best.period):
                break
            if _has_variety(sequence[start : start + period]):
                best = Run(start, period, start + length + period)
                break
    return best


def _true_stretches(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and length of every stretch of true values, the longest first."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    lengths = edges[1::2] - edges[::2]
    for index in np.argsort(-lengths, kind="stable"):
        yield int(edges[2 * index]), int(lengths[index])


def _has_variety(period: np.ndarray) -> bool:
    """A run of one op repeated is no layer."""
    return len(np.unique(period)) > 2
