"""A region with every choice made, written out as the steps that each device takes.

    ShardedGraph ::= input specs, instructions, output specs
    instruction  ::= Move   one resharding step of a value
                   | Apply  an op on local shards, by its strategy
                   | Loop   a loop or branch, with a ShardedGraph per body

An instruction says which shards it `reads` (of literals too) and which it `makes`, in the order of its
op's operands and results. This is the list that is priced, counted and shown, and the very list that
`run_sharded` executes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jax.extend.core import Literal

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Graph, Op, Operand, Value, equal_values
from launcher.autopar.sharding.collectives import Collective, describe, of_op, of_step
from launcher.autopar.sharding.copies import Copies
from launcher.autopar.sharding.reshard import Step
from launcher.autopar.sharding.rules import Strategy
from launcher.autopar.sharding.spec import Spec, replicated
from launcher.autopar.whole_graph.control_flow import Crossing, Flow
from launcher.autopar.whole_graph.graph_problem import GraphProblem, Key
from launcher.autopar.whole_graph.regions import Nest, Region

Shard = tuple[Value, Spec]
Read = tuple[Operand, Spec]


@dataclass(frozen=True, slots=True)
class Move:
    """One resharding step of a value, and the op (None: an output) that asked for it."""

    value: Value
    step: Step
    reader: Op | None

    def reads(self) -> list[Shard]:
        return [(self.value, self.step.source)]

    def makes(self) -> list[Shard]:
        return [(self.value, self.step.target)]


@dataclass(frozen=True, slots=True)
class Apply:
    """An op on local shards."""

    op: Op
    strategy: Strategy

    def reads(self) -> list[Read]:
        return [(o, self.strategy.operand_spec(i)) for i, o in enumerate(self.op.operands)]

    def makes(self) -> list[Shard]:
        return [(v, self.strategy.result_spec(i)) for i, v in enumerate(self.op.results)]


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """A loop or branch; `specs` are those of its crossings, seen from inside."""

    op: Op
    flow: Flow
    specs: tuple[Spec, ...]
    bodies: tuple["ShardedGraph", ...]

    def reads(self) -> list[Read]:
        return [
            (self.op.operands[crossing.operand], crossing.outer_spec(spec))
            for crossing, spec in self._crossings()
            if crossing.operand is not None
        ]

    def makes(self) -> list[Shard]:
        return [
            (self.op.results[crossing.result], crossing.outer_spec(spec))
            for crossing, spec in self._crossings()
            if crossing.result is not None
        ]

    def _crossings(self) -> Iterator[tuple[Crossing, Spec]]:
        return zip(self.flow.crossings, self.specs, strict=True)


@dataclass(frozen=True, slots=True, eq=False)
class ShardedGraph:
    """What each device does, in order. Inputs that are not in `input_specs` are closed-over arrays."""

    graph: Graph
    mesh: LogicalMesh
    input_specs: Mapping[Value, Spec]
    instructions: tuple[Move | Apply | Loop, ...]
    output_specs: tuple[Spec, ...]


def write_out(
    region: Region,
    problem: GraphProblem,
    picks: Mapping[Key, object],
    input_specs: Mapping[Value, Spec],
    output_specs: tuple[Spec, ...],
) -> ShardedGraph:
    """List the instructions of a solved region."""
    writer = _Writer(region, problem, picks)
    return writer.write(input_specs, output_specs)


class _Writer:
    def __init__(self, region: Region, problem: GraphProblem, picks: Mapping[Key, object]):
        self.region, self.problem, self.picks = region, problem, picks
        self.mesh = problem.admission.mesh
        self.via = {
            value: picks[key]
            for (path, value), key in problem.copies.items()
            if path == region.path
        }
        self.copies = Copies(region.graph.avals, self.mesh)
        self.instructions: list[Move | Apply | Loop] = []

    def write(self, input_specs: Mapping[Value, Spec], output_specs: tuple[Spec, ...]):
        graph = self.region.graph
        for value in graph.inputs:
            self.copies.put(value, input_specs.get(value, replicated(self.mesh.num_axes)))
        for position, op in enumerate(graph.ops):
            self._write(self._instruction(op, self.region.leader(position)))
        for operand, spec in zip(graph.outputs, output_specs, strict=True):
            self._read(operand, spec, None)
        instructions = tuple(self.instructions)
        return ShardedGraph(graph, self.mesh, dict(input_specs), instructions, output_specs)

    def _read(self, operand: Operand, spec: Spec, reader: Op | None) -> None:
        if not isinstance(operand, Literal):
            steps = self.copies.steps(operand, spec, self.via.get(operand))
            self.instructions += [Move(operand, step, reader) for step in steps]

    def _write(self, instruction: Apply | Loop) -> None:
        for operand, spec in instruction.reads():
            self._read(operand, spec, instruction.op)
        self.instructions.append(instruction)
        for value, spec in instruction.makes():
            self.copies.put(value, spec)

    def _instruction(self, op: Op, leader: int) -> Apply | Loop:
        if leader not in self.region.nests:
            return Apply(op, self.picks["op", self.region.path, leader])
        nest = self.region.nests[leader]
        specs = tuple(
            self.picks["crossing", self.region.path, leader, number]
            for number in range(len(nest.flow.crossings))
        )
        return Loop(op, nest.flow, specs, self._bodies(nest, specs))

    def _bodies(self, nest: Nest, specs: tuple[Spec, ...]) -> tuple[ShardedGraph, ...]:
        whole = replicated(self.mesh.num_axes)
        found = []
        for number, region in enumerate(nest.bodies):
            inputs: dict[Value, Spec] = {}
            outputs: dict[int, Spec] = {}
            for crossing, spec in zip(nest.flow.crossings, specs, strict=True):
                inputs |= dict.fromkeys(
                    (region.graph.inputs[i] for i in crossing.into(number)), spec
                )
                outputs |= dict.fromkeys(crossing.out_of(number), spec)
            arrive = tuple(outputs.get(k, whole) for k in range(len(region.graph.outputs)))
            found.append(_Writer(region, self.problem, self.picks).write(inputs, arrive))
        return tuple(found)


def collectives(sharded: ShardedGraph, times: float = 1.0) -> Iterator[Collective]:
    """Every collective, in the order in which a device meets them."""
    mesh, same = sharded.mesh, equal_values(sharded.graph)
    seen: set[tuple[Operand, Step]] = set()
    for instruction in sharded.instructions:
        match instruction:
            case Move(value, step, reader) if step.kind.communicates:
                moved, dtype = (same.get(value, value), step), sharded.graph.avals[value].dtype
                place = describe(reader) if reader else "output"
                yield of_step(step, dtype, mesh, place, times=times, repeats=moved in seen)
                seen.add(moved)
            case Apply(op, strategy):
                yield from of_op(op, strategy, mesh, times=times)
            case Loop(_, flow, _, bodies):
                for body, inner in zip(flow.bodies, bodies, strict=True):
                    yield from collectives(inner, times * body.times)
