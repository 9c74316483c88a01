"""Metrics that no layer computes: constants, what follows from the random key, inputs as they are.

The clustering leaves such ops to whoever needs them, so no stage returns their results.
"""

from collections.abc import Mapping

import jax
import numpy as np

from launcher.autopar.graphs.clustering import free_ops
from launcher.autopar.graphs.graph import evaluate, live_ops, subgraph
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.trace import Input, Role

Scalars = dict[str, jax.Array | np.ndarray]


class LooseMetrics:
    """What `metrics` of the traced model is missing in the outputs of its layers.

    `inputs` names the parameters and state that are metrics themselves.
    """

    def __init__(self, layered: LayeredModel):
        traced, produced = layered.traced, layered.producer()
        loose = {name: v for name, v in traced.metrics.items() if v not in produced}
        self.inputs: Mapping[str, Input] = {
            name: traced.inputs[value]
            for name, value in loose.items()
            if value in traced.inputs and traced.inputs[value].role is not Role.CONSTANT
        }
        self._constants = {name: np.asarray(v) for name, v in traced.literal_metrics.items()}
        computed = {name: value for name, value in loose.items() if name not in self.inputs}
        ops = live_ops(free_ops(traced), computed.values())
        graph = subgraph(traced.graph, ops, tuple(computed.values()))

        def run(key_data) -> Scalars:
            arguments = [graph.constants.get(value, key_data) for value in graph.inputs]
            return dict(zip(computed, evaluate(graph, arguments), strict=True))

        self._computed = jax.jit(run) if computed else lambda key_data: {}

    def of_microbatch(self, key_data: np.ndarray) -> Scalars:
        """All but `inputs`, for the random key of a microbatch."""
        return self._constants | self._computed(key_data)
