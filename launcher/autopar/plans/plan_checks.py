"""What must hold of a plan, as far as it can be proven without the model.

What else must hold, such as that a tensor's dim divides, is found when the plan is realized.
"""

import math
from dataclasses import dataclass

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.plans.plan import (
    AXIS_NAMES,
    LARGEST_ZERO,
    PLAN_VERSION,
    RECOMPUTE_NAMES,
    Plan,
    Prediction,
    SpecList,
    Stage,
    axes_of,
)
from launcher.autopar.programs.schedules import SCHEDULE_NAMES
from launcher.autopar.text.wording import count, ranges
from launcher.errors import PlanError


def check_without_model(
    plan: Plan, num_layers: int | None, cluster: AnyCluster, fingerprint: str | None = None
) -> None:
    """Raise `PlanError` for the first thing that cannot be.

    Args:
        num_layers: Of the model; None leaves that to the plan.
        cluster: That the plan shall run on, which need not be the one it was made for.
        fingerprint: Of the model that shall be trained.
    """
    _check_head(plan, fingerprint)
    _check_layers(plan, num_layers)
    _check_submeshes(plan)
    _check_devices(plan, cluster)
    for index, stage in enumerate(plan.stages):
        _check_stage(f"stages[{index}]", stage)
    if plan.predicted is not None:
        _check_prediction(plan.predicted, len(plan.stages))


def _check_head(plan: Plan, fingerprint: str | None) -> None:
    if plan.version != PLAN_VERSION:
        raise PlanError(
            f"version={plan.version} is not {PLAN_VERSION}, the one that this launcher reads: "
            "plan again, or take the launcher that wrote the plan"
        )
    given = plan.model.fingerprint
    if fingerprint is not None and given is not None and given != fingerprint:
        raise PlanError(
            f"model.fingerprint={given} is not {fingerprint}, that of the model to train: "
            f"train model={plan.model.name} model.size={plan.model.size} as it was when it was "
            "planned, or plan again"
        )
    _check_known("schedule", plan.schedule, SCHEDULE_NAMES)
    _check_virtual_stages(plan)
    if plan.num_microbatches < 1 or plan.global_batch % plan.num_microbatches:
        raise PlanError(
            f"num_microbatches={plan.num_microbatches} does not divide "
            f"global_batch={plan.global_batch}: choose a divisor"
        )


def _check_virtual_stages(plan: Plan) -> None:
    given = f"virtual_stages={plan.virtual_stages}"
    if plan.schedule == "interleaved" and plan.virtual_stages < 2:
        raise PlanError(
            f"{given} is less than 2, the least that schedule=interleaved takes: write 2 or more, or "
            "schedule=1f1b"
        )
    if plan.schedule != "interleaved" and plan.virtual_stages != 1:
        raise PlanError(
            f"{given} is not 1, all that schedule={plan.schedule} takes: write 1, or "
            "schedule=interleaved"
        )


def _check_submeshes(plan: Plan) -> None:
    """Virtual stages share out, and the microbatches group by the submeshes."""
    v, number = plan.virtual_stages, len(plan.stages)
    if number % v:
        raise PlanError(
            f"stages has {number} entries, no multiple of virtual_stages={v}, the stages of a submesh: "
            f"give {number - number % v} or {number - number % v + v}"
        )
    if v > 1 and plan.num_microbatches % plan.num_submeshes:
        raise PlanError(
            f"num_microbatches={plan.num_microbatches} is no multiple of {plan.num_submeshes}, the "
            f"submeshes of {number} stages with virtual_stages={v}, by which schedule=interleaved "
            f"groups them: write a multiple of {plan.num_submeshes}, or schedule=1f1b"
        )


def _check_layers(plan: Plan, num_layers: int | None) -> None:
    if not plan.stages:
        raise PlanError("stages=[] has 0 stages, at least 1 is needed: add one")
    open_stages = [index for index, stage in enumerate(plan.stages) if not stage.layers]
    if len(open_stages) == len(plan.stages):
        return
    if open_stages:
        raise PlanError(
            f"stages[{open_stages[0]}].layers is left out, and {len(plan.stages) - len(open_stages)} of "
            f"{len(plan.stages)} stages have theirs: give them all, or none"
        )
    end = 0
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers
        place = f"stages[{index}].layers=[{first}, {last}]"
        if first != end:
            where = f"stage {index - 1} ends" if index else "the model begins"
            raise PlanError(
                f"{place} begins at {first}, and {where} at {end}: write [{end}, {last}]"
            )
        if last <= first:
            raise PlanError(f"{place} ends at {last}, not after {first}: give it a layer")
        end = last
    for name, wanted in (("num_layers", plan.num_layers), ("the model's layers", num_layers)):
        if wanted is not None and wanted != end:
            raise PlanError(
                f"stages[{len(plan.stages) - 1}].layers ends at {end}, not at {name}={wanted}: "
                f"let the stages cover [0, {wanted}]"
            )


def _check_devices(plan: Plan, cluster: AnyCluster) -> None:
    """All submeshes lie inside the cluster, and none on top of another."""
    user: dict[tuple[int, int], int] = {}
    hosts = _Extent(cluster.num_hosts, max((h for s in plan.stages for h in s.hosts), default=0))
    last_device = max((d for s in plan.stages for d in s.devices), default=0)
    for index, stage in enumerate(plan.stages):
        first = index % plan.num_submeshes
        if index != first:
            _check_same_place(plan, first, index)
            continue
        place = f"stages[{index}]"
        kind = cluster.kind_of(stage.hosts, f"{place}.hosts")
        devices = _Extent(kind.devices_per_host, last_device)
        _check_indices(f"{place}.hosts", stage.hosts, hosts, "cluster.hosts")
        _check_indices(f"{place}.devices", stage.devices, devices, "cluster.devices_per_host")
        for where in ((host, device) for host in stage.hosts for device in stage.devices):
            if where in user:
                raise PlanError(
                    f"{place}.devices: device {where[1]} of host {where[0]} is used twice, by "
                    f"stage {user[where]} too: give each stage its own devices"
                )
            user[where] = index


def _check_same_place(plan: Plan, first: int, index: int) -> None:
    one, other = plan.stages[first], plan.stages[index]
    if (one.hosts, one.devices) != (other.hosts, other.devices):
        raise PlanError(
            f"stages[{index}] has hosts={list(other.hosts)} and devices={list(other.devices)}, and "
            f"stages[{first}] on the same submesh (virtual_stages={plan.virtual_stages}) has "
            f"{list(one.hosts)} and {list(one.devices)}: write the same"
        )


@dataclass(frozen=True, slots=True)
class _Extent:
    """How many hosts, or devices of a host, there are, and the last that a plan names."""

    number: int
    last: int


def _check_indices(place: str, indices: tuple[int, ...], extent: _Extent, key: str) -> None:
    if not indices:
        raise PlanError(f"{place}=[] has 0 entries, at least 1 is needed: add one")
    limit, missing = extent.number, [i for i in indices if not 0 <= i < extent.number]
    if missing:
        raise PlanError(
            f"{place} has {ranges(missing)}, outside 0..{limit - 1} ({key}={limit}): "
            f"stay inside the cluster, take one that has all ({key}={max(limit, extent.last + 1)}), or "
            f"plan again for this one"
        )
    if len(set(indices)) < len(indices):
        raise PlanError(f"{place}={list(indices)} names an index twice: drop one")


def _check_stage(place: str, stage: Stage) -> None:
    _check_known(f"{place}.recompute", stage.recompute, RECOMPUTE_NAMES)
    if not 0 <= stage.zero <= LARGEST_ZERO:
        raise PlanError(
            f"{place}.zero={stage.zero} is not in 0..{LARGEST_ZERO}: choose one of them"
        )
    if stage.scatter and stage.zero < 2:
        raise PlanError(
            f"{place}.scatter=true scatters gradients to where the optimizer's state lies in shards, and "
            f"{place}.zero={stage.zero} has every device keep whole gradients: write zero 2 or 3, or false"
        )
    if stage.mesh:
        _check_mesh(place, stage)
    for table, specs in (("params", stage.params), ("optimizer_state", stage.optimizer_state)):
        for path, spec in specs.items():
            _check_spec(f"{place}.{table}['{path}']", spec, AXIS_NAMES)


def _check_mesh(place: str, stage: Stage) -> None:
    names = tuple(name for name, _ in stage.mesh)
    if names != AXIS_NAMES:
        raise PlanError(
            f"{place}.mesh has the axes {', '.join(names) or 'of nothing'}, not "
            f"{' and '.join(AXIS_NAMES)}: write both, in this order"
        )
    lengths = tuple(length for _, length in stage.mesh)
    shape = " x ".join(f"{name}={length}" for name, length in stage.mesh)
    if min(lengths) < 1 or math.prod(lengths) != stage.num_devices:
        raise PlanError(
            f"{place}.mesh {shape} is {math.prod(lengths)} devices, and "
            f"{count(len(stage.hosts), 'host')} x {count(len(stage.devices), 'device')} are "
            f"{stage.num_devices}: change the mesh or the devices"
        )


def _check_spec(place: str, spec: SpecList, names: tuple[str, ...]) -> None:
    used = list(axes_of(spec))
    for name in used:
        _check_known(place, name, names)
    if len(set(used)) < len(used):
        raise PlanError(
            f"{place}={[*spec]} splits by an axis twice, which has its devices once: drop one"
        )


def _check_known(place: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise PlanError(f"{place}={name} is unknown: take {' or '.join(known)}")


def _check_prediction(predicted: Prediction, num_stages: int) -> None:
    for name, values in (
        ("peak_bytes_per_device", predicted.peak_bytes_per_device),
        ("stage_forward_s", predicted.stage_forward_s),
        ("stage_backward_s", predicted.stage_backward_s),
        ("stage_sync_s", predicted.stage_sync_s),
        ("stage_update_s", predicted.stage_update_s),
    ):
        if len(values) != num_stages:
            raise PlanError(
                f"predicted.{name} has {len(values)} entries for {num_stages} stages: "
                "drop `predicted`, the launcher prices the plan anew"
            )
