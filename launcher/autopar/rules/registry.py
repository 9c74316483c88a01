"""Sharding rules: which ways a primitive may be computed along one mesh axis, and how it runs locally.

A rule is one function `choices(op) -> AxisStrategy, ...`. Each choice says, for ONE mesh axis, what the
axis does to every operand and result (an entry as in `spec`); computing the op on the local shards of
those operands must then yield the local shards of those results. Strategies over several axes are all
combinations that divide evenly. "Replicated" is always a choice and is added here.

To add a rule:

    @rule(my_primitive_p)
    def my_choices(op):
        yield AxisStrategy(operands=(0, REPLICATED), results=(0,))    # splits dim 0

and, where the op cannot simply be bound again on local shards (its parameters hold shapes, or it needs to
know which shard it has), `@local(my_primitive_p)` with a function
`(op, strategy, mesh, values) -> results` that runs inside `jax.shard_map`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
from jax.extend import core
from jax.extend.core import Literal

from launcher.autopar.graph import Op, evaluate_op
from launcher.autopar.mesh import LogicalMesh
from launcher.autopar.spec import REPLICATED, Shape, Spec, fits, local_shape
from launcher.errors import UnsupportedPrimitiveError


@dataclass(frozen=True, slots=True)
class AxisStrategy:
    """What one mesh axis does to the operands and results of an op.

    `combine` names a reduction other than a sum ("max", "min") that must follow along the axis.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    combine: str | None = None

    @property
    def divides_work(self) -> bool:
        return any(entry >= 0 for entry in (*self.operands, *self.results))


@dataclass(frozen=True, slots=True)
class Strategy:
    """One sharding choice for one op: an `AxisStrategy` per mesh axis."""

    axes: tuple[AxisStrategy, ...]

    def operand_spec(self, index: int) -> Spec:
        return tuple(axis.operands[index] for axis in self.axes)

    def result_spec(self, index: int) -> Spec:
        return tuple(axis.results[index] for axis in self.axes)

    def work_division(self, mesh_shape: Shape) -> int:
        """By how much each device's share of the work shrinks."""
        pairs = zip(self.axes, mesh_shape, strict=True)
        divisions = [size for axis, size in pairs if axis.divides_work]
        return math.prod(divisions)


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


def local(*primitives: core.Primitive) -> Callable[[Local], Local]:
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
        raise UnsupportedPrimitiveError(
            f"the model uses the JAX primitive '{op.primitive}' "
            f"({source_of(op)}), which has no sharding rule; "
            f"add one as launcher/autopar/rules/registry.py describes, or rewrite the op"
        )
    replicated = AxisStrategy(
        operands=(REPLICATED,) * len(op.operands), results=(REPLICATED,) * len(op.results)
    )
    return tuple(dict.fromkeys((replicated, *choices(op))))


def source_of(op: Op) -> str:
    """Where in the model's source an op comes from, as `file:line (function)`."""
    frame = op.eqn.source_info.traceback and next(
        (
            frame
            for frame in op.eqn.source_info.traceback.frames
            if "/jax/" not in frame.file_name and "/flax/" not in frame.file_name
        ),
        None,
    )
    return (
        f"{frame.file_name}:{frame.line_num} ({frame.function_name})" if frame else "source unknown"
    )


def strategies(
    op: Op, shapes: "OpShapes", mesh_shape: Shape, allowed: Sequence[Sequence[AxisStrategy]]
) -> tuple[Strategy, ...]:
    """All combinations of one allowed choice per axis whose splits divide evenly."""
    found = []
    for axes in itertools.product(*allowed):
        strategy = Strategy(axes)
        operand_fit = all(
            fits(strategy.operand_spec(i), shape, mesh_shape)
            for i, shape in enumerate(shapes.operands)
        )
        if operand_fit and all(
            fits(strategy.result_spec(i), shape, mesh_shape)
            for i, shape in enumerate(shapes.results)
        ):
            found.append(strategy)
    return tuple(found)


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


def is_scalar_literal(op: Op, index: int) -> bool:
    return isinstance(op.operands[index], Literal)


def run_local(
    op: Op, strategy: Strategy, mesh: LogicalMesh, values: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Compute an op on local shards, inside `jax.shard_map`, with the reductions its strategy asks for."""
    run = _LOCAL.get(str(op.primitive))
    results = run(op, strategy, mesh, values) if run else evaluate_op(op, values)
    return tuple(_combine(result, strategy, mesh) for result in results)


def _combine(result: jax.Array, strategy: Strategy, mesh: LogicalMesh) -> jax.Array:
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
