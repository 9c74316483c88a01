"""The numbers of a step: means over its microbatches, by programs compiled ahead."""

from collections.abc import Mapping, Sequence

import jax

from launcher.autopar.realize import RealizedPlan
from launcher.runtime.stage_programs import StagePrograms

LOSS = "loss of the step"
"""The name of the loss among the metrics; no metric of a model can have it, being no identifier."""


def mean(scalars: Sequence[jax.Array]) -> jax.Array:
    return sum(scalars[1:], start=scalars[0]) / len(scalars)


def compile_mean(scalars: Sequence[jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    """[scalar] -> their mean, where they lie."""
    return jax.jit(mean).lower(scalars).compile()


class Means:
    """Means of what stages report; metrics that no stage computes are averaged as they come."""

    def __init__(self, realized: RealizedPlan, programs: Sequence[StagePrograms]):
        traced, count = realized.planner.model.traced, realized.plan.num_microbatches
        named = traced.metrics | {LOSS: traced.loss}
        self._compiled = {
            name: compile_mean([stage.abstract_export(value)] * count)
            for stage in programs
            for name, value in named.items()
            if value in stage.layout.exports
        }

    def of(self, reported: Mapping[str, Sequence]) -> dict[str, jax.Array]:
        """The mean of each list, one entry per microbatch."""
        return {name: self._compiled.get(name, mean)(values) for name, values in reported.items()}
