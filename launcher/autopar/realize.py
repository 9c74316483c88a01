"""From a plan to everything that running it needs: the layers traced again, every stage's shardings and
layout, who sends what to whom, and the checked program.

Pure, like planning; the runtime compiles what comes out, and the simulator prices it. Whatever a plan file
leaves out (strategies, specs) is completed by the intra-operator planner here.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from launcher.autopar import checker
from launcher.autopar.cluster import Cluster
from launcher.autopar.clustering import cluster as cluster_ops
from launcher.autopar.compute import ComputeModel
from launcher.autopar.emit import StageEmitter
from launcher.autopar.graph import Value
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.layers import LayeredModel, build_layers
from launcher.autopar.mesh import LogicalMesh, logical_mesh
from launcher.autopar.picks import pins_of_stage
from launcher.autopar.plan import Plan, Stage
from launcher.autopar.program import Program, Wiring, add_communication
from launcher.autopar.restrictions import Experts, Restrictions
from launcher.autopar.schedules import schedule_by_name
from launcher.autopar.stage_layout import StageLayout, layout
from launcher.autopar.stage_problem import StageSettings
from launcher.autopar.trace import trace_model
from launcher.errors import PlanError
from launcher.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class RealizedStage:
    """One stage, ready to be compiled."""

    stage: Stage
    settings: StageSettings
    sharding: StageSharding
    layout: StageLayout
    emitter: StageEmitter


@dataclass(frozen=True, slots=True, eq=False)
class RealizedPlan:
    """A plan with all that it implies.

    `owner` says which stage updates a parameter that several read; `users` are the others. `sent` lists
    the values that one stage sends to another, `returned` those whose gradients come back.
    """

    plan: Plan
    planner: IntraOpPlanner
    stages: tuple[RealizedStage, ...]
    owner: Mapping[str, int]
    users: Mapping[str, tuple[int, ...]]
    sent: Mapping[tuple[int, int], tuple[Value, ...]]
    returned: Mapping[tuple[int, int], tuple[Value, ...]]
    wiring: Wiring
    program: Program


@lru_cache(maxsize=64)
def layered_model(model: Model, microbatch_size: int, num_layers: int | None = None):
    """Trace a model and cut it into layers; remembered, since a search asks again and again."""
    traced = trace_model(model, microbatch_size)
    return build_layers(traced, cluster_ops(traced, num_layers))


def stage_mesh(stage: Stage, cluster: Cluster) -> LogicalMesh:
    """The logical mesh of a stage, with its links priced."""
    sizes = dict(stage.mesh)
    return logical_mesh(
        cluster, hosts=len(stage.hosts), devices=len(stage.devices), data=sizes["data"]
    )


def restrictions(mesh: LogicalMesh, experts: Experts = Experts.FREE) -> Restrictions:
    """The data axis is held to the batch wherever there is one."""
    held = frozenset({0}) if mesh.shape[0] > 1 else frozenset()
    return Restrictions(held, experts)


def realize(
    plan: Plan, model: Model, cluster: Cluster, planner: IntraOpPlanner | None = None
) -> RealizedPlan:
    """Work out everything that a plan implies, and prove its program.

    Args:
        planner: the one that made the plan, if it is at hand: it has done half of the work.
    """
    planner = planner or IntraOpPlanner(_layers_of(plan, model))
    stages = tuple(_realize_stage(stage, plan, planner, cluster) for stage in plan.stages)
    owner, users = _owners(stages)
    sent, returned = _messages(stages)
    tied = sorted({(owner[path], user) for path, others in users.items() for user in others})
    wiring = Wiring(
        edges=tuple(sorted(sent)),
        differentiable=tuple(sorted(returned)),
        tied=tuple(tied),
        with_norm=True,
    )
    lists = schedule_by_name(plan.schedule).build(len(stages), plan.num_microbatches)
    program = add_communication(lists, wiring)
    checker.check(program, wiring)
    return RealizedPlan(plan, planner, stages, owner, users, sent, returned, wiring, program)


def _layers_of(plan: Plan, model: Model) -> LayeredModel:
    microbatch_size = plan.global_batch // plan.num_microbatches
    layered = layered_model(model, microbatch_size)
    if plan.num_layers not in (None, len(layered.layers)):
        layered = layered_model(model, microbatch_size, plan.num_layers)
    covered = plan.stages[-1].layers[1]
    if covered != len(layered.layers):
        raise PlanError(
            f"the plan's stages cover {covered} layers, the model has {len(layered.layers)} "
            f"(parallel.path): plan again, or set num_layers in the plan"
        )
    return layered


def _realize_stage(stage: Stage, plan: Plan, planner: IntraOpPlanner, cluster: Cluster):
    mesh = stage_mesh(stage, cluster)
    settings = StageSettings(
        mesh=mesh,
        compute=ComputeModel(cluster.device),
        restrictions=restrictions(mesh),
        num_microbatches=plan.num_microbatches,
        zero=stage.zero,
        recompute=stage.recompute != "none",
    )
    first, last = stage.layers
    settings, pins = _pins(planner, stage, settings)
    sharding = planner.solve(first, last, settings, pins=pins)
    described = layout(planner, sharding, first, last, stage.recompute)
    emitter = StageEmitter(planner, sharding, described)
    return RealizedStage(stage, settings, sharding, described, emitter)


def _pins(planner: IntraOpPlanner, stage: Stage, settings: StageSettings):
    """What the plan fixes, under the restrictions that it was made with: a plan does not name them."""
    experts = list(Experts)
    for choice in experts:
        tried = replace(settings, restrictions=replace(settings.restrictions, experts=choice))
        try:
            return tried, pins_of_stage(planner, stage, tried)
        except PlanError:
            if choice is experts[-1]:
                raise
    raise AssertionError("Experts has no members")


def _owners(stages: tuple[RealizedStage, ...]):
    readers: dict[str, list[int]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for path in stage.layout.params:
            readers[path].append(index)
    owner = {path: found[0] for path, found in readers.items()}
    users = {path: tuple(found[1:]) for path, found in readers.items() if len(found) > 1}
    return owner, users


def _messages(stages: tuple[RealizedStage, ...]):
    producer = {value: i for i, stage in enumerate(stages) for value in stage.layout.exports}
    sent: dict[tuple[int, int], list[Value]] = defaultdict(list)
    returned: dict[tuple[int, int], list[Value]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for value in stage.layout.imports:
            sent[producer[value], index].append(value)
            if value in stage.layout.returns:
                returned[producer[value], index].append(value)
    return (
        {edge: tuple(values) for edge, values in sent.items()},
        {edge: tuple(values) for edge, values in returned.items()},
    )
