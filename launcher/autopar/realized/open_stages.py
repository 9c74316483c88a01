"""Complete what stages written by hand leave open of their outline: their layers, and their meshes.

Layers are cut so that the longest stage computes as short as possible, where the devices of a stage share
its operations evenly: the least over all cuts of max_i work_i / devices_i, by dynamic programming. Each mesh
is then the (data, tensor) view of the stage's devices on which a microbatch takes least, of those that fit
into memory; where none fits, the one that needs least.

Left out: transfers between stages, and memory when layers are cut. Who wants those weighed lets the search
decide (parallel=auto).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.clusters.mesh import DATA, TENSOR
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.intra_op.intra_op import IntraOpPlanner
from launcher.autopar.intra_op.memory import class_memories, stage_memory, unread_memory
from launcher.autopar.plans.plan import Plan, Stage
from launcher.autopar.plans.stage_hosts import devices_of
from launcher.autopar.programs.schedules import schedule_by_name
from launcher.autopar.realized.realize import layered_model, layers_of, solve_stage
from launcher.errors import PlanError, without_frames
from launcher.models.model import Model


def fill_in(plan: Plan, model: Model, cluster: AnyCluster, optimizer: OptimizerFootprint) -> Plan:
    """Return the plan with layers and a mesh for every stage."""
    if any(not stage.layers for stage in plan.stages):
        plan = _with_layers(plan, model, cluster)
    if any(not stage.mesh for stage in plan.stages):
        planner = IntraOpPlanner(layers_of(plan, model))
        stages = tuple(
            stage if stage.mesh else _with_mesh(plan, index, planner, cluster, optimizer)
            for index, stage in enumerate(plan.stages)
        )
        plan = replace(plan, stages=stages)
    return plan


def _with_layers(plan: Plan, model: Model, cluster: AnyCluster) -> Plan:
    layered = layered_model(model, plan.microbatch_size, plan.num_layers, key="num_layers")
    if len(layered.layers) < len(plan.stages):
        layered = layered_model(model, plan.microbatch_size, len(plan.stages), key="stages")
    devices = devices_of(plan, cluster)
    work_s = [_work_s(layered, ComputeModel(device)) for device in devices]
    ends = even_cuts(work_s, [stage.num_devices for stage in plan.stages])
    stages = tuple(
        replace(stage, layers=(first, last))
        for stage, first, last in zip(plan.stages, (0, *ends[:-1]), ends, strict=True)
    )
    return replace(plan, stages=stages, num_layers=len(layered.layers))


def _work_s(layered: LayeredModel, compute: ComputeModel) -> list[float]:
    """What each layer computes, forward and backward, on one device."""
    of_class = {
        cls.name: sum(compute.op_s(op) for op in (*cls.forward_ops, *cls.backward_ops))
        for cls in layered.classes
    }
    return [of_class[layer.cls.name] for layer in layered.layers]


def even_cuts(work: Sequence[Sequence[float]], devices: Sequence[int]) -> tuple[int, ...]:
    """Return where each stage ends, so that the largest of work over devices is least.

    Every stage gets a layer.

    Args:
        work: of each layer, by stage: what it is on one of the stage's devices.
    """
    before = [(0.0, *itertools.accumulate(amounts)) for amounts in work]
    number = len(work[0])

    def share(stage: int, first: int, end: int) -> float:
        return (before[stage][end] - before[stage][first]) / devices[stage]

    @cache
    def best(stage: int, first: int) -> tuple[float, tuple[int, ...]]:
        """The largest share of the stages from `stage` on, which get the layers from `first` on."""
        if stage == len(devices) - 1:
            return share(stage, first, number), (number,)
        found = []
        for end in range(first + 1, number - (len(devices) - 2 - stage)):
            rest, ends = best(stage + 1, end)
            found.append((max(share(stage, first, end), rest), (end, *ends)))
        return min(found)

    return best(0, 0)[1]


def _with_mesh(
    plan: Plan, index: int, planner: IntraOpPlanner, cluster: AnyCluster,
    optimizer: OptimizerFootprint,
) -> Stage:  # fmt: skip
    """The stage with the mesh that suits it best; one that contradicts what it fixes is none."""
    stage = plan.stages[index]
    schedule = schedule_by_name(plan.schedule, plan.virtual_stages)
    in_flight = schedule.stash_peak(index, len(plan.stages), plan.num_microbatches)
    device = cluster.kind_of(stage.hosts).device
    limit_bytes = device.usable_bytes / plan.virtual_stages
    found, failures = [], []
    for number, viewed in enumerate(_views(stage, plan.microbatch_size)):
        try:
            sharding = solve_stage(viewed, plan, planner, cluster, optimizer)
        except PlanError as error:
            failures.append(without_frames(error))
            continue
        wiring = planner.wiring(*stage.layers)
        unread = unread_memory(planner, sharding.settings) if wiring.unread else ()
        memories = class_memories(planner, sharding, wiring)
        needed = stage_memory(memories, wiring, stage.recompute, unread).peak_bytes(in_flight)
        price = (False, sharding.microbatch_s) if needed <= limit_bytes else (True, needed)
        found.append((price, number, viewed))
    if found:
        return min(found)[2]
    if failures:
        raise failures[0]
    raise PlanError(
        f"stages[{index}] has no mesh, and none of its {len(stage.hosts)} hosts x "
        f"{len(stage.devices)} devices shares a microbatch of {plan.microbatch_size} samples evenly "
        f"(num_microbatches={plan.num_microbatches}): write fewer microbatches, or fewer hosts"
    )


def _views(stage: Stage, microbatch_size: int) -> Iterator[Stage]:
    """Yield the stage with every mesh that its devices can have; a tensor axis stays inside a host."""
    for tensor in range(1, len(stage.devices) + 1):
        data = stage.num_devices // tensor
        if len(stage.devices) % tensor == 0 and microbatch_size % data == 0:
            yield replace(stage, mesh=((DATA, data), (TENSOR, tensor)))
