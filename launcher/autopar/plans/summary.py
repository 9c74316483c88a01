"""A plan as plain text for terminals and logs, at most 100 columns wide.

What it promises, the stages, where the large tensors lie, and what the runners-up would cost. The
picture of the same is `plan_page`.
"""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.clusters.mesh import DATA
from launcher.autopar.plans.budget import Budget, budget_text
from launcher.autopar.plans.plan import AXIS_NAMES, Plan, Prediction, SearchStats, Stage
from launcher.autopar.plans.stage_hosts import devices_of, peak_flops_per_s, peaks_by_kind
from launcher.autopar.plans.tensor_groups import Shapes, TensorGroup, tensor_groups
from launcher.autopar.text.wording import (
    aligned,
    count,
    digits,
    either,
    large,
    noun_for,
    percent,
    ranges,
    seconds,
    shortened,
    size,
    some_ranges,
)

WIDTH = 100
_STAGES_WIDE = 13
_MOST_STAGES, _MOST_TENSORS, _MOST_PLACEMENTS = 24, 8, 3
_LEAST_FRACTION = 0.005  # of the model's bytes; smaller groups of tensors are not shown
_WIDEST = 22  # columns of a tensor's shape or spec
_SPLIT = re.compile(r"([a-z*]+)=(\d+)")
_RIGHT = frozenset(("stage", "zero", "memory", "forward", "backward", "once"))


def summarize(
    plan: Plan, cluster: AnyCluster, params: Shapes | None = None, budget: Budget | None = None
) -> str:
    """Write a plan for people.

    Args:
        cluster: For the memory's limit and the peak that MFU refers to.
        params: The model's `abstract_params`; without them neither sizes nor shapes are shown.
        budget: What a number of tokens would take, if that is asked for.
    """
    shapes = params or {}
    lines = [
        *_head(plan, cluster, shapes),
        *(_wrapped("budget", budget_text(budget)) if budget else ()),
        "",
        *_stages(plan, cluster),
        *_tensors(plan, shapes),
        *_runners_up(plan),
    ]
    return "\n".join(line.rstrip() for line in lines)


def headline(plan: Plan, cluster: AnyCluster, params: Shapes) -> str:
    """Say in one line what is planned for which machine."""
    number = sum(math.prod(spec.shape) for spec in params.values())
    known = (f"{large(number)} parameters" if number else "", plan.model.dtype or "")
    details = ", ".join(text for text in known if text)
    return (
        f"{plan.model.name} {plan.model.size}{f' ({details})' if details else ''} on "
        f"{cluster.name}, {cluster.hardware_text}"
    )


def schedule_text(plan: Plan) -> str:
    """Name a plan's schedule, and how many stages a submesh has where it has several."""
    if plan.virtual_stages == 1:
        return plan.schedule
    submeshes = count(plan.num_submeshes, "submesh")
    return f"{plan.schedule}, {plan.virtual_stages} stages on each of {submeshes}"


def candidates_text(search: SearchStats) -> str:
    """Say among how many a plan was found."""
    return f"{search.candidates:,} {noun_for(search.candidates, 'candidate')}"


def mfu(predicted: Prediction, plan: Plan, cluster: AnyCluster) -> float | None:
    """Return the predicted share of the device's peak; None where no peak is known."""
    peak = peak_flops_per_s(plan, cluster, plan.model.dtype or "")
    return None if peak is None else predicted.tflops_per_device * 1e12 / peak


def _head(plan: Plan, cluster: AnyCluster, params: Shapes) -> Iterator[str]:
    yield from _wrapped("plan", headline(plan, cluster, params))
    each = count(plan.microbatch_size, "sample")
    yield from _wrapped(
        "batch",
        f"{count(plan.global_batch, 'sample')} = {count(plan.num_microbatches, 'microbatch')} "
        f"of {each}, schedule {schedule_text(plan)}",
    )
    idle = cluster.num_devices - plan.num_devices
    if idle > 0:
        yield from _wrapped(
            "idle", f"{count(idle, 'device')} of the {cluster.num_devices}, on which no stage lies"
        )
    if plan.predicted is None:
        yield from _wrapped("predicted", "nothing, the plan has not been priced")
    else:
        yield from _promises(plan, plan.predicted, cluster)
    if plan.search is not None:
        gap = plan.search.optimality_gap
        yield from _wrapped(
            "searched",
            f"{candidates_text(plan.search)}, {count(plan.search.ilp_solved, 'sharding problem')} in "
            f"{seconds(plan.search.wall_s)}"
            f"{'' if gap is None else f'; no plan of its space is more than {percent(gap)} faster'}",
        )


def _promises(plan: Plan, predicted: Prediction, cluster: AnyCluster) -> Iterator[str]:
    share = mfu(predicted, plan, cluster)
    yield from _wrapped(
        "predicted",
        f"{seconds(predicted.step_s)} a step ({digits(plan.global_batch / predicted.step_s)} "
        f"samples/s), bubble {percent(predicted.bubble_fraction)}, "
        f"{digits(predicted.tflops_per_device)} TFLOP/s per device, "
        f"MFU {'?' if share is None else percent(share)}"
        if predicted.step_s > 0
        else "a step without work",
    )
    tops = [
        f"at most {size(peak_bytes)} of {size(device.usable_bytes)} per {word}"
        for word, device, peak_bytes in peaks_by_kind(plan, predicted, cluster)
    ]
    sent = f"{size(predicted.communicated_bytes)} sent per step by all devices"
    yield from _wrapped("", ", ".join((*tops, sent)))
    yield from _wrapped("", f"TFLOP/s count {predicted.tflops_convention}")
    if cluster.nominal:
        yield from _wrapped(
            "",
            f"the figures of {cluster.name} are nominal: compare plans by them, not with a clock",
        )


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:<11}",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )


def stage_cells(stage: Stage, cluster: AnyCluster) -> dict[str, str]:
    """Describe a stage's choices, by the names of the columns; the kind of hosts if there are several."""
    kind = cluster.kind_of(stage.hosts).device.kind
    return {
        "layers": f"{stage.layers[0]}-{stage.layers[1] - 1}" if stage.layers else "open",
        **({"kind": shortened(kind, _WIDEST)} if len(cluster.kinds) > 1 else {}),
        "hosts": some_ranges(stage.hosts, 9),
        "devices": some_ranges(stage.devices, 9),
        "mesh": " x ".join(str(length) for _, length in stage.mesh) or "open",
        "recompute": stage.recompute,
        "zero": str(stage.zero),
    }


def _stages(plan: Plan, cluster: AnyCluster) -> Iterator[str]:
    rows = []
    for index, stage in enumerate(plan.stages):
        row = {"stage": str(index), **stage_cells(stage, cluster)}
        if plan.predicted is not None:
            row |= _stage_promises(plan.predicted, index)
        rows.append(row)
    cut = len(rows) > _MOST_STAGES
    shown = (*rows[: _MOST_STAGES // 2], *rows[-_MOST_STAGES // 2 :]) if cut else rows
    head, *body = _table(shown)
    yield head
    yield from body[: _MOST_STAGES // 2] if cut else body
    if cut:
        yield f"  ... {len(rows) - _MOST_STAGES} stages more ..."
        yield from body[_MOST_STAGES // 2 :]
    note = f"layers: first-last; mesh: {' x '.join(AXIS_NAMES)}"
    if plan.predicted is not None:
        limits = either(
            list(dict.fromkeys(size(d.usable_bytes) for d in devices_of(plan, cluster)))
        )
        note += f"; memory: of {limits}; times: of a microbatch; once: of a step"
    if plan.virtual_stages > 1:
        note += f"; stages i and i + {plan.num_submeshes} share a submesh and its memory"
    scattering = [index for index, stage in enumerate(plan.stages) if scatters(stage)]
    overlapping = [index for index, stage in enumerate(plan.stages) if stage.overlap]
    for stages, what in (
        (scattering, "scattered behind every microbatch, and summed in shards"),
        (overlapping, "synchronised during the last backward pass"),
    ):
        if stages:
            word = "stage" if len(stages) == 1 else "stages"
            note += f"; gradients of {word} {ranges(stages)}: {what}"
    yield from textwrap.wrap(note, WIDTH)


def scatters(stage: Stage) -> bool:
    """Whether its gradients are scattered behind every microbatch; on a data axis of 1 there is nowhere."""
    return stage.scatter and dict(stage.mesh).get(DATA, 1) > 1


def _stage_promises(predicted: Prediction, index: int) -> dict[str, str]:
    once_s = predicted.stage_sync_s[index] + predicted.stage_update_s[index]
    return {
        "memory": size(predicted.peak_bytes_per_device[index]),
        "forward": seconds(predicted.stage_forward_s[index]),
        "backward": seconds(predicted.stage_backward_s[index]),
        "once": seconds(once_s),
    }


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Align rows of cells under their names."""
    names = list(rows[0])
    right = [index for index, name in enumerate(names) if name in _RIGHT]
    return aligned((names, *([row[name] for name in names] for row in rows)), right)


def _tensors(plan: Plan, params: Shapes) -> Iterator[str]:
    groups = tensor_groups(plan, params)
    if not groups:
        return
    least_bytes = _LEAST_FRACTION * sum(group.num_bytes for group in groups)
    shown = [group for group in groups if group.num_bytes >= least_bytes][:_MOST_TENSORS]
    yield ""
    rows = [row for group in shown for row in _tensor_rows(group)]
    others = [name for name in rows[0] if name != "tensor"]
    room = WIDTH - sum(2 + max(len(name), *(len(row[name]) for row in rows)) for name in others)
    yield from _table([row | {"tensor": shortened(row["tensor"], room)} for row in rows])
    yield f"the {len(shown)} largest of {count(len(groups), 'group')}; {_legend(shown)}"


def _legend(groups: Sequence[TensorGroup]) -> str:
    """Explain how specs are written by the first axis that splits a tensor here."""
    splits = (
        split
        for group in groups
        for placement in group.placements[:_MOST_PLACEMENTS]
        for split in (placement.weights, placement.optimizer_state)
    )
    found = _SPLIT.search(" ".join(split.text for split in splits if split))
    if found is None:
        return "-: a dim that is not split"
    axis, devices = found.groups()
    return (
        f"[-, {axis}={devices}]: dim 1 is split over the {devices} devices of the {axis} "
        f"{'axes' if '*' in axis else 'axis'}"
    )


def _tensor_rows(group: TensorGroup) -> Iterator[dict[str, str]]:
    times = f"{group.members} x " if group.members > 1 else ""
    shape = "" if group.shape is None else str(list(group.shape))
    name, kind = group.name, shortened(f"{times}{shape}", _WIDEST)
    for placement in group.placements[:_MOST_PLACEMENTS]:
        state = placement.optimizer_state
        yield {
            "tensor": name,
            "shape": kind,
            "stages": some_ranges(placement.stages, _STAGES_WIDE),
            "weights": shortened(placement.weights.text, _WIDEST),
            "optimizer state": shortened(state.text if state else "", _WIDEST),
        }
        name = kind = ""
    others = group.placements[_MOST_PLACEMENTS:]
    if others:
        yield {
            "tensor": "",
            "shape": "",
            "stages": some_ranges({i for other in others for i in other.stages}, _STAGES_WIDE),
            "weights": "in other ways",
            "optimizer state": "",
        }


def _runners_up(plan: Plan) -> Iterator[str]:
    if not plan.runners_up:
        return
    yield ""
    yield "runners-up"
    for runner_up in plan.runners_up:
        text = f"{runner_up.description}: {runner_up.why}"
        lead = f"  {seconds(runner_up.step_s):>8}  "
        yield from textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * 12)
