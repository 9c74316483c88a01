"""plan.html: a plan as a page to look at, in one file that needs nothing else.

What it promises, which devices do what, where each stage's time and memory go, the timeline of a
step, where the tensors lie, and what the runners-up would have cost. Pictures are SVG inside the
page; there are no scripts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from launcher.autopar.answers.answers import Answers
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.pages import answers_page, html_page, svg
from launcher.autopar.pages.cluster_picture import cluster_svg
from launcher.autopar.pages.html_page import cell, number, section, table
from launcher.autopar.pages.stage_bars import bar_legend, memory_bar, time_bar
from launcher.autopar.pages.timeline_picture import timeline_svg
from launcher.autopar.plans.plan import AXIS_NAMES, Plan, Prediction
from launcher.autopar.plans.stage_hosts import devices_of, peaks_by_kind
from launcher.autopar.plans.summary import (
    candidates_text,
    headline,
    mfu,
    scatters,
    schedule_text,
    stage_cells,
)
from launcher.autopar.plans.tensor_groups import Shapes, Split, TensorGroup, tensor_groups
from launcher.autopar.predictions.step_parts import StepParts
from launcher.autopar.programs.timeline import Timeline
from launcher.autopar.text.atomic_file import write_atomically
from launcher.autopar.text.wording import count, digits, either, percent, ranges, seconds, size

_MOST_GROUPS = 200
_GLYPH = 34  # px
_MOST_CUTS = 16  # that a glyph of this size can show


@dataclass(frozen=True, slots=True, kw_only=True)
class PageExtras:
    """What a page shows besides the plan and its step.

    Attributes:
        params: The model's `abstract_params`, for sizes and shapes.
        parts: Where each submesh's time goes.
    """

    params: Shapes = field(default_factory=dict)
    parts: Sequence[StepParts] = ()
    answers: Answers = field(default_factory=Answers)


_NO_EXTRAS = PageExtras()


def write_page(
    plan: Plan, timeline: Timeline, cluster: AnyCluster, path: Path, extras: PageExtras = _NO_EXTRAS
) -> None:
    """Write plan.html."""
    write_atomically(path, page(plan, timeline, cluster, extras))


def page(
    plan: Plan, timeline: Timeline, cluster: AnyCluster, extras: PageExtras = _NO_EXTRAS
) -> str:
    """Return the page as a text."""
    shapes = extras.params
    sections = (
        _head(plan, cluster, extras),
        _machine(plan, cluster),
        _stages(plan, extras.parts, cluster),
        section("A step in time", "", timeline_svg(timeline, alone=False)),
        *answers_page.sections(extras.answers),
        _tensors(plan, shapes),
        _runners_up(plan),
    )
    return html_page.document(
        f"Plan of {plan.model.name} {plan.model.size} on {cluster.name}", sections
    )


def _head(plan: Plan, cluster: AnyCluster, extras: PageExtras) -> str:
    batch = (
        f"{count(plan.global_batch, 'sample')} a step, number of microbatches: "
        f"{plan.num_microbatches}, of {count(plan.microbatch_size, 'sample')} each; "
        f"schedule {schedule_text(plan)}"
    )
    if plan.search is not None:
        batch += f"; found in {seconds(plan.search.wall_s)} among {candidates_text(plan.search)}"
    nominal = (
        f'<div class="note">The figures of {escape(cluster.name)} are nominal, not measured: '
        "compare plans by them, not with a clock.</div>"
        if cluster.nominal
        else ""
    )
    return (
        f"<h1>{escape(headline(plan, cluster, extras.params))}</h1><p>{escape(batch)}</p>"
        f"{html_page.tiles(_promises(plan, cluster))}{nominal}"
        f"{answers_page.budget_note(extras.answers.budget)}\n"
    )


def _promises(plan: Plan, cluster: AnyCluster) -> Iterator[tuple[str, str]]:
    yield "stages", str(len(plan.stages))
    predicted = plan.predicted
    if predicted is not None:
        share = mfu(predicted, plan, cluster)
        yield "a step, predicted", seconds(predicted.step_s)
        yield "bubble", percent(predicted.bubble_fraction)
        yield "TFLOP/s per device", digits(predicted.tflops_per_device)
        yield "MFU", "unknown" if share is None else percent(share)
        for word, device, peak_bytes in peaks_by_kind(plan, predicted, cluster):
            yield f"of {size(device.usable_bytes)} per {word}", size(peak_bytes)
        yield "sent per step", size(predicted.communicated_bytes)


def _machine(plan: Plan, cluster: AnyCluster) -> str:
    sizes = {stage.num_devices for stage in plan.stages}
    each = f"{count(min(sizes), 'device')} each" if len(sizes) == 1 else "devices as shown"
    used = count(plan.num_submeshes, "stage")
    number = "the number its stage"
    if plan.virtual_stages > 1:
        used = count(plan.num_submeshes, "submesh")
        number = f"the number the first of the {plan.virtual_stages} stages on its submesh"
    lead = f"{used} of {each}; a column is a host, a box a device, {number}."
    return section("Who does what", lead, cluster_svg(plan, cluster))


def _stages(plan: Plan, parts: Sequence[StepParts], cluster: AnyCluster) -> str:
    heads, devices = ["stage", *stage_cells(plan.stages[0], cluster)], devices_of(plan, cluster)
    heads[heads.index("mesh")] = " x ".join(AXIS_NAMES)
    predicted = plan.predicted
    if parts:
        heads.append(f"time of a step, {seconds(parts[0].step_s)}")
    if predicted is not None:
        limits = dict.fromkeys(size(device.usable_bytes) for device in devices)
        heads += ["forward", "backward", f"memory of {either(list(limits))}"]
    rows = []
    for index, stage in enumerate(plan.stages):
        values = stage_cells(stage, cluster)
        values["zero"] += ", scattered" if scatters(stage) else ""
        cells = [number(str(index)), *map(cell, values.values())]
        if parts:
            own = parts[plan.submesh_of[index]]
            cells.append(f"<td>{time_bar(own, own.step_s)}</td>")
        if predicted is not None:
            cells += _promised_cells(predicted, index, devices[index].usable_bytes)
        rows.append("".join(cells))
    legend = bar_legend(parts) if parts else ""
    lead = "Layers: the first and the last of a stage. Forward, backward: of a microbatch."
    if plan.virtual_stages > 1:
        lead += (
            " Time of a step, memory: of the submesh, which has all stages with the same devices."
        )
    return section("The stages", lead, legend + table(heads, rows))


def _promised_cells(predicted: Prediction, index: int, limit_bytes: float) -> list[str]:
    return [
        number(seconds(predicted.stage_forward_s[index])),
        number(seconds(predicted.stage_backward_s[index])),
        f"<td>{memory_bar(predicted.peak_bytes_per_device[index], limit_bytes)}</td>",
    ]


def _tensors(plan: Plan, params: Shapes) -> str:
    groups = tensor_groups(plan, params)
    if not groups:
        return ""
    lead = (
        "[-, tensor=4]: dim 0 is whole, dim 1 is split over the 4 devices of the tensor axis. A "
        "square is a tensor, its last dim from left to right; what one device holds is filled."
    )
    rows = [row for group in groups[:_MOST_GROUPS] for row in _tensor_rows(group)]
    if len(groups) > _MOST_GROUPS:
        rest = len(groups) - _MOST_GROUPS
        rows.append(f'<td colspan="7">and {count(rest, "group")} of smaller tensors</td>')
    heads = ("tensors", "", "shape", "all of them", "stages", "weights", "optimizer state")
    return section("Where the tensors lie", lead, table(heads, rows))


def _tensor_rows(group: TensorGroup) -> Iterator[str]:
    times = f"{group.members} x" if group.members > 1 else ""
    shape = "" if group.shape is None else str(list(group.shape))
    lead = [
        f"<td><code>{escape(group.name)}</code></td>",
        number(times),
        cell(shape),
        number(size(group.num_bytes) if group.num_bytes else ""),
    ]
    for placement in group.placements:
        cells = [*lead, cell(ranges(placement.stages))]
        for split in (placement.weights, placement.optimizer_state):
            cells.append("<td></td>" if split is None else _split(split))
        yield "".join(cells)
        lead = ["<td></td>"] * 4


def _split(split: Split) -> str:
    return f'<td><div class="split">{_glyph(split)}<code>{escape(split.text)}</code></div></td>'


def _glyph(split: Split) -> str:
    """A square cut as the tensor is: the last dim across, all others down."""
    rows, columns = math.prod(split.shards[:-1]), math.prod(split.shards[-1:])
    width, height = _GLYPH / min(columns, _MOST_CUTS), _GLYPH / min(rows, _MOST_CUTS)
    cuts = [
        svg.rectangle(1, 1, _GLYPH, _GLYPH, "idle"),
        svg.rectangle(1, 1, width, height, "forward"),
    ]
    for column in range(min(columns, _MOST_CUTS) + 1):
        cuts.append(svg.line(1 + column * width, 1, 1 + column * width, 1 + _GLYPH, "hatch"))
    for row in range(min(rows, _MOST_CUTS) + 1):
        cuts.append(svg.line(1, 1 + row * height, 1 + _GLYPH, 1 + row * height, "hatch"))
    return svg.picture(_GLYPH + 2, _GLYPH + 2, "".join(cuts), label=split.text)


def _runners_up(plan: Plan) -> str:
    if not plan.runners_up:
        return ""
    rows = [
        "".join((number(seconds(other.step_s)), cell(other.description), cell(other.why)))
        for other in plan.runners_up
    ]
    return section("The runners-up", "", table(("a step", "plan", "why not"), rows))
