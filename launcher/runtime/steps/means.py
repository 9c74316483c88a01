"""The numbers of a step: means over its microbatches, by programs compiled ahead."""

from collections.abc import Mapping, Sequence

import jax

from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.trace import Role, TracedModel
from launcher.autopar.realized.realize import RealizedPlan
from launcher.runtime.compiled.stage_programs import StagePrograms
from launcher.runtime.steps.loose_metrics import LooseMetrics
from launcher.runtime.steps.transport import Home, Transport

LOSS = "loss of the step"
"""The name of the loss among the metrics; no metric of a model can have it, being no identifier."""


def mean(scalars: Sequence[jax.Array]) -> jax.Array:
    return sum(scalars[1:], start=scalars[0]) / len(scalars)


def compile_mean(scalars: Sequence[jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    """[scalar] -> their mean, where they lie."""
    return jax.jit(mean).lower(scalars).compile()


class Means:
    """Means of what stages report; metrics that no stage computes are averaged as they come.

    Args:
        programs: of the stages of this process.
        transport: brings the means of other processes' stages.
    """

    def __init__(
        self, realized: RealizedPlan, programs: Mapping[int, StagePrograms], loose: LooseMetrics,
        transport: Transport,
    ):  # fmt: skip
        traced, count = realized.planner.model.traced, realized.plan.num_microbatches
        homes = _homes(realized, loose)
        self._compiled = {
            name: compile_mean([programs[home.stage].abstract_export(value)] * count)
            for name, value in _named(traced).items()
            if (home := homes.get(name)) is not None and home.stage in programs
            if value in programs[home.stage].layout.exports
        }
        self._shared = transport.shared("report", homes)

    def of(self, reported: Mapping[str, Sequence], step: int) -> dict[str, jax.Array]:
        """The mean of each list, one entry per microbatch, and those of other processes."""
        own = {name: self._compiled.get(name, mean)(values) for name, values in reported.items()}
        return self._shared.all_of(own, step)


def _named(traced: TracedModel) -> dict[str, Value]:
    return traced.metrics | {LOSS: traced.loss}


def _homes(realized: RealizedPlan, loose: LooseMetrics) -> dict[str, Home]:
    """Where each mean is made that some stage computes or holds."""
    traced, count = realized.planner.model.traced, realized.plan.num_microbatches
    stages = {
        name: stage
        for name, value in _named(traced).items()
        if (stage := _stage_of(realized, loose, name, value)) is not None
    }

    def made(name: str) -> jax.ShapeDtypeStruct:
        aval = traced.graph.avals[_named(traced)[name]]
        return jax.eval_shape(mean, [jax.ShapeDtypeStruct(aval.shape, aval.dtype)] * count)

    return {name: Home(stage, made(name)) for name, stage in stages.items()}


def _stage_of(realized: RealizedPlan, loose: LooseMetrics, name: str, value: Value) -> int | None:
    held = loose.inputs.get(name)
    for index, stage in enumerate(realized.stages):
        if held is None and value in stage.layout.exports:
            return index
        if held is not None and held.role is Role.PARAM and realized.owner[held.path] == index:
            return index
        if held is not None and held.role is Role.STATE and held.path in stage.layout.state:
            return index
    return None
