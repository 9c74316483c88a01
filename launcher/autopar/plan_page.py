"""plan.html: a plan as a page to look at, in one file that needs nothing else.

What it promises, which devices do what, where each stage's time and memory go, the timeline of a
step, where the tensors lie, and what the runners-up would have cost. Pictures are SVG inside the
page; there are no scripts.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from launcher.autopar import svg
from launcher.autopar.atomic_file import write_atomically
from launcher.autopar.cluster import Cluster
from launcher.autopar.cluster_picture import cluster_svg
from launcher.autopar.plan import Plan, Prediction
from launcher.autopar.stage_bars import memory_bar, shares_of_step, time_bar
from launcher.autopar.summary import headline, mfu, stage_cells
from launcher.autopar.tensor_groups import Shapes, Split, TensorGroup, tensor_groups
from launcher.autopar.timeline import Timeline
from launcher.autopar.timeline_picture import timeline_svg
from launcher.autopar.wording import count, digits, percent, ranges, seconds, size

_MOST_GROUPS = 60
_GLYPH = 34  # px
_MOST_CUTS = 16  # that a glyph of this size can show

_STYLE = """
body{margin:0;background:var(--page);color:var(--ink);font:14px/1.45 system-ui,sans-serif;
--page:#fff;--card:#f6f7f9;--rule:#dfe3e8}
@media(prefers-color-scheme:dark){body{--page:#15181d;--card:#1e2228;--rule:#343a43}}
main{max-width:1160px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:34px 0 10px}
p{margin:4px 0 10px;color:var(--faint);max-width:110ch}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0 0}
.tile{background:var(--card);border-radius:8px;padding:10px 16px;min-width:104px}
.tile b{display:block;font-size:20px;font-weight:600;white-space:nowrap}
.tile span{color:var(--faint);font-size:12px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th{text-align:left;font-weight:500;color:var(--faint);padding:4px 14px 4px 0;white-space:nowrap}
td{padding:4px 14px 4px 0;border-top:1px solid var(--rule);vertical-align:middle}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code{font:12px ui-monospace,monospace}td svg{display:block}.split{display:flex;align-items:center}
.split code{margin:0 12px;white-space:nowrap}.legend{max-width:none;color:inherit;font-size:12px}
.note{background:var(--card);border-radius:8px;padding:10px 16px;margin:16px 0 0}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}
.key:first-child{margin-left:0}
"""


def write_page(
    plan: Plan, timeline: Timeline, cluster: Cluster, path: Path, params: Shapes | None = None
) -> None:
    """Write plan.html; `params`, the model's `abstract_params`, adds sizes and shapes."""
    write_atomically(path, page(plan, timeline, cluster, params))


def page(plan: Plan, timeline: Timeline, cluster: Cluster, params: Shapes | None = None) -> str:
    """Return the page as a text."""
    shapes = params or {}
    sections = (
        _head(plan, cluster, shapes),
        _machine(plan, cluster),
        _stages(plan, timeline, cluster),
        _section("A step in time", "", timeline_svg(timeline, alone=False)),
        _tensors(plan, shapes),
        _runners_up(plan),
    )
    title = escape(f"Plan of {plan.model.name} {plan.model.size} on {cluster.name}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{svg.STYLE}{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, lead: str, body: str) -> str:
    lead = f"<p>{lead}</p>" if lead else ""
    return f'<section><h2>{title}</h2>{lead}<div class="wide">{body}</div></section>\n'


def _head(plan: Plan, cluster: Cluster, params: Shapes) -> str:
    batch = (
        f"{count(plan.global_batch, 'sample')} a step, number of microbatches: "
        f"{plan.num_microbatches}, of {count(plan.microbatch_size, 'sample')} each; "
        f"schedule {plan.schedule}"
    )
    if plan.search is not None:
        batch += (
            f"; found in {seconds(plan.search.wall_s)} among {plan.search.candidates:,} candidates"
        )
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _promises(plan, cluster)
    )
    nominal = (
        f'<div class="note">The figures of {escape(cluster.name)} are nominal, not measured: '
        "compare plans by them, not with a clock.</div>"
        if cluster.nominal
        else ""
    )
    return (
        f"<h1>{escape(headline(plan, cluster, params))}</h1><p>{escape(batch)}</p>"
        f'<div class="tiles">{tiles}</div>{nominal}\n'
    )


def _promises(plan: Plan, cluster: Cluster) -> Iterator[tuple[str, str]]:
    yield "stages", str(len(plan.stages))
    predicted = plan.predicted
    if predicted is not None:
        share = mfu(predicted, plan, cluster)
        peak_bytes = max(predicted.peak_bytes_per_device, default=0.0)
        yield "a step, predicted", seconds(predicted.step_s)
        yield "bubble", percent(predicted.bubble_fraction)
        yield "TFLOP/s per device", digits(predicted.tflops_per_device)
        yield "MFU", "unknown" if share is None else percent(share)
        yield f"of {size(cluster.device.memory_bytes)} per device", size(peak_bytes)
        yield "sent per step", size(predicted.communicated_bytes)


def _machine(plan: Plan, cluster: Cluster) -> str:
    sizes = {stage.num_devices for stage in plan.stages}
    each = f"{count(min(sizes), 'device')} each" if len(sizes) == 1 else "devices as shown"
    used = count(len(plan.stages), "stage")
    lead = f"{used} of {each}; a column is a host, a box a device, the number its stage."
    return _section("Who does what", lead, cluster_svg(plan, cluster))


def _stages(plan: Plan, timeline: Timeline, cluster: Cluster) -> str:
    axes = " x ".join(name for name, _ in plan.stages[0].mesh)
    heads = ["stage", *stage_cells(plan.stages[0])]
    heads[heads.index("mesh")] = axes
    predicted = plan.predicted
    if timeline.events:
        heads.append(f"time of a step, {seconds(timeline.step_s)}")
    if predicted is not None:
        heads += ["forward", "backward", f"memory of {size(cluster.device.memory_bytes)}"]
    shares = shares_of_step(timeline) if timeline.events else ()
    rows = []
    for index, stage in enumerate(plan.stages):
        cells = [_number(str(index)), *(_cell(value) for value in stage_cells(stage).values())]
        if shares:
            cells.append(f"<td>{time_bar(shares[index])}</td>")
        if predicted is not None:
            cells += _promised_cells(predicted, index, cluster.device.memory_bytes)
        rows.append("".join(cells))
    keys = (
        ("forward", "forward"), ("backward", "backward"), ("synchronize", "synchronize gradients"),
        ("update", "update"), ("wait", "waits for a transfer"), ("idle", "otherwise idle"),
    )  # fmt: skip
    legend = "".join(
        f'<i class="key" style="background:var(--{css})"></i>{name}' for css, name in keys
    )
    legend = f'<p class="legend">{legend}</p>' if shares else ""
    lead = "Layers: the first and the last of a stage. Forward, backward: of a microbatch."
    return _section("The stages", lead, legend + _table(heads, rows))


def _promised_cells(predicted: Prediction, index: int, limit_bytes: float) -> list[str]:
    return [
        _number(seconds(predicted.stage_forward_s[index])),
        _number(seconds(predicted.stage_backward_s[index])),
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
    return _section("Where the tensors lie", lead, _table(heads, rows))


def _tensor_rows(group: TensorGroup) -> Iterator[str]:
    times = f"{group.members} x" if group.members > 1 else ""
    shape = "" if group.shape is None else str(list(group.shape))
    lead = [
        f"<td><code>{escape(group.name)}</code></td>",
        _number(times),
        _cell(shape),
        _number(size(group.num_bytes) if group.num_bytes else ""),
    ]
    for placement in group.placements:
        cells = [*lead, _cell(ranges(placement.stages))]
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
        "".join((_number(seconds(other.step_s)), _cell(other.description), _cell(other.why)))
        for other in plan.runners_up
    ]
    return _section("The runners-up", "", _table(("a step", "plan", "why not"), rows))


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(value: str) -> str:
    return f"<td>{escape(value)}</td>"


def _number(value: str) -> str:
    return f'<td class="n">{escape(value)}</td>'
