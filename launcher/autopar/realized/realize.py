"""From a plan to everything that running it needs: the layers traced again, every stage's shardings and
layout, who sends what to whom, and the checked program.

Pure, like planning; the runtime compiles what comes out, and the simulator prices it. Whatever a plan file
leaves out (strategies, specs) is completed by the intra-operator planner here.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.clusters.mesh import LogicalMesh, logical_mesh
from launcher.autopar.graphs.clustering import cluster as cluster_ops
from launcher.autopar.graphs.graph import Value
from launcher.autopar.graphs.layers import LayeredModel, build_layers
from launcher.autopar.graphs.optimizer_state import ADAMW, OptimizerFootprint
from launcher.autopar.graphs.trace import trace_model
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.stage_layout import training_layout
from launcher.autopar.intra_op.stage_problem import StageSettings
from launcher.autopar.plans.plan import Plan, Stage
from launcher.autopar.programs import checker
from launcher.autopar.programs.communication import add_communication
from launcher.autopar.programs.program import Program, Wiring
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.realized.emit import StageEmitter
from launcher.autopar.realized.messages import Edge, Messages, exchanged, plan_messages
from launcher.autopar.realized.picks import pins_of_stage
from launcher.autopar.realized.realized_stage import RealizedStage
from launcher.autopar.sharding.restrictions import Experts, Restrictions
from launcher.errors import ConfigError, PlanError
from launcher.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class RealizedPlan:
    """A plan with all that it implies.

    `owner` says which stage updates a parameter; `users` are the others that read it, and of them
    `contributors` have gradients for it. `sent` lists the values that one stage sends to another,
    `returned` those whose gradients come back; `messages` says how they go.
    """

    plan: Plan
    planner: IntraOpPlanner
    stages: tuple[RealizedStage, ...]
    owner: Mapping[str, int]
    users: Mapping[str, tuple[int, ...]]
    contributors: Mapping[str, tuple[int, ...]]
    sent: Mapping[Edge, tuple[Value, ...]]
    returned: Mapping[Edge, tuple[Value, ...]]
    messages: Messages
    wiring: Wiring
    program: Program


@lru_cache(maxsize=64)
def layered_model(
    model: Model, microbatch_size: int, num_layers: int | None = None, *, key: str = "parallel.pp"
) -> LayeredModel:
    """Trace a model and cut it into layers; remembered, since a search asks again and again.

    Args:
        key: by which the user set `num_layers`.
    """
    traced = trace_model(model, microbatch_size)
    return build_layers(traced, cluster_ops(traced, num_layers, key=key))


def stage_mesh(stage: Stage, cluster: AnyCluster) -> LogicalMesh:
    """The logical mesh of a stage, with its links priced."""
    sizes = dict(stage.mesh)
    kind = cluster.kind_of(stage.hosts)
    return logical_mesh(
        kind, hosts=len(stage.hosts), devices=len(stage.devices), data=sizes["data"]
    )


def restrictions(mesh: LogicalMesh, experts: Experts = Experts.FREE) -> Restrictions:
    """The data axis is held to the batch wherever there is one."""
    held = frozenset({0}) if mesh.shape[0] > 1 else frozenset()
    return Restrictions(held, experts)


def realize(
    plan: Plan, model: Model, cluster: AnyCluster, planner: IntraOpPlanner | None = None,
    optimizer: OptimizerFootprint = ADAMW,
) -> RealizedPlan:  # fmt: skip
    """Work out everything that a plan implies, and prove its program.

    Args:
        planner: the one that made the plan, if it is at hand: it has done half of the work.
        optimizer: decides what updates cost, and what state they keep.
    """
    planner = planner or IntraOpPlanner(layers_of(plan, model))
    stages = tuple(
        _realize_stage(stage, plan, planner, cluster, optimizer) for stage in plan.stages
    )
    _check_state(stages)
    owner, users, contributors = _owners(planner, stages)
    sent, returned = exchanged(stages)
    messages = plan_messages(
        stages, planner.model.traced, sent=sent, returned=returned, owner=owner, users=users,
        contributors=contributors,
    )  # fmt: skip
    tied = sorted({(owner[path], user) for path, others in users.items() for user in others})
    wiring = Wiring(
        edges=tuple(sorted(sent)),
        differentiable=tuple(sorted(returned)),
        tied=tuple(tied),
        with_norm=True,
        submesh_of=plan.submesh_of,
        overlapping=frozenset(i for i, stage in enumerate(plan.stages) if stage.overlap),
    )
    check_overlap(wiring)
    schedule = schedule_by_name(plan.schedule, plan.virtual_stages)
    lists = schedule.build(len(stages), plan.num_microbatches)
    program = add_communication(lists, wiring)
    checker.check(program, wiring)
    return RealizedPlan(
        plan, planner, stages, owner, users, contributors, sent, returned, messages, wiring, program
    )


def layers_of(plan: Plan, model: Model) -> LayeredModel:
    """The model in as many layers as the plan's stages cover."""
    covered = plan.stages[-1].layers[1]
    layered = layered_model(model, plan.microbatch_size)
    if covered == len(layered.layers):
        return layered
    key = f"stages[{len(plan.stages) - 1}].layers[1]"
    return layered_model(model, plan.microbatch_size, covered, key=key)


def _realize_stage(
    stage: Stage, plan: Plan, planner: IntraOpPlanner, cluster: AnyCluster,
    optimizer: OptimizerFootprint,
) -> RealizedStage:  # fmt: skip
    first, last = stage.layers
    sharding = solve_stage(stage, plan, planner, cluster, optimizer)
    described = training_layout(planner, sharding, first, last, stage.recompute)
    emitter = StageEmitter(planner, sharding, described)
    return RealizedStage(stage, sharding.settings, sharding, described, emitter)


def solve_stage(
    stage: Stage, plan: Plan, planner: IntraOpPlanner, cluster: AnyCluster,
    optimizer: OptimizerFootprint,
) -> StageSharding:  # fmt: skip
    """Shard the ops of a stage beside the others of its plan, those that it leaves open."""
    mesh, device = stage_mesh(stage, cluster), cluster.kind_of(stage.hosts).device
    settings = StageSettings(
        mesh=mesh,
        compute=ComputeModel(device, _at_once(plan, stage, cluster)),
        restrictions=restrictions(mesh),
        num_microbatches=plan.num_microbatches,
        zero=stage.zero,
        scatter=stage.scatter,
        recompute=stage.recompute,
        optimizer=optimizer,
    )
    settings, pins = _pins(planner, stage, settings)
    return planner.solve(*stage.layers, settings, pins=pins)


def _at_once(plan: Plan, stage: Stage, cluster: AnyCluster) -> int:
    """How many devices of the stage's busiest machine compute at the same time as it does."""
    used = {(host, device) for s in plan.stages for host in s.hosts for device in s.devices}
    machines = Counter(cluster.machine_of(host) for host, _ in used)
    return max(machines[cluster.machine_of(host)] for host in stage.hosts)


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


def _check_state(stages: tuple[RealizedStage, ...]) -> None:
    """State stays on one stage: nothing carries a new value to another one that reads it."""
    for index, stage in enumerate(stages):
        for path in stage.layout.new_state:
            others = [k for k, s in enumerate(stages) if k != index and path in s.layout.state]
            if others:
                raise ConfigError(
                    f"the state '{path}' is written by stage {index} and read by stage {others[0]} "
                    f"(parallel.pp={len(stages)}): take parallel.pp=1, or change the model so that what "
                    f"reads it also writes it"
                )


def check_overlap(wiring: Wiring) -> None:
    """Gradients that a stage waits for are there before its own last backward pass begins."""
    for owner, user in wiring.tied:
        if owner in wiring.overlapping and user < owner:
            raise PlanError(
                f"stages[{owner}].overlap=true has the stage bring its gradients together during its last "
                f"backward pass, and stage {user}, which goes back after it, has some for it: write false"
            )


def _owners(planner: IntraOpPlanner, stages: tuple[RealizedStage, ...]):
    """Which stage updates each parameter, the others that hold it, and those with gradients for it."""
    inputs = planner.model.traced.inputs
    stage_of = {i: k for k, s in enumerate(stages) for i in range(s.layout.first, s.layout.last)}
    owner = {inputs[value].path: stage_of[i] for value, i in planner.param_owners.items()}
    holders: dict[str, list[int]] = defaultdict(list)
    for index, stage in enumerate(stages):
        for path in stage.layout.params:
            owner.setdefault(path, index)  # one that no layer reads
            if owner[path] != index:
                holders[path].append(index)
    users = {path: tuple(found) for path, found in holders.items()}
    contributors = {
        path: tuple(user for user in found if path in stages[user].layout.accumulators)
        for path, found in users.items()
    }
    return owner, users, contributors
