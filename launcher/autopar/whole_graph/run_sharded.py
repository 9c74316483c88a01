"""A `ShardedGraph` on one device's shards: run inside `jax.shard_map`, instruction by instruction.

Nothing is decided here. What was priced is what is written; XLA is left no sharding to choose.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Operand, Value
from launcher.autopar.sharding.rules import run_local
from launcher.autopar.sharding.shards import apply_step
from launcher.autopar.sharding.spec import PARTIAL, Spec, replicated
from launcher.autopar.whole_graph.sharded_graph import Apply, Loop, Move, ShardedGraph


def run(sharded: ShardedGraph, arguments: Sequence[jax.Array]) -> list[jax.Array]:
    """Compute the local shards of the outputs from those of the inputs, in the order of the graph."""
    shards = _Shards(sharded)
    for value, array in zip(sharded.graph.inputs, arguments, strict=False):
        shards.put(value, sharded.input_specs[value], array)
    for instruction in sharded.instructions:
        match instruction:
            case Move(value, step, _):
                shards.move(value, step)
            case Apply(op, strategy):
                operands = [shards.get(operand, spec) for operand, spec in instruction.reads()]
                shards.put_all(instruction, run_local(op, strategy, sharded.mesh, operands))
            case Loop(op):
                operands = [
                    _array(operand, shards.get(operand, spec))
                    for operand, spec in instruction.reads()
                ]
                shards.put_all(instruction, _RUNNERS[op.primitive](instruction, operands))
    outputs = zip(sharded.graph.outputs, sharded.output_specs, strict=True)
    return [shards.get(operand, spec) for operand, spec in outputs]


class _Shards:
    """The shards at hand, by value and spec."""

    def __init__(self, sharded: ShardedGraph):
        self.mesh = sharded.mesh
        self._at: dict[tuple[Value, Spec], jax.Array] = {}
        for value, array in sharded.graph.constants.items():
            self.put(value, replicated(self.mesh.num_axes), jax.numpy.asarray(array))

    def put(self, value: Value, spec: Spec, shard: jax.Array) -> None:
        self._at[value, spec] = shard

    def put_all(self, instruction: Apply | Loop, results: Sequence[jax.Array]) -> None:
        for (value, spec), shard in zip(instruction.makes(), results, strict=True):
            self.put(value, spec, shard)

    def move(self, value: Value, step) -> None:
        self._at[value, step.target] = apply_step(step, self._at[value, step.source], self.mesh)

    def get(self, operand: Operand, spec: Spec):
        if isinstance(operand, Literal):
            assert PARTIAL not in spec or not np.any(operand.val)
            return operand.val
        return self._at[operand, spec]


def _run_scan(loop: Loop, operands: Sequence[jax.Array]) -> list[jax.Array]:
    params = loop.op.eqn.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    (body,) = loop.bodies
    consts, carried, sliced = operands[:first], operands[first:last], operands[last:]

    def trip(carry, slices):
        outputs = _typed(body, run(body, [*consts, *carry, *slices]))
        return outputs[: len(carry)], outputs[len(carry) :]

    carry, stacked = lax.scan(
        trip, list(carried), sliced, length=params["length"],
        reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *stacked]


def _typed(body: ShardedGraph, outputs: Sequence) -> list[jax.Array]:
    return [
        _array(operand, output) for operand, output in zip(body.graph.outputs, outputs, strict=True)
    ]


def _array(operand: Operand, value) -> jax.Array:
    """A literal's value in its own type; anything else is an array already."""
    is_literal = isinstance(operand, Literal)
    return jax.numpy.asarray(value, operand.aval.dtype) if is_literal else value


def _run_while(loop: Loop, operands: Sequence[jax.Array]) -> list[jax.Array]:
    params = loop.op.eqn.params
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    test, step = loop.bodies
    return lax.while_loop(
        lambda carry: run(test, [*operands[:first], *carry])[0],
        lambda carry: _typed(step, run(step, [*operands[first:last], *carry])),
        list(operands[last:]),
    )


def _run_cond(loop: Loop, operands: Sequence[jax.Array]) -> list[jax.Array]:
    index, *rest = operands
    branches = [_branch(body) for body in loop.bodies]
    return lax.switch(index, branches, *rest)


def _branch(body: ShardedGraph):
    return lambda *arguments: _typed(body, run(body, arguments))


_RUNNERS: Mapping[object, object] = {
    prim.scan_p: _run_scan,
    prim.while_p: _run_while,
    prim.cond_p: _run_cond,
}
