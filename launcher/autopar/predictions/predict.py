"""What a plan promises: step time, bubble, memory, bytes sent, rate; for every plan, whoever made it.

The simulator runs the very program that the executor will run, with the durations that the intra-operator
planner priced.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import optax

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.trace import TracedModel
from launcher.autopar.graphs.work import op_flops
from launcher.autopar.intra_op.intra_op import StageSharding
from launcher.autopar.intra_op.launch_arrays import launch_arrays
from launcher.autopar.plans.plan import Plan, Prediction
from launcher.autopar.plans.stage_hosts import devices_of, submeshes_at_hand
from launcher.autopar.predictions.predicted_buffers import predicted_buffers
from launcher.autopar.predictions.synchronization import synchronization_s
from launcher.autopar.programs.buffers import peak
from launcher.autopar.programs.crowded import Crowd, simulate_crowded
from launcher.autopar.programs.launches import submesh_launches
from launcher.autopar.programs.simulator import Durations, simulate
from launcher.autopar.programs.timeline import Timeline
from launcher.autopar.realized.messages import price_messages
from launcher.autopar.realized.open_stages import fill_in
from launcher.autopar.realized.realize import RealizedPlan, realize
from launcher.models.model import Model

FLOPS_CONVENTION = "model FLOPs: 3 x the forward matrix products and convolutions, no recomputation"


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """A prediction, and the timeline that it was read off."""

    prediction: Prediction
    timeline: Timeline


def predict(
    plan: Plan,
    model: Model,
    cluster: AnyCluster,
    optimizer: optax.GradientTransformation | None = None,
) -> Prediction:
    """Price a plan on a cluster, also one that was made by hand or for another cluster."""
    footprint = OptimizerFootprint(optimizer or optax.adamw(1e-3))
    plan = fill_in(plan, model, cluster, footprint)
    return foresee(realize(plan, model, cluster, optimizer=footprint), cluster).prediction


def foresee(realized: RealizedPlan, cluster: AnyCluster) -> Outlook:
    """Simulate a realized plan."""
    durations = stage_durations(realized, cluster)
    timeline = _play(realized, cluster, durations)
    plan = realized.plan
    flops = model_flops_per_step(realized.planner.model.traced, plan.num_microbatches)
    prediction = Prediction(
        step_s=timeline.step_s,
        bubble_fraction=timeline.bubble_fraction,
        peak_bytes_per_device=_peaks(realized),
        tflops_per_device=flops / timeline.step_s / plan.num_devices / 1e12,
        tflops_convention=FLOPS_CONVENTION,
        communicated_bytes=_communicated_bytes(realized),
        stage_forward_s=durations.forward_s,
        stage_backward_s=durations.backward_s,
        stage_sync_s=durations.synchronize_s,
        stage_update_s=durations.update_s,
    )
    return Outlook(prediction, timeline)


def _play(realized: RealizedPlan, cluster: AnyCluster, durations: Durations) -> Timeline:
    """Simulate the program, on hosts whose devices slow one another down if these do."""
    crowd = crowd_of(realized.plan, cluster, [s.settings.compute for s in realized.stages])
    if crowd is None:
        return simulate(realized.program, durations)
    return simulate_crowded(realized.program, durations, crowd)


def crowd_of(plan: Plan, cluster: AnyCluster, priced: Sequence[ComputeModel]) -> Crowd | None:
    """Who shares a machine with whom in a plan; None where that costs nothing.

    Args:
        priced: by stage, what its durations were priced with.
    """
    kinds = devices_of(plan, cluster)
    if not any(device.slows_others for device in kinds):
        return None
    first_stages = list(zip(plan.submeshes, kinds, priced, strict=False))
    return Crowd(
        devices=tuple(
            Counter(cluster.machine_of(host) for host in stage.hosts for _ in stage.devices)
            for stage, _, _ in first_stages
        ),
        slowdown=tuple(device.slowdown for _, device, _ in first_stages),
        priced=tuple(device.slowdown(compute.at_once) for _, device, compute in first_stages),
    )


def model_flops_per_step(traced: TracedModel, num_microbatches: int) -> float:
    """Operations that a step needs, whatever the plan: forward once, backward twice that."""
    return 3.0 * num_microbatches * sum(op_flops(op) for op in traced.graph.ops)


def neighbours_of(plan: Plan, cluster: AnyCluster) -> tuple[int, ...]:
    """Of each stage, how many submeshes its machine has a part of, its own included.

    One thread of the machine starts the programs of all, one after the other, so that starting one of each
    takes as long as all of them.
    """
    machines = [{cluster.machine_of(host) for host in stage.hosts} for stage in plan.submeshes]
    counts = submeshes_at_hand(machines)
    return tuple(counts[home] for home in plan.submesh_of)


def stage_durations(realized: RealizedPlan, cluster: AnyCluster) -> Durations:
    """How long each kind of instruction takes on each stage."""
    shardings = [stage.sharding for stage in realized.stages]
    across = price_messages(realized.messages, realized.stages, cluster)
    arrays = [
        launch_arrays(
            realized.planner, *stage.stage.layers, stage.stage.recompute, stage.settings.optimizer
        )
        for stage in realized.stages
    ]
    kinds, neighbours = (
        devices_of(realized.plan, cluster),
        neighbours_of(realized.plan, cluster),
    )

    def with_arrays(seconds: Iterable[float], counts: Iterable[int]) -> tuple[float, ...]:
        """The seconds have the launch of the stage's own program without its arrays."""
        return tuple(
            own_s + (number - 1) * kind.program_launch_s + number * count * kind.array_launch_s
            for own_s, count, kind, number in zip(seconds, counts, kinds, neighbours, strict=True)
        )

    return Durations(
        forward_s=with_arrays((s.forward_s for s in shardings), (a.forward for a in arrays)),
        backward_s=with_arrays((s.backward_s for s in shardings), (a.backward for a in arrays)),
        backward_input_s=with_arrays(
            (s.backward_input_s for s in shardings), (a.backward for a in arrays)
        ),
        backward_weight_s=with_arrays(
            (s.backward_weight_s for s in shardings), (a.backward for a in arrays)
        ),
        synchronize_s=tuple(
            synchronization_s(realized, stage) if stage.stage.overlap else own_s
            for stage, own_s in zip(
                realized.stages,
                with_arrays((s.synchronize_s for s in shardings), (a.synchronize for a in arrays)),
                strict=True,
            )
        ),
        update_s=with_arrays((s.update_s for s in shardings), (a.update for a in arrays)),
        activation_s=across.activation_s,
        cotangent_s=across.cotangent_s,
        tied_s=across.tied_s,
        norm_s=max(link.latency_s for link in cluster.links),
    )


def _peaks(realized: RealizedPlan) -> tuple[float, ...]:
    """Per stage, the most bytes that a device of its submesh needs."""
    buffers = {index: predicted_buffers(realized, index) for index in range(len(realized.stages))}
    found: dict[int, float] = {}
    for launches in submesh_launches(realized.program, realized.wiring):
        stages = {launch.first.stage for launch in launches}
        _, parts = peak(launches, {index: buffers[index] for index in stages})
        found |= dict.fromkeys(stages, sum(parts.values()))
    return tuple(found[index] for index in range(len(realized.stages)))


def _communicated_bytes(realized: RealizedPlan) -> float:
    """Bytes that all devices send per step, in collectives and between stages."""
    plan = realized.plan
    total = 0.0
    for stage in realized.stages:
        sent = _bytes_sent(realized, stage)
        per_device = (
            plan.num_microbatches * (sent.forward_s + sent.backward_s) + sent.seconds.synchronize
        )
        total += per_device * len(stage.stage.hosts) * len(stage.stage.devices)
    return total + realized.messages.bytes_per_step(plan.num_microbatches)


def _bytes_sent(realized: RealizedPlan, stage) -> StageSharding:
    """The stage priced where a byte costs one, and all else nothing: its costs are bytes per device."""
    mesh = stage.settings.mesh
    free = replace(
        stage.settings.compute.device,
        peak_flops_per_s={"fp32": math.inf},
        matmul_efficiency={"fp32": 1.0},
        memory_bytes_per_s=math.inf,
        matmul_curve={},
        convolution_curve={},
        kernel_gradient_curve={},
        batched_matmul_curve={},
        element_s={},
        op_overhead_s=0.0,
        program_launch_s=0.0,
    )
    settings = replace(
        stage.settings,
        mesh=replace(mesh, alpha=(0.0,) * mesh.num_axes, beta=(1.0,) * mesh.num_axes, wired=None),
        compute=ComputeModel(free),
    )
    return realized.planner.reprice(*stage.stage.layers, settings, stage.sharding.picks)
