"""A function whose inputs and results already have their places: only what lies between is to be chosen.

So the optimizer's update is sharded: parameters, optimizer state and gradients lie where the plan says, and
the ops in between follow at the least communication, priced and written like everything else. Ops that do
the same to inputs of the same shapes and places are planned once, so a thousand parameters cost no more
than the few kinds of them.
"""

from collections.abc import Callable, Hashable, Sequence

import jax
from jax.extend.core import Literal

from launcher.autopar.clusters.mesh import LogicalMesh
from launcher.autopar.graphs.folding import Folding
from launcher.autopar.graphs.graph import Graph, flat_graph
from launcher.autopar.graphs.structure import op_signature
from launcher.autopar.sharding.spec import Spec
from launcher.autopar.solver import solve
from launcher.autopar.whole_graph.graph_problem import Admission, GraphProblem
from launcher.autopar.whole_graph.regions import region_of
from launcher.autopar.whole_graph.sharded_graph import ShardedGraph, write_out


def shard_as_given(
    function: Callable,
    arguments: Sequence,
    input_specs: Sequence[Spec],
    output_specs: Sequence[Spec],
    mesh: LogicalMesh,
) -> ShardedGraph:
    """Shard a function between given places.

    Args:
        arguments: pytrees of abstract arrays.
        input_specs, output_specs: of all leaves of the arguments and of the result, in order.
    """
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    closed = jax.make_jaxpr(function)(*bare)  # without places, which JAX would write into the ops
    graph = flat_graph(closed)
    region = region_of(graph, _fold_by_inputs(graph, input_specs))
    problem = GraphProblem(region, Admission(mesh=mesh))
    given = dict(zip(graph.inputs, input_specs, strict=False))
    inputs = {v: problem.add_spec_node(("input", v), [spec]) for v, spec in given.items()}
    outputs = {
        index: problem.add_spec_node(("output", index), [spec])
        for index, spec in enumerate(output_specs)
    }
    problem.add_region(region, inputs, outputs)
    pairwise, keys = problem.pairwise()
    choice = solve(pairwise).choice
    picks = {key: problem.choices[key][pick] for key, pick in zip(keys, choice, strict=True)}
    return write_out(region, problem, picks, given, tuple(output_specs))


def _fold_by_inputs(graph: Graph, input_specs: Sequence[Spec]) -> Folding:
    """Tie the ops that compute alike from inputs of the same type and place."""
    labels: dict[int, Hashable] = {
        value: ("input", str(graph.avals[value]), spec)
        for value, spec in zip(graph.inputs, input_specs, strict=False)
    }
    numbers: dict[Hashable, int] = {}
    first: dict[int, int] = {}
    representative = []
    for position, op in enumerate(graph.ops):
        read = tuple("literal" if isinstance(o, Literal) else labels.get(o, o) for o in op.operands)
        number = numbers.setdefault((op_signature(op), read), len(numbers))
        representative.append(first.setdefault(number, position))
        labels |= {value: (number, index) for index, value in enumerate(op.results)}
    return Folding(tuple(representative))
