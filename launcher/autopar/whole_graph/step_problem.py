"""A traced step as a `GraphProblem`: where its inputs may lie, and where its results must arrive."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import jax
from jax.extend.core import Literal

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.graph import Graph, Value
from launcher.autopar.sharding.ports import Port
from launcher.autopar.sharding.reshard import Kind
from launcher.autopar.sharding.restrictions import ClassTags, Restrictions
from launcher.autopar.sharding.spec import REPLICATED, Spec, num_shards, replicated
from launcher.autopar.sharding.tags import propagate
from launcher.autopar.whole_graph.graph_problem import Admission, GraphProblem
from launcher.autopar.whole_graph.intra_op_options import IntraOpOptions
from launcher.autopar.whole_graph.regions import Region, build_region
from launcher.autopar.whole_graph.step_roles import StepRoles


@dataclass(frozen=True, slots=True, eq=False)
class StepProblem:
    """The problem, and the node of every input and output (None: an output known at trace time)."""

    region: Region
    problem: GraphProblem
    inputs: tuple[Port, ...]
    outputs: tuple[Port | None, ...]
    mesh: LogicalMesh


def pose(
    graph: Graph, num_inputs: int, roles: StepRoles, mesh: LogicalMesh, options: IntraOpOptions
) -> StepProblem:
    """Pose the sharding of a step; its first `num_inputs` inputs are the caller's."""
    mesh = _as_asked(mesh, options)
    region = build_region(graph, folded=options.fold)
    admission = Admission(
        mesh=mesh,
        dim_over_axes=options.allow_dim_over_axes,
        restrictions=_restrictions(options),
        tags=_tags(graph, roles, options),
        compute=options.compute,
    )
    problem = GraphProblem(region, admission)
    inputs = _add_inputs(problem, num_inputs, roles, options)
    outputs = _add_outputs(problem, inputs, roles)
    targets = {k: port for k, port in enumerate(outputs) if port is not None}
    sources = dict(zip(graph.inputs, inputs, strict=False))
    problem.add_region(region, sources, targets)
    return StepProblem(region, problem, inputs, outputs, mesh)


def _as_asked(mesh: LogicalMesh, options: IntraOpOptions) -> LogicalMesh:
    forbidden = set(mesh.forbidden)
    if not options.allow_all_gather:
        forbidden.add(Kind.ALL_GATHER.value)
    if not options.allow_all_to_all:
        forbidden.add(Kind.ALL_TO_ALL.value)
    costs = mesh.costs if options.costs is None else options.costs
    return replace(mesh, forbidden=frozenset(forbidden), costs=costs)


def _restrictions(options: IntraOpOptions) -> Restrictions:
    axes = () if options.batch_axis is None else (options.batch_axis,)
    return Restrictions(frozenset(axes))


def _tags(graph: Graph, roles: StepRoles, options: IntraOpOptions):
    if options.batch_axis is None:
        return {}
    batch = propagate(graph.ops, {graph.inputs[i]: 0 for i in roles.batch})
    return {(): ClassTags(batch, {})}


def _add_inputs(
    problem: GraphProblem, num_inputs: int, roles: StepRoles, options: IntraOpOptions
) -> tuple[Port, ...]:
    """One node for all inputs that are read in the same places, and updated in the same places."""
    graph = problem.region.graph
    readers = _reading_places(problem.region)
    writers = _writing_places(problem.region, roles)
    ports, keys = [], {}
    for index, value in enumerate(graph.inputs[:num_inputs]):
        specs = _input_specs(problem, index, roles, options)
        likeness = (readers.get(value, frozenset()), writers.get(index), specs)
        alike: Hashable = likeness if options.fold and any(likeness[:2]) else index
        key = keys.setdefault(alike, ("input", index))
        ports.append(problem.add_spec_node(key, specs))
        if index not in roles.params:
            problem.prefer_small(ports[-1], graph.avals[value])
    return tuple(ports)


def _reading_places(region: Region) -> dict[Value, frozenset]:
    places: dict[Value, set] = {}
    for position, op in enumerate(region.graph.ops):
        for index, operand in enumerate(op.operands):
            if not isinstance(operand, Literal):
                places.setdefault(operand, set()).add((region.leader(position), index))
    return {value: frozenset(found) for value, found in places.items()}


def _writing_places(region: Region, roles: StepRoles) -> dict[int, tuple[int, int]]:
    """Input -> where its next value is computed."""
    made = {
        value: (region.leader(position), index)
        for position, op in enumerate(region.graph.ops)
        for index, value in enumerate(op.results)
    }
    outputs = region.graph.outputs
    return {
        source: made[outputs[output]]
        for output, source in roles.carried.items()
        if not isinstance(outputs[output], Literal) and outputs[output] in made
    }


def _input_specs(
    problem: GraphProblem, index: int, roles: StepRoles, options: IntraOpOptions
) -> tuple[Spec, ...]:
    """Where an input may lie."""
    admission, graph = problem.admission, problem.region.graph
    value = graph.inputs[index]
    aval = graph.avals[value]
    whole = (replicated(admission.mesh.num_axes),)
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return whole
    specs = admission.specs(aval)
    split = (
        index in roles.state and options.zero >= 1 or index in roles.params and options.zero == 3
    )
    for axis in admission.restrictions.batch_axes if not split else ():
        entries = admission.restrictions.entries(admission.tags[()], value)
        held = tuple(spec for spec in specs if spec[axis] in entries)
        specs = held or tuple(spec for spec in specs if spec[axis] == REPLICATED)
    if split:
        most = max(num_shards(spec, admission.mesh.shape) for spec in specs)
        specs = tuple(s for s in specs if num_shards(s, admission.mesh.shape) == most)
    return specs


def _add_outputs(
    problem: GraphProblem, inputs: tuple[Port, ...], roles: StepRoles
) -> tuple[Port | None, ...]:
    graph, ports = problem.region.graph, []
    for index, operand in enumerate(graph.outputs):
        if isinstance(operand, Literal):
            ports.append(None)
        elif index in roles.carried:
            source = inputs[roles.carried[index]]
            ports.append(Port(source.key, source.specs, 1))
        else:
            specs = problem.admission.specs(graph.avals[operand])
            ports.append(problem.add_spec_node(("output", index), specs))
    return tuple(ports)
