"""A whole graph as a pairwise problem: what `auto_shard` solves (Alpa, section 4.2).

Nodes and what they choose, all of them folded over repeated blocks:

    op         the strategy of an op
    crossing   the spec of a value on the border of a loop or branch, seen from inside
    copy       the spec that a value with several readers is brought to before they are served
    input      where an input lies; output, where a result is left (both named by the caller)

An edge prices the resharding between what one node yields and what the next one reads. Copies make a
resharding that several readers share cost once, where each reader then pays only for what sets it apart.
Left out: readers that would each like a shard made for another reader on another way (the copy is one).

The objective is communication alone, in the mesh's unit. Computation enters in one of two ways: given a
`ComputeModel`, as its seconds; otherwise as Alpa has it, by admitting for matrix products and
convolutions only the strategies that divide the work the most. Ties go to fewer collectives, then to less
work per device.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.extend.core import Literal

from launcher.autopar.clusters.collective_costs import TieBreaking
from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.work import aval_bytes, op_flops, result_bytes
from launcher.autopar.sharding.collectives import combine_cost
from launcher.autopar.sharding.ports import Port
from launcher.autopar.sharding.reshard import reshard_costs
from launcher.autopar.sharding.restrictions import ClassTags, Restrictions
from launcher.autopar.sharding.rules import Strategy, axis_choices, shapes_of, strategies
from launcher.autopar.sharding.spec import Spec, all_specs, num_shards, replicated
from launcher.autopar.solver import PairwiseProblem
from launcher.autopar.whole_graph.regions import Nest, Region

Key = Hashable
_TIE_FRACTION = 1e-6  # of the dearest collective: what one more collective is charged to break ties


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What ops may choose.

    Attributes:
        restrictions, tags: the axes that are held to the batch, if any, and the batch dims of the values.
        dim_over_axes: whether one dim may be split over several axes.
        compute: prices computation; None admits only the strategies that divide heavy ops the most.
    """

    mesh: LogicalMesh
    dim_over_axes: bool = True
    restrictions: Restrictions = Restrictions(frozenset())
    tags: Mapping[tuple[int, ...], ClassTags] = field(default_factory=dict)
    compute: ComputeModel | None = None

    def specs(self, aval, *, partial: bool = False) -> tuple[Spec, ...]:
        """Every spec of a value that may be chosen."""
        found = all_specs(aval.shape, self.mesh.shape, partial=partial)
        return found if self.dim_over_axes else tuple(filter(_splits_dims_once, found))

    def strategies(self, op: Op, path: tuple[int, ...]) -> tuple[Strategy, ...]:
        """Every strategy of an op that may be chosen."""
        shape, free = self.mesh.shape, axis_choices(op)
        allowed: Sequence = [free] * len(shape)
        if self.restrictions.batch_axes and self._meets_batch(op, path):
            allowed = self.restrictions.op_choices(op, self.tags[path], len(shape))
        allowed = [c if n > 1 else free[:1] for c, n in zip(allowed, shape, strict=True)]
        found = strategies(op, shapes_of(op), shape, allowed)
        found = found or strategies(op, shapes_of(op), shape, [(*c, free[0]) for c in allowed])
        if not self.dim_over_axes:
            found = tuple(filter(_strategy_splits_dims_once, found))
        if self.compute is None and op_flops(op):
            most = max(strategy.work_division(shape) for strategy in found)
            found = tuple(s for s in found if s.work_division(shape) == most)
        return found

    def _meets_batch(self, op: Op, path: tuple[int, ...]) -> bool:
        """Ops that see no batch, such as the optimizer's, are free."""
        tags = self.tags.get(path)
        return tags is not None and any(v in tags.batch for v in (*op.values, *op.results))


def _splits_dims_once(spec: Spec) -> bool:
    dims = [entry for entry in spec if entry >= 0]
    return len(set(dims)) == len(dims)


def _strategy_splits_dims_once(strategy: Strategy) -> bool:
    operands = range(len(strategy.axes[0].operands))
    results = range(len(strategy.axes[0].results))
    return all(_splits_dims_once(strategy.operand_spec(i)) for i in operands) and all(
        _splits_dims_once(strategy.result_spec(i)) for i in results
    )


class GraphProblem:
    """The nodes and edges of a region and all that is nested in it.

    Attributes:
        choices: node -> what it chooses from.
        copies: (path, value) -> the copy node of a value with several readers.
    """

    def __init__(self, region: Region, admission: Admission):
        self.region, self.admission = region, admission
        self.choices: dict[Key, tuple] = {}
        self.copies: dict[tuple[tuple[int, ...], Value], Key] = {}
        self._node_costs: dict[Key, np.ndarray] = {}
        self._edge_costs: dict[tuple[Key, Key], np.ndarray] = {}
        self._holders: dict[Value, tuple[Port, ...]] = {}
        self._mesh = _with_ties_broken(admission.mesh, region)
        self._work_tie = _TIE_FRACTION * _dearest(admission.mesh, region) / _total_work(region)

    def add_node(self, key: Key, choices: tuple, costs: np.ndarray | float = 0.0) -> None:
        """A node is added once; its costs add up."""
        self.choices.setdefault(key, choices)
        known = self._node_costs.get(key, np.zeros(len(choices)))
        self._node_costs[key] = known + costs

    def add_spec_node(self, key: Key, specs: Iterable[Spec], index: int = 0) -> Port:
        """A node that chooses a spec."""
        self.add_node(key, tuple(specs))
        return Port(key, self.choices[key], index)

    def prefer_small(self, port: Port, aval) -> None:
        """Of two equal places for a value, the one that holds less."""
        shards = [num_shards(spec, self._mesh.shape) for spec in port.specs]
        self.add_node(port.key, port.specs, self._work_tie * aval_bytes(aval) / np.array(shards))

    def connect(self, source: Port, target: Port, aval, times: float) -> None:
        """Price the resharding of a value from one node to another."""
        costs = reshard_costs(aval.shape, aval.dtype.itemsize, self._mesh)
        rows = [costs.number[spec] for spec in source.specs]
        columns = [costs.number[spec] for spec in target.specs]
        matrix = times * costs.between[np.ix_(rows, columns)]
        if source.key == target.key:
            self._node_costs[source.key] = self._node_costs[source.key] + np.diagonal(matrix)
            return
        pair = (source.key, target.key)
        if pair[::-1] in self._edge_costs:
            pair, matrix = pair[::-1], matrix.T
        self._edge_costs[pair] = self._edge_costs.get(pair, 0.0) + matrix

    def add_op(self, key: Key, op: Op, path: tuple[int, ...], times: float) -> None:
        """The node of an op, with its own collectives and its computation."""
        mesh, found = self._mesh, self.admission.strategies(op, path)
        division = np.array([strategy.work_division(mesh.shape) for strategy in found])
        work = self._work_tie * result_bytes(op) / division
        if self.admission.compute is not None:
            work = work + self.admission.compute.op_s(op, division)
        combine = [combine_cost(op, strategy, mesh) for strategy in found]
        self.add_node(key, found, times * (work + combine))

    def add_region(
        self,
        region: Region,
        inputs: Mapping[Value, Port],
        outputs: Mapping[int, Port],
        times: float = 1.0,
    ) -> None:
        """Add all nodes of a region.

        Args:
            inputs: value -> where it comes from; others are closed-over arrays, which are whole.
            outputs: position in the region's outputs -> where it must arrive.
        """
        builder = _RegionBuilder(self, region, inputs, times)
        builder.build(outputs)
        if not region.path:
            self._holders = builder.holders()

    def holders(self, value: Value) -> tuple[Port, ...]:
        """The nodes that say how much of a value of the outermost graph a device holds."""
        return self._holders[value]

    def pairwise(self, pins: Mapping[Key, object] | None = None):
        """The problem for the solver, and which node is which.

        `pins` holds nodes to one of their choices.
        """
        pins, keys = pins or {}, tuple(self.choices)
        number = {key: i for i, key in enumerate(keys)}
        node_costs = []
        for key in keys:
            costs = self._node_costs[key]
            if key in pins:
                held = [choice == pins[key] for choice in self.choices[key]]
                costs = np.where(held, costs, np.inf)
            node_costs.append(costs)
        edge_costs: dict[tuple[int, int], np.ndarray] = {}
        for (source, target), matrix in self._edge_costs.items():
            i, j = number[source], number[target]
            edge_costs[min(i, j), max(i, j)] = matrix if i < j else matrix.T
        return PairwiseProblem(tuple(node_costs), edge_costs), keys


class _RegionBuilder:
    """Adds one region: the ops in order, then the edges from every value to its readers."""

    def __init__(self, problem: GraphProblem, region: Region, inputs, times: float):
        self.problem, self.region, self.times = problem, region, times
        self.ports: dict[Value, Port] = dict(inputs)
        self.readers: dict[Value, dict[tuple[Key, int], Port]] = {}
        self.results: set[tuple[Key, int]] = set()
        num_axes = problem.admission.mesh.num_axes
        for value in region.graph.inputs:
            if value not in self.ports:
                key = ("constant", region.path, value)
                self.ports[value] = problem.add_spec_node(key, [replicated(num_axes)])

    def build(self, outputs: Mapping[int, Port]) -> None:
        for position, op in enumerate(self.region.graph.ops):
            leader = self.region.leader(position)
            if leader in self.region.nests:
                self._add_flow(op, position, leader)
            else:
                self._add_op(op, position, leader)
        self.results = {port.name for port in outputs.values()}
        for index, target in outputs.items():
            self._read(self.region.graph.outputs[index], target)
        self._connect()

    def holders(self) -> dict[Value, tuple[Port, ...]]:
        """Value -> where it is produced, its copy if it has one, and where it must arrive as a result."""
        found: dict[Value, tuple[Port, ...]] = {v: (port,) for v, port in self.ports.items()}
        for value, readers in self.readers.items():
            key = self.problem.copies.get((self.region.path, value))
            if key is not None:
                found[value] += (Port(key, self.problem.choices[key]),)
            found[value] += tuple(port for port in readers.values() if port.name in self.results)
        return found

    def _read(self, operand, target: Port) -> None:
        if not isinstance(operand, Literal):
            self.readers.setdefault(operand, {})[target.name] = target

    def _add_op(self, op: Op, position: int, leader: int) -> None:
        key = ("op", self.region.path, leader)
        if position == leader:
            times = self.times * self.region.members[leader]
            self.problem.add_op(key, op, self.region.path, times)
        found = self.problem.choices[key]
        for index, operand in enumerate(op.operands):
            specs = tuple(strategy.operand_spec(index) for strategy in found)
            self._read(operand, Port(key, specs, index))
        for index, value in enumerate(op.results):
            specs = tuple(strategy.result_spec(index) for strategy in found)
            self.ports[value] = Port(key, specs, index)

    def _add_flow(self, op: Op, position: int, leader: int) -> None:
        nest = self.region.nests[leader]
        crossings = [
            self._crossing_port(leader, number, crossing)
            for number, crossing in enumerate(nest.flow.crossings)
        ]
        for crossing, port in zip(nest.flow.crossings, crossings, strict=True):
            outer = Port(port.key, tuple(crossing.outer_spec(spec) for spec in port.specs))
            if crossing.operand is not None:
                self._read(op.operands[crossing.operand], outer)
            if crossing.result is not None:
                self.ports[op.results[crossing.result]] = outer
        if position == leader:
            self._add_bodies(nest, crossings, self.times * self.region.members[leader])

    def _crossing_port(self, leader: int, number: int, crossing) -> Port:
        admission = self.problem.admission
        if crossing.whole:
            specs: tuple[Spec, ...] = (replicated(admission.mesh.num_axes),)
        else:
            specs = admission.specs(crossing.aval, partial=crossing.may_be_partial)
        return self.problem.add_spec_node(("crossing", self.region.path, leader, number), specs)

    def _add_bodies(self, nest: Nest, ports: Sequence[Port], times: float) -> None:
        for number, (body, region) in enumerate(zip(nest.flow.bodies, nest.bodies, strict=True)):
            inputs, outputs = {}, {}
            for crossing, port in zip(nest.flow.crossings, ports, strict=True):
                inputs |= dict.fromkeys(
                    (region.graph.inputs[i] for i in crossing.into(number)), port
                )
                arrives = Port(port.key, port.specs, 1)
                outputs |= dict.fromkeys(crossing.out_of(number), arrives)
            self.problem.add_region(region, inputs, outputs, times * body.times)

    def _connect(self) -> None:
        """Edges from every value to its readers, through a copy where there are several.

        Values that come from one node and go to the same nodes are alike, and share their copy.
        """
        groups: dict[Hashable, Key] = {}
        for value, readers in self.readers.items():
            port, aval = self.ports[value], self.region.graph.avals[value]
            if len(readers) == 1:
                self.problem.connect(port, *readers.values(), aval, self.times)
                continue
            group = (port.name, frozenset(readers))
            key = groups.setdefault(group, ("copy", self.region.path, len(groups)))
            specs = dict.fromkeys(port.specs)
            for reader in readers.values():
                specs |= dict.fromkeys(reader.specs)
            copy = self.problem.add_spec_node(key, specs)
            self.problem.copies[self.region.path, value] = key
            self.problem.connect(port, copy, aval, self.times)
            for reader in readers.values():
                self.problem.connect(copy, reader, aval, self.times)


def _with_ties_broken(mesh: LogicalMesh, region: Region) -> LogicalMesh:
    return mesh.priced(TieBreaking(mesh.costs, _TIE_FRACTION * _dearest(mesh, region)))


def _dearest(mesh: LogicalMesh, region: Region) -> float:
    """What it costs to reduce the largest value along the dearest axis."""
    largest = max((aval_bytes(aval) for aval in region.graph.avals), default=1)
    axes = [axis for axis, size in enumerate(mesh.shape) if size > 1]
    return max((mesh.all_reduce(axis, largest) for axis in axes), default=1.0)


def _total_work(region: Region) -> float:
    return 1.0 + sum(map(aval_bytes, region.graph.avals))
