"""Sharding rules: which ways a primitive may be computed along one mesh axis, and how it runs locally.

A rule is one function `choices(op) -> AxisStrategy, ...`. Each choice says, for ONE mesh axis, what the
axis does to every operand and result (an entry as in `spec`); computing the op on the local shards of
those operands must then yield the local shards of those results. Strategies over several axes are all
combinations that divide evenly. What holds for every op is seen to here: "replicated" is always a choice;
a literal is whole, or zero; truth values and random keys are no sums, and keys are never split.

Where an op cannot simply be bound again on local shards (its parameters hold shapes, or it needs to know
which shard it has), a `@local` function `(op, strategy, mesh, values) -> results` runs it inside
`jax.shard_map`. docs/rules.md shows how to add a rule.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import Literal

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op, evaluate_op
from launcher.autopar.sharding.rules.unsupported import REASONS
from launcher.autopar.sharding.spec import PARTIAL, REPLICATED, Shape, Spec, fits, local_shape
from launcher.errors import UnsupportedPrimitiveError


@dataclass(frozen=True, slots=True)
class AxisStrategy:
    """What one mesh axis does to the operands and results of an op.

    Attributes:
        combine: a reduction other than a sum ("max", "min") that must follow along the axis.
        pieces: into how many pieces that no shard may cut the split dims fall (the groups of a
            convolution, the repeats of a tile); 0 where every element is one.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    combine: str | None = None
    pieces: int = 0

    @property
    def divides_work(self) -> bool:
        return any(entry >= 0 for entry in (*self.operands, *self.results))


@dataclass(frozen=True, slots=True)
class Strategy:
    """One sharding choice for one op: an `AxisStrategy` per mesh axis."""

    axes: tuple[AxisStrategy, ...]

    def operand_spec(self, index: int) -> Spec:
        return tuple([axis.operands[index] for axis in self.axes])

    def result_spec(self, index: int) -> Spec:
        return tuple([axis.results[index] for axis in self.axes])

    def work_division(self, mesh_shape: Shape) -> int:
        """By how much each device's share of the work shrinks."""
        pairs = zip(self.axes, mesh_shape, strict=True)
        divisions = [size for axis, size in pairs if axis.divides_work]
        return math.prod(divisions)

    def pieces_division(self, mesh_shape: Shape, choice: AxisStrategy) -> int:
        """Among how many devices the pieces of a choice are shared out."""
        pairs = zip(self.axes, mesh_shape, strict=True)
        return math.prod(size for axis, size in pairs if axis == choice)


Choices = Callable[[Op], Iterable[AxisStrategy]]
Local = Callable[[Op, Strategy, LogicalMesh, Sequence[jax.Array]], Sequence[jax.Array]]

# Keyed by name, because not every primitive of JAX can be imported.
_CHOICES: dict[str, Choices] = {}
_LOCAL: dict[str, Local] = {}


def rule(*primitives: core.Primitive | str) -> Callable[[Choices], Choices]:
    """Register the choices of some primitives."""

    def register(choices: Choices) -> Choices:
        _CHOICES.update(dict.fromkeys(map(str, primitives), choices))
        return choices

    return register


def local(*primitives: core.Primitive | str) -> Callable[[Local], Local]:
    """Register how some primitives run on local shards."""

    def register(run: Local) -> Local:
        _LOCAL.update(dict.fromkeys(map(str, primitives), run))
        return run

    return register


@lru_cache(maxsize=2**16)
def axis_choices(op: Op) -> tuple[AxisStrategy, ...]:
    """All choices of an op along one axis, replicated first, without repetitions."""
    choices = _CHOICES.get(str(op.primitive))
    if choices is None:
        reason = REASONS.get(str(op.primitive), "")
        raise UnsupportedPrimitiveError(
            f"the model uses the JAX primitive '{op.primitive}' ({source_of(op)}), which has no sharding "
            f"rule{reason and f': {reason}'}; add one as docs/rules.md describes, or rewrite the op"
        )
    replicated = AxisStrategy(
        operands=(REPLICATED,) * len(op.operands), results=(REPLICATED,) * len(op.results)
    )
    offered = (_with_plain_entries(choice) for choice in choices(op))
    return tuple(dict.fromkeys((replicated, *(c for c in offered if _is_possible(op, c)))))


def _with_plain_entries(choice: AxisStrategy) -> AxisStrategy:
    """Parameters of some primitives hold NumPy's integers, which print and serialise differently."""
    if all(type(entry) is int for entry in (*choice.operands, *choice.results)):
        return choice
    operands, results = map(int, choice.operands), map(int, choice.results)
    return replace(choice, operands=tuple(operands), results=tuple(results))


def _is_possible(op: Op, choice: AxisStrategy) -> bool:
    """Whether the values can be what the choice asks for, whatever the op."""
    literals = zip(op.operands, choice.operands, strict=True)
    if not all(_fits_literal(o, entry) for o, entry in literals if isinstance(o, Literal)):
        return False
    atoms = (*op.eqn.invars, *op.eqn.outvars)
    entries = zip(atoms, (*choice.operands, *choice.results), strict=True)
    return all(_suits(entry, atom.aval.dtype) for atom, entry in entries)


def _fits_literal(literal: Literal, entry: int) -> bool:
    """Every device has the same literal: it is whole, or a summand if it is zero."""
    return entry == REPLICATED or (entry == PARTIAL and not np.any(literal.val))


def _suits(entry: int, dtype) -> bool:
    """Sums need numbers of 16 bits or more, or integers (their sums wrap around alike); keys stay whole."""
    if entry == PARTIAL:
        if jnp.issubdtype(dtype, jnp.inexact):
            return jnp.finfo(dtype).bits >= 16
        return jnp.issubdtype(dtype, jnp.integer)
    return entry == REPLICATED or not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


# Code that stands between a model and its ops.
_LIBRARIES = tuple(
    f"{pathlib.Path(jax.__file__).parents[1] / name}{os.sep}" for name in ("jax", "flax", "optax")
)


def source_of(op: Op) -> str:
    """Where in the model's source an op comes from, as `file:line (function)`."""
    traceback = op.eqn.source_info.traceback
    frames = traceback.frames if traceback else ()
    for frame in frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return "source unknown"


def strategies(
    op: Op, shapes: "OpShapes", mesh_shape: Shape, allowed: Sequence[Sequence[AxisStrategy]]
) -> tuple[Strategy, ...]:
    """All combinations of one allowed choice per axis whose splits divide evenly."""
    del op  # alike ops of other layers have the same shapes and choices, and share the answer
    return _combinations(shapes, tuple(mesh_shape), tuple(tuple(choices) for choices in allowed))


@lru_cache(maxsize=2**14)
def _combinations(
    shapes: "OpShapes", mesh_shape: Shape, allowed: tuple[tuple[AxisStrategy, ...], ...]
) -> tuple[Strategy, ...]:
    """What does not fit along one axis alone fits in no combination."""
    fitting = [
        [choice for choice in choices if divides_evenly(Strategy((choice,)), shapes, (size,))]
        for choices, size in zip(allowed, mesh_shape, strict=True)
    ]
    found = map(Strategy, itertools.product(*fitting))
    return tuple(strategy for strategy in found if divides_evenly(strategy, shapes, mesh_shape))


def divides_evenly(strategy: Strategy, shapes: "OpShapes", mesh_shape: Shape) -> bool:
    """Whether every dim that axes split, and the pieces in it, are divided evenly."""
    return (
        all(
            fits(strategy.operand_spec(i), shape, mesh_shape)
            for i, shape in enumerate(shapes.operands)
        )
        and all(
            fits(strategy.result_spec(i), shape, mesh_shape)
            for i, shape in enumerate(shapes.results)
        )
        and all(
            axis.pieces % strategy.pieces_division(mesh_shape, axis) == 0
            for axis in strategy.axes
            if axis.pieces
        )
    )


@dataclass(frozen=True, slots=True)
class OpShapes:
    """The global shapes of an op's operands and results."""

    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


def shapes_of(op: Op) -> OpShapes:
    """Read the shapes off an op's equation."""
    return OpShapes(
        tuple(atom.aval.shape for atom in op.eqn.invars),
        tuple(atom.aval.shape for atom in op.eqn.outvars),
    )


def operand_rank(op: Op, index: int) -> int:
    return len(op.eqn.invars[index].aval.shape)


def run_local(
    op: Op, strategy: Strategy, mesh: LogicalMesh, values: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Compute an op on local shards, inside `jax.shard_map`, with the reductions its strategy asks for."""
    run = _LOCAL.get(str(op.primitive))
    results = run(op, strategy, mesh, values) if run else evaluate_op(op, values)
    return tuple(_combine(result, strategy, mesh) for result in results)


def _combine(result: jax.Array, strategy: Strategy, mesh: LogicalMesh) -> jax.Array:
    """The reductions that follow; the maximum of truth values is their "or", the minimum their "and"."""
    for axis, name in zip(strategy.axes, mesh.axis_names, strict=True):
        if axis.combine == "max":
            result = jax.lax.pmax(result, name)
        elif axis.combine == "min":
            result = jax.lax.pmin(result, name)
    return result


def local_result_shape(op: Op, strategy: Strategy, mesh: LogicalMesh, index: int = 0) -> Shape:
    """The shape of one device's shard of a result."""
    return local_shape(strategy.result_spec(index), op.eqn.outvars[index].aval.shape, mesh.shape)


def shard_index(spec: Spec, dim: int, mesh: LogicalMesh) -> jax.Array:
    """Which shard of a dim this device holds, counted in shards; inside `jax.shard_map`."""
    index = 0
    for entry, name, size in zip(spec, mesh.axis_names, mesh.shape, strict=True):
        if entry == dim:
            index = index * size + jax.lax.axis_index(name)
    return index


def bind_with(op: Op, values: Sequence[jax.Array], **changed) -> tuple[jax.Array, ...]:
    """Apply an op with some of its parameters changed."""
    params = op.primitive.get_bind_params(op.eqn.params) | changed
    results = op.primitive.bind(*values, **params)
    return tuple(results) if op.primitive.multiple_results else (results,)
