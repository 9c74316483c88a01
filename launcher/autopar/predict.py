"""What a plan promises: step time, bubble, memory, bytes sent, rate; for every plan, whoever made it.

The simulator runs the very program that the executor will run, with the durations that the intra-operator
planner priced.
"""

import math
from dataclasses import dataclass, replace

import optax

from launcher.autopar.cluster import Cluster
from launcher.autopar.compute import ComputeModel
from launcher.autopar.intra_op import StageSharding
from launcher.autopar.memory import StageMemory, class_memories, stage_memory, unread_memory
from launcher.autopar.messages import messages_of, price_messages
from launcher.autopar.optimizer_state import OptimizerFootprint
from launcher.autopar.plan import Plan, Prediction
from launcher.autopar.realize import RealizedPlan, RealizedStage, realize
from launcher.autopar.simulator import Durations, simulate
from launcher.autopar.spec import num_shards
from launcher.autopar.submesh_memory import submesh_peak_bytes
from launcher.autopar.timeline import Timeline
from launcher.autopar.trace import TracedModel
from launcher.autopar.work import aval_bytes, op_flops
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
    cluster: Cluster,
    optimizer: optax.GradientTransformation | None = None,
) -> Prediction:
    """Price a plan on a cluster, also one that was made by hand or for another cluster."""
    footprint = OptimizerFootprint(optimizer or optax.adamw(1e-3))
    return foresee(realize(plan, model, cluster, optimizer=footprint), cluster).prediction


def foresee(realized: RealizedPlan, cluster: Cluster) -> Outlook:
    """Simulate a realized plan."""
    durations = stage_durations(realized, cluster)
    timeline = simulate(realized.program, durations)
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


def model_flops_per_step(traced: TracedModel, num_microbatches: int) -> float:
    """Operations that a step needs, whatever the plan: forward once, backward twice that."""
    return 3.0 * num_microbatches * sum(op_flops(op) for op in traced.graph.ops)


def stage_durations(realized: RealizedPlan, cluster: Cluster) -> Durations:
    """How long each kind of instruction takes on each stage."""
    shardings = [stage.sharding for stage in realized.stages]
    across = price_messages(messages_of(realized), realized, cluster)
    return Durations(
        forward_s=tuple(s.forward_s for s in shardings),
        backward_s=tuple(s.backward_s for s in shardings),
        backward_input_s=tuple(s.backward_input_s for s in shardings),
        backward_weight_s=tuple(s.backward_weight_s for s in shardings),
        synchronize_s=tuple(s.seconds.synchronize for s in shardings),
        update_s=tuple(s.seconds.update for s in shardings),
        activation_s=across.activation_s,
        cotangent_s=across.cotangent_s,
        tied_s=across.tied_s,
        norm_s=max(cluster.intra_host.latency_s, cluster.inter_host.latency_s),
    )


def _peaks(realized: RealizedPlan) -> tuple[float, ...]:
    """Per stage, the most bytes that a device of its submesh needs."""
    homes, lists = realized.plan.submesh_of, realized.program.lists
    memories = [_memory(realized, stage) for stage in realized.stages]
    weight_stash = [0.0] * len(homes)
    if realized.program.splits_backward:
        weight_stash = [_weight_stash_bytes(realized, stage) for stage in realized.stages]
    peaks = []
    for submesh, instructions in enumerate(lists):
        own = [stage for stage, home in enumerate(homes) if home == submesh]
        peaks.append(
            submesh_peak_bytes(
                instructions,
                {stage: memories[stage] for stage in own},
                {stage: weight_stash[stage] for stage in own},
            )
        )
    return tuple(peaks[home] for home in homes)


def _memory(realized: RealizedPlan, stage: RealizedStage) -> StageMemory:
    wiring = realized.planner.wiring(*stage.stage.layers)
    memories = class_memories(realized.planner, stage.sharding, wiring)
    unread = unread_memory(realized.planner, stage.settings) if wiring.unread else ()
    return stage_memory(memories, wiring, stage.stage.recompute, unread)


def _weight_stash_bytes(realized: RealizedPlan, stage: RealizedStage) -> float:
    """What the first half of a microbatch's backward hands to the second, per device."""
    layers, shape = realized.planner.model.layers, stage.settings.mesh.shape
    return sum(
        aval_bytes(layers[layer].cls.joint.avals[value]) / num_shards(spec, shape)
        for layer, value, spec in stage.emitter.split.weight_kept
    )


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
    return total + messages_of(realized).bytes_per_step(plan.num_microbatches)


def _bytes_sent(realized: RealizedPlan, stage) -> StageSharding:
    """The stage priced where a byte costs one, and all else nothing: its costs are bytes per device."""
    mesh = stage.settings.mesh
    free = replace(
        stage.settings.compute.device,
        peak_flops_per_s={"fp32": math.inf},
        matmul_efficiency={"fp32": 1.0},
        memory_bytes_per_s=math.inf,
    )
    settings = replace(
        stage.settings,
        mesh=replace(mesh, alpha=(0.0,) * mesh.num_axes, beta=(1.0,) * mesh.num_axes),
        compute=ComputeModel(free),
    )
    return realized.planner.reprice(*stage.stage.layers, settings, stage.sharding.picks)
