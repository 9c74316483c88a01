"""Loops and branches as what they are to a sharding: bodies, and the values that cross into and out of them.

    Flow ::= bodies, crossings
    Body ::= graph, times                 how often it runs
    Crossing                              one sharding, shared by everything that it joins:
        an outer operand  ->  body inputs     read once, before the loop
        body outputs      ->  the crossing    at the end of each trip
        the crossing      ->  an outer result

A `scan` has a crossing per constant, per carried value (in and out at one sharding, so that the loop can
go round), per sliced input and per stacked output. Inside, sliced and stacked values have lost their
leading dim, which is never split. A carried sum may stay partial through a `scan`: so gradients that a
loop accumulates over microbatches are reduced once, after it. A `while` loop counts as one trip, since
nobody knows how many there will be; every branch of a `cond` counts as taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

from launcher.autopar.graphs.graph import Graph, Op, Operand, flat_graph
from launcher.autopar.sharding.spec import Spec

Place = tuple[int, int]  # (body, index of an input or output)


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A graph that runs so many times."""

    graph: Graph
    times: float


@dataclass(frozen=True, slots=True)
class Crossing:
    """Values that share one sharding on the border of a loop or branch.

    Attributes:
        aval: the shape and dtype inside.
        operand, result: the outer operand and result, by position.
        inputs, outputs: the body inputs and outputs that it joins.
        stacked: outside there is a leading dim more, one element per trip.
        may_be_partial: whether it may stay an unreduced sum.
        whole: every device must hold all of it, because it decides where to go.
    """

    aval: jax.core.ShapedArray
    operand: int | None = None
    result: int | None = None
    inputs: tuple[Place, ...] = ()
    outputs: tuple[Place, ...] = ()
    stacked: bool = False
    may_be_partial: bool = False
    whole: bool = False

    def into(self, body: int) -> tuple[int, ...]:
        """The inputs of a body that it feeds."""
        return tuple(index for where, index in self.inputs if where == body)

    def out_of(self, body: int) -> tuple[int, ...]:
        """The outputs of a body that arrive at it."""
        return tuple(index for where, index in self.outputs if where == body)

    def outer_spec(self, spec: Spec) -> Spec:
        """The spec outside for one inside."""
        return tuple(entry + 1 if entry >= 0 else entry for entry in spec) if self.stacked else spec


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """The parts of a loop or branch."""

    bodies: tuple[Body, ...]
    crossings: tuple[Crossing, ...]


def is_control_flow(op: Op) -> bool:
    """Whether an op has bodies that are sharded op by op."""
    return op.primitive in _READERS


@lru_cache(maxsize=2**12)
def flow_of(op: Op) -> Flow:
    """Take a loop or branch apart."""
    return _READERS[op.primitive](op)


def _avals(op: Op) -> list[jax.core.ShapedArray]:
    return [atom.aval for atom in op.eqn.invars]


def _inner(aval: jax.core.ShapedArray) -> jax.core.ShapedArray:
    return aval.update(shape=aval.shape[1:])


def _is_sum(graph: Graph, output: int) -> bool:
    """A value that the body computes, of a type that can be summed."""
    value = graph.outputs[output]
    return not isinstance(value, Literal) and jax.numpy.issubdtype(
        graph.avals[value].dtype, jax.numpy.inexact
    )


def _starts_as_sum(operand: Operand) -> bool:
    """Zero is the sum of zeros; another constant is not a sum."""
    return not isinstance(operand, Literal) or not np.any(operand.val)


def _constants(avals: Sequence[jax.core.ShapedArray], *, first: int, body: int) -> list[Crossing]:
    """The operands, from `first` on, that are the first inputs of a body on every trip."""
    return [Crossing(aval, operand=first + k, inputs=((body, k),)) for k, aval in enumerate(avals)]


def _scan(op: Op) -> Flow:
    params, avals = op.eqn.params, _avals(op)
    graph = flat_graph(params["jaxpr"])
    consts, carried = params["num_consts"], params["num_carry"]
    crossings = _constants(avals[:consts], first=0, body=0)
    for k in range(carried):
        at = consts + k
        crossings.append(
            Crossing(
                avals[at],
                operand=at,
                result=k,
                inputs=((0, at),),
                outputs=((0, k),),
                may_be_partial=_is_sum(graph, k) and _starts_as_sum(op.operands[at]),
            )
        )
    for at in range(consts + carried, len(avals)):
        crossings.append(Crossing(_inner(avals[at]), operand=at, inputs=((0, at),), stacked=True))
    for k in range(carried, len(op.results)):
        aval = _inner(op.eqn.outvars[k].aval)
        crossings.append(
            Crossing(
                aval, result=k, outputs=((0, k),), stacked=True, may_be_partial=_is_sum(graph, k)
            )
        )
    return Flow((Body(graph, float(params["length"])),), tuple(crossings))


def _while(op: Op) -> Flow:
    params, avals = op.eqn.params, _avals(op)
    test, step = flat_graph(params["cond_jaxpr"]), flat_graph(params["body_jaxpr"])
    test_consts, step_consts = params["cond_nconsts"], params["body_nconsts"]
    carried = test_consts + step_consts
    crossings = _constants(avals[:test_consts], first=0, body=0)
    crossings += _constants(avals[test_consts:carried], first=test_consts, body=1)
    for k in range(len(op.results)):
        at = carried + k
        inputs = ((0, test_consts + k), (1, step_consts + k))
        crossings.append(
            Crossing(avals[at], operand=at, result=k, inputs=inputs, outputs=((1, k),))
        )
    predicate = params["cond_jaxpr"].out_avals[0]
    crossings.append(Crossing(predicate, outputs=((0, 0),), whole=True))
    return Flow((Body(test, 1.0), Body(step, 1.0)), tuple(crossings))


def _cond(op: Op) -> Flow:
    avals, graphs = _avals(op), [flat_graph(branch) for branch in op.eqn.params["branches"]]
    branches = range(len(graphs))
    crossings = [Crossing(avals[0], operand=0, whole=True)]
    for at in range(1, len(avals)):
        inputs = tuple((b, at - 1) for b in branches)
        crossings.append(Crossing(avals[at], operand=at, inputs=inputs))
    for k, var in enumerate(op.eqn.outvars):
        summable = all(_is_sum(graph, k) for graph in graphs)
        outputs = tuple((b, k) for b in branches)
        crossings.append(Crossing(var.aval, result=k, outputs=outputs, may_be_partial=summable))
    return Flow(tuple(Body(graph, 1.0) for graph in graphs), tuple(crossings))


_READERS: dict[object, Callable[[Op], Flow]] = {
    prim.scan_p: _scan,
    prim.while_p: _while,
    prim.cond_p: _cond,
}
