"""What the arguments and results of a step are to each other, found from the step alone.

carried    a result that is an argument's next value (updated parameters, optimizer state): the result
           is left where the argument lies, so that the step can be called again with it
state      an argument that is carried and that no other result depends on: optimizer state
batch      an argument all of whose arrays have the leading dim of the last argument's
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.extend.core import Literal

from launcher.autopar.graphs.graph import Graph, Value


@dataclass(frozen=True, slots=True)
class StepRoles:
    """Roles of the flat inputs and outputs.

    Attributes:
        carried: output -> the input whose next value it is.
        state: the inputs that are optimizer state.
        params: the inputs that are carried, and that other results depend on.
        batch: the inputs whose dim 0 is the batch.
    """

    carried: Mapping[int, int]
    state: frozenset[int]
    params: frozenset[int]
    batch: frozenset[int]


def find_roles(
    graph: Graph,
    arguments: Sequence,
    result,
    *,
    carry: Mapping[int, int] | None,
    batch_argnums: Sequence[int] | None,
) -> StepRoles:
    """Find the roles.

    Args:
        arguments, result: pytrees of abstract arrays.
        carry: result -> argument, by position, where the caller knows; None finds it: the results are
            taken in order, and each is the next value of the first free argument of the same structure,
            shapes and dtypes.
        batch_argnums: the arguments that are batches; None finds them.
    """
    results = _parts(arguments, result)
    pairs = _matching(arguments, results) if carry is None else carry
    starts, ends = _offsets(arguments), _offsets(results)
    carried = {
        ends[r] + k: starts[a] + k
        for r, a in pairs.items()
        for k in range(len(jax.tree.leaves(arguments[a])))
    }
    reached = _reaches(graph, [k for k in range(len(graph.outputs)) if k not in carried])
    inputs = set(carried.values())
    state = frozenset(i for i in inputs if graph.inputs[i] not in reached)
    chosen = _batches(arguments) if batch_argnums is None else batch_argnums
    batch = frozenset(
        starts[a] + k
        for a in chosen
        if a not in pairs.values()
        for k, leaf in enumerate(jax.tree.leaves(arguments[a]))
        if leaf.shape
    )
    return StepRoles(carried, state, frozenset(inputs - state), batch)


def _parts(arguments: Sequence, result) -> list:
    """The results: the parts of a tuple, unless the whole is like some argument (or no tuple)."""
    alike = any(_signature(argument) == _signature(result) for argument in arguments)
    return list(result) if isinstance(result, tuple) and not alike else [result]


def _signature(tree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _matching(arguments: Sequence, results: Sequence) -> dict[int, int]:
    free, pairs = dict(enumerate(map(_signature, arguments))), {}
    for position, result in enumerate(results):
        wanted = _signature(result)
        if not any(shape for shape, _ in wanted[1]):
            continue  # scalars alone: a loss, a count
        match = next((a for a, signature in free.items() if signature == wanted), None)
        if match is not None:
            pairs[position] = match
            del free[match]
    return pairs


def _offsets(trees: Sequence) -> list[int]:
    """Where each tree's leaves begin in the flat list."""
    starts, position = [], 0
    for tree in trees:
        starts.append(position)
        position += len(jax.tree.leaves(tree))
    return starts


def _reaches(graph: Graph, outputs: Sequence[int]) -> set[Value]:
    """The values that some of the outputs depend on."""
    found = {graph.outputs[k] for k in outputs if not isinstance(graph.outputs[k], Literal)}
    for op in reversed(graph.ops):
        if not found.isdisjoint(op.results):
            found.update(op.values)
    return found


def _batches(arguments: Sequence) -> list[int]:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(a) if leaf.shape] for a in arguments]
    if not shapes or not shapes[-1]:
        return []
    size = shapes[-1][0][0]
    return [k for k, found in enumerate(shapes) if found and all(s[0] == size for s in found)]
