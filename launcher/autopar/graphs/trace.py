"""From a model to its traced forward pass, with every input's role named.

The loss of one microbatch is traced on shapes alone, so a model of any size is traced on a laptop. What
comes out is a flat `Graph`; the planner cuts it, and differentiates the pieces (see `layers`).
"""

import math
from dataclasses import dataclass
from enum import Enum

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from launcher.autopar.graphs.graph import Graph, Value, eliminate_dead_code, trace
from launcher.models.model import Model


class Role(Enum):
    """What an input of the forward pass is."""

    PARAM = "param"
    STATE = "state"
    BATCH = "batch"
    RANDOM = "random"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its role, and its path inside that role."""

    role: Role
    path: str


@dataclass(frozen=True, slots=True)
class TracedModel:
    """The forward pass of one microbatch.

    `inputs` names every input value; `loss`, `state` (path -> value) and `metrics` (name -> value) name the
    outputs. Metrics that are known while tracing are in `literal_metrics`.
    """

    graph: Graph
    inputs: dict[Value, Input]
    loss: Value
    state: dict[str, Value]
    metrics: dict[str, Value]
    literal_metrics: dict[str, object]
    microbatch_size: int

    @property
    def param_avals(self) -> dict[str, jax.core.ShapedArray]:
        """Path of a parameter -> its shape and dtype; a leaf of the batch may have the same path."""
        avals = self.graph.avals
        return {i.path: avals[v] for v, i in self.inputs.items() if i.role is Role.PARAM}

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(aval.shape) for aval in self.param_avals.values())


def trace_model(model: Model, microbatch_size: int) -> TracedModel:
    """Trace the training loss of one microbatch of so many samples."""
    batch = model.example_batch(microbatch_size)
    key_data = jax.ShapeDtypeStruct((2,), jnp.uint32)
    arguments = (model.abstract_params, model.abstract_state, batch, key_data)
    graph, structure = trace(model.loss, *arguments)
    roles = [
        *(Input(Role.PARAM, path) for path in sorted(model.abstract_params)),
        *(Input(Role.STATE, path) for path in sorted(model.abstract_state)),
        *(Input(Role.BATCH, path) for path in sorted(batch)),
        Input(Role.RANDOM, "key"),
    ]
    return _named(graph, structure, roles, microbatch_size)


def trace_evaluation(model: Model, batch_size: int) -> TracedModel:
    """Trace the evaluation loss of a batch: no dropout, running statistics."""
    batch = model.example_batch(batch_size)
    graph, structure = trace(
        lambda params, state, batch: _without_new_state(model.eval_loss(params, state, batch)),
        model.abstract_params,
        model.abstract_state,
        batch,
    )
    roles = [
        *(Input(Role.PARAM, path) for path in sorted(model.abstract_params)),
        *(Input(Role.STATE, path) for path in sorted(model.abstract_state)),
        *(Input(Role.BATCH, path) for path in sorted(batch)),
    ]
    return _named(graph, structure, roles, batch_size)


def _without_new_state(result):
    loss, metrics = result
    return loss, ({}, metrics)


def _named(graph: Graph, structure, roles: list[Input], microbatch_size: int) -> TracedModel:
    num_constants = len(graph.inputs) - len(roles)
    roles = roles + [Input(Role.CONSTANT, str(i)) for i in range(num_constants)]
    inputs = dict(zip(graph.inputs, roles, strict=True))
    loss, (state, metrics) = jax.tree.unflatten(structure, graph.outputs)
    return TracedModel(
        graph=eliminate_dead_code(graph),
        inputs=inputs,
        loss=loss,
        state={path: value for path, value in state.items() if isinstance(value, Value)},
        metrics={name: value for name, value in metrics.items() if isinstance(value, Value)},
        literal_metrics={
            name: literal.val for name, literal in metrics.items() if isinstance(literal, Literal)
        },
        microbatch_size=microbatch_size,
    )
