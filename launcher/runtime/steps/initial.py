"""Initial weights and state, one tensor at a time, so that no device ever has to hold the whole model.

The model's own initialiser is traced and run equation by equation, exactly as Python would have run it: the
numbers are those of `Model.init`, bit for bit. A value is let go as soon as nothing reads it any more.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from launcher.autopar.graphs.graph import Graph, Value, eliminate_dead_code, evaluate_op, from_jaxpr
from launcher.autopar.graphs.trace import Input, Role
from launcher.autopar.plans.plan import Plan
from launcher.models.model import Model
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.memory_error import Doing, memory_errors
from launcher.runtime.steps.placing import put

Values = Iterable[tuple[Input, jax.Array | np.ndarray]]
"""Parameters and state variables, each with its name."""


def initial_values(model: Model, seed: int) -> Iterator[tuple[Input, jax.Array]]:
    """Yield every parameter and state variable of a fresh model, in the order they are made."""
    closed, shapes = jax.make_jaxpr(lambda: model.init(seed), return_shape=True)()
    # Calls stay whole: compiled by themselves, as they are outside a trace.
    graph = eliminate_dead_code(from_jaxpr(closed, inline=frozenset()))
    params, state = jax.tree.unflatten(jax.tree.structure(shapes), graph.outputs)
    named = [
        *((operand, Input(Role.PARAM, path)) for path, operand in params.items()),
        *((operand, Input(Role.STATE, path)) for path, operand in state.items()),
    ]
    wanted: dict[Value, list[Input]] = defaultdict(list)
    for operand, name in named:
        if isinstance(operand, Literal):
            yield name, jnp.asarray(operand.val, operand.aval.dtype)
        else:
            wanted[operand].append(name)
    for value, array in _run(graph):
        for name in wanted[value]:
            yield name, array


def _run(graph: Graph) -> Iterator[tuple[Value, jax.Array]]:
    """Yield every value of a graph without arguments when it is there."""
    readers = Counter(value for op in graph.ops for value in op.values)
    values = {value: jnp.asarray(array) for value, array in graph.constants.items()}
    yield from values.items()
    for op in graph.ops:
        operands = [o.val if isinstance(o, Literal) else values[o] for o in op.operands]
        readers.subtract(op.values)
        for value in op.values:
            if not readers[value]:
                values.pop(value, None)
        for value, array in zip(op.results, evaluate_op(op, operands), strict=True):
            if readers[value]:
                values[value] = array
            yield value, array


@dataclass(frozen=True, slots=True)
class Resident:
    """The parameters and the state of one stage, on its devices."""

    params: dict[str, jax.Array]
    state: dict[str, jax.Array]


def place_values(
    plan: Plan, programs: Mapping[int, StagePrograms], values: Values
) -> dict[int, Resident]:
    """Bring each value to every stage that has it, in the shards that the stage's plan says."""
    residents = {index: Resident({}, {}) for index in programs}
    for source, array in values:
        for index, stage in programs.items():
            with memory_errors(plan, Doing.placing(index), stage.devices):
                _place_value(stage, residents[index], source, array)
    return residents


def _place_value(stage: StagePrograms, resident: Resident, source: Input, array) -> None:
    is_param = source.role is Role.PARAM
    specs = stage.layout.params if is_param else stage.layout.state
    own = resident.params if is_param else resident.state
    if source.path in specs:
        own[source.path] = put(array, stage.sharding(specs[source.path], array.ndim))
