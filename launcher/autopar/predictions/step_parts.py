"""Where the time of a step goes: seven parts that add up to it, per submesh or on the average device.

    computation       the forward and backward passes, without collectives, and starting all programs
    recomputation     what of the forward passes is run once more, collectives included
    communication     collectives inside stages, in those passes
    synchronization   of gradients, once a step; what is not hidden behind the last backward pass
    update            of parameters, once a step
    transfers         a submesh idles, and would not if values came from other stages in no time
    bubble            it idles all the same

The average weighs a submesh by its devices, so that "computation" of two plans that share the same work
evenly is the same, however the cluster is cut. The share that summaries call the bubble is transfers and
bubble together, averaged over submeshes. Where devices slow one another down, what a submesh does is priced
as if all of them computed, and takes that much less by the timeline: all its parts then shrink alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.autopar.predictions.synchronization import synchronization_s
from launcher.autopar.programs.timeline import Timeline
from launcher.autopar.realized.realize import RealizedPlan
from launcher.autopar.realized.realized_stage import RealizedStage
from launcher.autopar.sharding.collectives import combine_cost

PARTS = (
    "computation", "recomputation", "communication", "synchronization", "update", "transfers",
    "bubble",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of a step, by what they are spent on."""

    computation_s: float = 0.0
    recomputation_s: float = 0.0
    communication_s: float = 0.0
    synchronization_s: float = 0.0
    update_s: float = 0.0
    transfers_s: float = 0.0
    bubble_s: float = 0.0

    def named(self) -> dict[str, float]:
        """Return the parts by the names of `PARTS`, in that order."""
        return {
            "computation": self.computation_s,
            "recomputation": self.recomputation_s,
            "communication": self.communication_s,
            "synchronization": self.synchronization_s,
            "update": self.update_s,
            "transfers": self.transfers_s,
            "bubble": self.bubble_s,
        }

    @property
    def step_s(self) -> float:
        return sum(self.named().values())


def submesh_parts(realized: RealizedPlan, timeline: Timeline) -> tuple[StepParts, ...]:
    """Take the simulated step of each submesh apart."""
    plan = realized.plan
    found = []
    for submesh, exposed_s in enumerate(timeline.exposed_s):
        own = [
            stage
            for stage, home in zip(realized.stages, plan.submesh_of, strict=True)
            if home == submesh
        ]
        busy = _as_played(
            _total([_busy(realized, stage) for stage in own]), timeline.busy_s[submesh]
        )
        idle_s = max(0.0, timeline.step_s - timeline.busy_s[submesh])
        transfers_s = min(idle_s, max(0.0, exposed_s))
        found.append(StepParts(**busy, transfers_s=transfers_s, bubble_s=idle_s - transfers_s))
    return tuple(found)


def average(parts: Sequence[StepParts], weights: Sequence[float]) -> StepParts:
    """Return the mean of several submeshes' parts."""
    total = sum(weights)
    named = [part.named() for part in parts]
    return StepParts(
        **{
            f"{name}_s": sum(w * each[name] for w, each in zip(weights, named, strict=True)) / total
            for name in PARTS
        }
    )


def device_parts(realized: RealizedPlan, timeline: Timeline) -> StepParts:
    """Take the step of the average device apart."""
    weights = [stage.num_devices for stage in realized.plan.submeshes]
    return average(submesh_parts(realized, timeline), weights)


def _busy(realized: RealizedPlan, stage: RealizedStage) -> dict[str, float]:
    """What one stage does in a step."""
    times, sharding = realized.plan.num_microbatches, stage.sharding
    passes_s = sharding.seconds.forward + sharding.seconds.backward
    computation_s = min(passes_s, _computation_s(realized, stage))
    again_s = sharding.seconds.recomputed(stage.stage.recompute)
    return {
        "computation_s": times * computation_s,
        "recomputation_s": times * again_s,
        "communication_s": times * (passes_s - computation_s),
        "synchronization_s": synchronization_s(realized, stage),
        "update_s": sharding.seconds.update,
    }


def _as_played(busy: dict[str, float], busy_s: float) -> dict[str, float]:
    """The parts of what a submesh does, so that they add up to what it does by the timeline.

    What is left over is starting programs.
    """
    total_s = sum(busy.values())
    if total_s > busy_s:
        return {name: part_s * busy_s / total_s for name, part_s in busy.items()}
    return {**busy, "computation_s": busy["computation_s"] + busy_s - total_s}


def _computation_s(realized: RealizedPlan, stage: RealizedStage) -> float:
    """Of a microbatch, both passes: what the ops of a stage cost where no link is used."""
    planner, sharding = realized.planner, stage.sharding
    mesh = sharding.settings.mesh
    problem = planner.problem(*stage.stage.layers, sharding.settings)
    total_s = 0.0
    for node in problem.nodes:
        if node.key[0] != "op":
            continue
        _, name, index = node.key
        picked = sharding.picks[node.key]
        op = planner.classes[name].joint.ops[index]
        op_s = node.costs[problem.choices[node.key].index(picked)] - combine_cost(op, picked, mesh)
        part = node.part
        runs = part.forward + part.backward_input + part.backward_weight
        total_s += problem.counts.get(node.group, 0) * runs * float(op_s)
    return total_s


def _total(stages: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(stage[name] for stage in stages) for name in stages[0]}
