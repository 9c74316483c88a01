"""A collective as it is priced, counted and compared: one value, one mesh axis, one place in the source."""

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.sharding.reshard import Kind, Step, step_cost
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.rules.registry import source_of
from launcher.autopar.sharding.spec import num_shards


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that is priced, and runs.

    Attributes:
        kind: as HLO names it: all-gather, all-reduce, reduce-scatter, all-to-all.
        num_bytes: per device: what an all-gather ends with, what the others begin with.
        axis: the name of the mesh axis.
        dtype: as HLO names it.
        op: the op that it belongs to, with its place in the source.
        times: how often it runs, for a collective inside a loop.
        cost: of one run, in the mesh's unit.
        repeats: whether an equal value is brought to the same sharding before, as recomputation does. It
            is priced, since it is meant to run; but XLA may find out, and run it once.
    """

    kind: str
    num_bytes: int
    axis: str
    dtype: str
    op: str
    times: float
    cost: float
    repeats: bool = False


def of_step(
    step: Step, dtype, mesh: LogicalMesh, place: str, *, times: float = 1.0, repeats: bool = False
) -> Collective:
    """The collective of a resharding step that communicates."""
    return Collective(
        kind=step.kind.value,
        num_bytes=step.num_bytes,
        axis=mesh.axis_names[step.axis],
        dtype=hlo_dtype(dtype),
        op=place,
        times=times,
        cost=step_cost(step, mesh),
        repeats=repeats,
    )


def of_op(
    op: Op, strategy: Strategy, mesh: LogicalMesh, *, times: float = 1.0
) -> Iterator[Collective]:
    """The all-reduces of maxima and minima that are part of an op."""
    for axis, choice in enumerate(strategy.axes):
        for index, var in enumerate(op.eqn.outvars if choice.combine else ()):
            shards = num_shards(strategy.result_spec(index), mesh.shape)
            num_bytes = aval_bytes(var.aval) // shards
            yield Collective(
                kind=Kind.ALL_REDUCE.value,
                num_bytes=num_bytes,
                axis=mesh.axis_names[axis],
                dtype=hlo_dtype(var.aval.dtype),
                op=describe(op),
                times=times,
                cost=mesh.all_reduce(axis, num_bytes),
            )


def combine_cost(op: Op, strategy: Strategy, mesh: LogicalMesh) -> float:
    """What the all-reduces that are part of an op cost, in the mesh's unit."""
    return sum(collective.cost for collective in of_op(op, strategy, mesh))


def hlo_dtype(dtype) -> str:
    """A dtype as HLO names it: f32, bf16, s32, u8, pred."""
    special = {"bool": "pred", "bfloat16": "bf16"}
    kinds = {"f": "f", "i": "s", "u": "u", "c": "c"}
    return special.get(dtype.name) or f"{kinds[dtype.kind]}{8 * dtype.itemsize}"


def describe(op: Op) -> str:
    """An op by its primitive and its place in the source."""
    return f"{op.primitive} at {source_of(op)}"
