"""A flat dataflow graph of ops: what every planner pass and the emitter read.

A `Graph` is a jaxpr with its nested `jit` calls inlined and its variables numbered:

    Graph   ::= inputs, ops in execution order, outputs
    Op      ::= equation, operands, results
    operand ::= value id (an int) | Literal (a scalar known at trace time)

Numbers instead of variables make it cheap to cut a graph, to hash a piece of it and to compare two
pieces. Arrays that the traced function closed over are inputs like any other; `Graph.constants` holds
their values. `check` runs after every construction.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.extend import core
from jax.extend.core import Literal
from jax.extend.core import primitives as prim

Value = int
Operand = Value | Literal

CALLS = frozenset({prim.jit_p, prim.closed_call_p})
# After differentiation nothing needs its custom rule any more, so everything can be inlined.
CUSTOM_CALLS = frozenset({prim.custom_jvp_call_p, prim.custom_vjp_call_p, prim.remat_p})


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One equation, with numbered operands and results; equal only to itself."""

    eqn: core.JaxprEqn
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]

    @property
    def primitive(self) -> core.Primitive:
        return self.eqn.primitive

    @property
    def values(self) -> tuple[Value, ...]:
        """The operands that are values, literals left out."""
        return tuple(operand for operand in self.operands if not isinstance(operand, Literal))


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in execution order; `avals[v]` is the shape and dtype of value `v`."""

    avals: tuple[jax.core.ShapedArray, ...]
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Operand, ...]
    constants: Mapping[Value, jax.Array]

    def check(self) -> "Graph":
        """Every value is defined once, before it is used."""
        defined = set(self.inputs)
        assert len(defined) == len(self.inputs)
        for op in self.ops:
            assert defined.issuperset(op.values), op.eqn
            assert defined.isdisjoint(op.results), op.eqn
            defined.update(op.results)
        assert defined.issuperset(v for v in self.outputs if not isinstance(v, Literal))
        return self


def trace(function: Callable, *abstract_args) -> tuple[Graph, jax.tree_util.PyTreeDef]:
    """Trace `function` into a graph; also return the tree structure of its result.

    Custom derivative rules stay calls of their own, so that the graph can still be differentiated.
    Inputs are the flattened arguments, followed by the closed-over arrays.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*abstract_args)
    return from_jaxpr(closed, inline=CALLS), jax.tree.structure(shape)


def from_jaxpr(
    closed: core.ClosedJaxpr, *, inline: frozenset[core.Primitive], barriers: bool = False
) -> Graph:
    """Number the variables of a jaxpr, inlining the calls of the given primitives.

    With `barriers`, what an inlined recomputation (`jax.checkpoint`) reads passes a barrier first, as JAX
    does it, so that the compiler does not find out that it has computed it before.
    """
    builder = _Builder(inline, barriers)
    jaxpr = closed.jaxpr
    inputs = tuple(builder.new(var.aval) for var in jaxpr.invars)
    constant_values = tuple(builder.new(var.aval) for var in jaxpr.constvars)
    constants = dict(zip(constant_values, closed.consts, strict=True))
    outputs = builder.run(jaxpr, (*constant_values, *inputs))
    constants |= builder.constants
    return Graph(
        avals=tuple(builder.avals),
        inputs=(*inputs, *constants),
        ops=tuple(builder.ops),
        outputs=outputs,
        constants=constants,
    ).check()


def flat_graph(closed: core.ClosedJaxpr) -> Graph:
    """A jaxpr as it is sharded: every call inlined, and nothing computed twice or for nobody.

    What `jax.checkpoint` recomputes stays recomputed.
    """
    graph = from_jaxpr(closed, inline=CALLS | CUSTOM_CALLS, barriers=True)
    return eliminate_dead_code(eliminate_common_ops(graph))


class _Builder:
    """Collects ops while walking nested jaxprs."""

    def __init__(self, inline: frozenset[core.Primitive], barriers: bool):
        self.inline, self.barriers = inline, barriers
        self.avals: list[jax.core.ShapedArray] = []
        self.ops: list[Op] = []
        self.constants: dict[Value, jax.Array] = {}

    def new(self, aval: jax.core.ShapedArray) -> Value:
        self.avals.append(aval)
        return len(self.avals) - 1

    def run(self, jaxpr: core.Jaxpr, arguments: Sequence[Operand]) -> tuple[Operand, ...]:
        env: dict[core.Var, Operand] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True)
        )

        def read(atom: core.Var | Literal) -> Operand:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(atom) for atom in eqn.invars)
            if eqn.primitive in self.inline:
                inner, consts = _body(eqn)
                if self.barriers and _recomputes(eqn):
                    operands = tuple(self.behind_barrier(operand) for operand in operands)
                results = self.run(inner, (*self.constant_values(inner, consts), *operands))
            else:
                results = tuple(self.new(var.aval) for var in eqn.outvars)
                self.ops.append(Op(eqn, operands, results))
            env.update(zip(eqn.outvars, results, strict=True))
        return tuple(read(atom) for atom in jaxpr.outvars)

    def behind_barrier(self, operand: Operand) -> Operand:
        """The operand again, as a value that the compiler does not see through."""
        if isinstance(operand, Literal):
            return operand
        closed = jax.make_jaxpr(jax.lax.optimization_barrier)(self.avals[operand])
        result = self.new(self.avals[operand])
        self.ops.append(Op(closed.eqns[0], (operand,), (result,)))
        return result

    def constant_values(self, jaxpr: core.Jaxpr, consts: Sequence[jax.Array]) -> list[Value]:
        values = [self.new(var.aval) for var in jaxpr.constvars]
        self.constants |= dict(zip(values, consts, strict=True))
        return values


def _recomputes(eqn: core.JaxprEqn) -> bool:
    """Whether a call is a checkpointed function's recomputation, to be kept apart from the original."""
    return (
        eqn.primitive is prim.remat_p and eqn.params["differentiated"] and eqn.params["prevent_cse"]
    )


def _body(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[jax.Array]]:
    """The jaxpr that a call runs, and the arrays it closed over."""
    match eqn.primitive:
        case prim.jit_p:
            body = eqn.params["jaxpr"]
        case prim.remat_p:
            return eqn.params["jaxpr"], ()
        case _:
            body = eqn.params["call_jaxpr"]
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def evaluate_op(op: Op, values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Apply one op as traced."""
    results = op.primitive.bind(*values, **op.primitive.get_bind_params(op.eqn.params))
    return tuple(results) if op.primitive.multiple_results else (results,)


def evaluate(
    graph: Graph, arguments: Sequence[jax.Array],
    revise: Callable[[Value, jax.Array], jax.Array] = lambda value, array: array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Run a graph, op by op; `arguments` in the order of `graph.inputs`.

    `revise` gets every result, and says what those read that read it.
    """
    env = dict(zip(graph.inputs, arguments, strict=True))

    def read(operand: Operand):
        return operand.val if isinstance(operand, Literal) else env[operand]

    for op in graph.ops:
        results = evaluate_op(op, [read(operand) for operand in op.operands])
        env |= {v: revise(v, array) for v, array in zip(op.results, results, strict=True)}
    return tuple(read(operand) for operand in graph.outputs)


def live_ops(ops: Sequence[Op], wanted: Iterable[Operand]) -> tuple[Op, ...]:
    """The ops that the wanted values need (dead-code elimination)."""
    needed = {operand for operand in wanted if not isinstance(operand, Literal)}
    kept = []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.values)
            kept.append(op)
    return tuple(reversed(kept))


def eliminate_dead_code(graph: Graph) -> Graph:
    """Drop the ops that no output needs; inputs stay, used or not."""
    ops = live_ops(graph.ops, graph.outputs)
    return Graph(graph.avals, graph.inputs, ops, graph.outputs, graph.constants)


def eliminate_common_ops(graph: Graph) -> Graph:
    """Compute what is computed twice from the same values once, as XLA does; barriers stay apart."""
    same = _first_equals(graph, barriers_are_opaque=True)

    def first(operands: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(o if isinstance(o, Literal) else same.get(o, o) for o in operands)

    ops = tuple(
        Op(op.eqn, first(op.operands), op.results)
        for op in graph.ops
        if not op.results or op.results[0] not in same
    )
    return Graph(graph.avals, graph.inputs, ops, first(graph.outputs), graph.constants).check()


def equal_values(graph: Graph) -> dict[Value, Value]:
    """Value -> the first value that equals it, for those that recompute an earlier one."""
    return _first_equals(graph, barriers_are_opaque=False)


def _first_equals(graph: Graph, *, barriers_are_opaque: bool) -> dict[Value, Value]:
    known: dict[Hashable, tuple[Value, ...]] = {}
    same: dict[Value, Value] = {}
    for op in graph.ops:
        operands = tuple(o if isinstance(o, Literal) else same.get(o, o) for o in op.operands)
        if op.primitive is jax.lax.optimization_barrier_p:
            if not barriers_are_opaque:
                same |= dict(zip(op.results, operands, strict=True))
            continue
        first = known.setdefault(_computation(op, operands), op.results)
        if first is not op.results:
            same |= dict(zip(op.results, first, strict=True))
    return same


def _computation(op: Op, operands: Sequence[Operand]) -> Hashable:
    """Equal for two ops that compute the same."""
    if op.eqn.effects:
        return id(op)
    read = tuple((str(o.val), str(o.aval)) if isinstance(o, Literal) else o for o in operands)
    params = tuple(
        (name, value if isinstance(value, Hashable) else id(value))
        for name, value in sorted(op.eqn.params.items())
    )
    return op.primitive, read, params, tuple(str(var.aval) for var in op.eqn.outvars)


def used_values(ops: Sequence[Op]) -> set[Value]:
    """All values that some op reads."""
    return {value for op in ops for value in op.values}


def subgraph(graph: Graph, ops: Sequence[Op], outputs: Sequence[Value]) -> Graph:
    """A piece of a graph; its inputs are the values it reads and does not compute, in first-use order."""
    produced = {value for op in ops for value in op.results}
    read = dict.fromkeys(value for op in ops for value in op.values if value not in produced)
    read |= dict.fromkeys(value for value in outputs if value not in produced)
    constants = {value: graph.constants[value] for value in read if value in graph.constants}
    return Graph(graph.avals, tuple(read), tuple(ops), tuple(outputs), constants)


def renumber(graph: Graph) -> Graph:
    """Number the values of a graph densely: inputs first, then results in order."""
    number: dict[Value, Value] = {}
    for value in (*graph.inputs, *(result for op in graph.ops for result in op.results)):
        number[value] = len(number)

    def renamed(operands: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(o if isinstance(o, Literal) else number[o] for o in operands)

    ops = tuple(Op(op.eqn, renamed(op.operands), renamed(op.results)) for op in graph.ops)
    return Graph(
        avals=tuple(graph.avals[value] for value in number),
        inputs=renamed(graph.inputs),
        ops=ops,
        outputs=renamed(graph.outputs),
        constants={number[v]: array for v, array in graph.constants.items()},
    ).check()
