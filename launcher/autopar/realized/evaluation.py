"""The evaluation pass of a plan: the same parameters where they lie, forward only.

The evaluation loss is another traced graph (no dropout, running statistics). Its ops go to the stages that
hold the parameters they read, one layer per stage, and are planned by the same intra-operator pass with the
parameters held where training has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.autopar.graphs.clustering import Clustering, free_ops
from launcher.autopar.graphs.graph import Op, Value
from launcher.autopar.graphs.layers import LayeredModel, build_layers
from launcher.autopar.graphs.trace import Role, TracedModel, trace_evaluation
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.stage_layout import layout
from launcher.autopar.realized.emit import StageEmitter
from launcher.autopar.realized.messages import Carried, Edge, exchanged, forward_crossings
from launcher.autopar.realized.realize import RealizedPlan
from launcher.autopar.realized.realized_stage import RealizedStage
from launcher.autopar.sharding.spec import Spec
from launcher.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationPass:
    """The evaluation of a microbatch: a forward pass per stage, and what they send one another."""

    traced: TracedModel
    stages: tuple[RealizedStage, ...]
    activations: Mapping[Edge, Carried]


def realize_evaluation(realized: RealizedPlan, model: Model) -> EvaluationPass:
    """Plan the evaluation of a microbatch on the stages of a plan."""
    traced = trace_evaluation(model, realized.plan.microbatch_size)
    holders = [{*stage.layout.params, *stage.layout.state} for stage in realized.stages]
    planner = IntraOpPlanner(build_layers(traced, _cut_by_stage(traced, holders), trains=False))
    stages = tuple(_plan_stage(planner, s, index) for index, s in enumerate(realized.stages))
    sent, _ = exchanged(stages)
    return EvaluationPass(traced, stages, forward_crossings(stages, traced, sent))


def _plan_stage(planner: IntraOpPlanner, stage: RealizedStage, index: int) -> RealizedStage:
    pins = _pins(planner.model, index, {**stage.layout.params, **stage.layout.state})
    sharding = planner.solve(index, index + 1, stage.settings, pins=pins)
    described = layout(planner, sharding, index, index + 1, "none")
    emitter = StageEmitter(planner, sharding, described)
    return RealizedStage(stage.stage, stage.settings, sharding, described, emitter)


def _pins(layered: LayeredModel, index: int, homes: Mapping[str, Spec]):
    """Parameters and state stay where training has them."""
    layer = layered.layers[index]
    return {
        ("slot", layer.cls.name, slot): [homes[layered.traced.inputs[value].path]]
        for slot, value in enumerate(layer.inputs)
        if layer.cls.slots[slot].role in (Role.PARAM, Role.STATE)
    }


def _cut_by_stage(traced: TracedModel, holders: Sequence[set[str]]) -> Clustering:
    """Give every op to the first stage that has its parameters and comes after its operands.

    Ops that read no parameter, not even indirectly, go where their first reader is.
    """
    free = free_ops(traced)
    free_results = {result for op in free for result in op.results}
    ops = [op for op in traced.graph.ops if free_results.isdisjoint(op.results)]
    stage_of: dict[Value, int] = {}
    for op in ops:
        stage = _earliest_stage(op, traced, holders, stage_of)
        if stage is not None:
            stage_of.update(dict.fromkeys(op.results, stage))
    first_reader: dict[Value, int] = {}
    for op in reversed(ops):
        readers = [first_reader[value] for value in op.results if value in first_reader]
        stage = stage_of.get(op.results[0], min(readers, default=0))
        stage_of.update(dict.fromkeys(op.results, stage))
        for value in op.values:
            first_reader[value] = min(stage, first_reader.get(value, stage))
    layers = tuple(
        tuple(op for op in ops if stage_of[op.results[0]] == stage) for stage in range(len(holders))
    )
    return Clustering(layers, tuple(free))


def _earliest_stage(
    op: Op, traced: TracedModel, holders, stage_of: Mapping[Value, int]
) -> int | None:
    after = [stage_of[value] for value in op.values if value in stage_of]
    paths = {
        traced.inputs[value].path
        for value in op.values
        if value in traced.inputs and traced.inputs[value].role in (Role.PARAM, Role.STATE)
    }
    if not paths:
        return max(after, default=None)
    earliest = max(after, default=0)
    stages = [i for i, held in enumerate(holders) if i >= earliest and paths <= held]
    assert stages, f"no stage from {earliest} on holds {paths}"
    return stages[0]
