"""A sweep as an SVG file: the losses of its best runs over their steps, and what a step of each run takes.

Left out: evaluations, which are in the table; and runs beyond what can be told apart.
"""

from collections.abc import Sequence
from html import escape

from launcher.autopar.pages import svg
from launcher.autopar.text.wording import digits
from launcher.runtime.records.progress_text import duration
from launcher.status.comparison import Comparison, Run

_COLOURS = (
    "forward",
    "backward",
    "synchronize",
    "update",
    "communicate",
    "weight",
    "compute",
    "transfer",
)
_MOST_BARS, _LONGEST_LABEL = 40, 44
_WIDTH, _LEFT, _RIGHT, _TOP = 860, 300, 90, 44  # px
_CURVES, _BAR, _GAP = 220, 12, 20
_TICKS = 4

Point = tuple[int, float]


def picture(comparison: Comparison) -> str:
    """Draw the comparison of a sweep."""
    curves = [run for run in comparison.runs if len(run.files.curve) > 1][: len(_COLOURS)]
    bars = comparison.runs[:_MOST_BARS]
    title = f"{len(comparison.runs)} runs, sorted by {comparison.order}"
    body, y = [svg.text(12, 22, title, "title")], float(_TOP)
    if curves:
        body.append(_draw_curves(curves, y))
        y += _CURVES + 2 * _GAP
    body.append(_draw_bars(bars, curves, y))
    height = y + _GAP * (len(bars) + 2)
    return svg.picture(_WIDTH, height, "".join(body), label=title, alone=True)


def _draw_curves(runs: Sequence[Run], top: float) -> str:
    points = [point for run in runs for point in run.files.curve]
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    high += (high == low) * (abs(high) or 1.0)
    wide = _WIDTH - _LEFT - 12

    def place(point: Point) -> tuple[float, float]:
        step, loss = point
        return _LEFT + wide * step / last, top + _CURVES * (high - loss) / (high - low)

    parts = [svg.text(12, top + 10, "loss", "faint")]
    for tick in range(_TICKS + 1):
        loss = low + (high - low) * tick / _TICKS
        y = place((0, loss))[1]
        parts.append(svg.line(_LEFT, y, _WIDTH - 12, y))
        parts.append(svg.text(_LEFT - 6, y + 4, digits(loss), "faint", anchor="end"))
    # The best is drawn last, over the others.
    for colour, run in reversed(list(zip(_COLOURS, runs, strict=False))):
        parts.append(_curve([place(point) for point in run.files.curve], colour, run.label))
    end = svg.text(_WIDTH - 12, top + _CURVES + 16, f"step {last}", "faint", anchor="end")
    return "".join((*parts, end))


def _curve(points: Sequence[tuple[float, float]], colour: str, label: str) -> str:
    commands = " ".join(f"{svg.number(x)},{svg.number(y)}" for x, y in points)
    stroke = f"stroke:var(--{colour});stroke-width:1.6;fill:none"
    return f'<path d="M{commands}" style="{stroke}"><title>{escape(label)}</title></path>'


def _draw_bars(runs: Sequence[Run], drawn: Sequence[Run], top: float) -> str:
    times = [
        s
        for run in runs
        for s in (run.standing.measured_step_s, run.standing.predicted_step_s)
        if s
    ]
    longest_s = max(times, default=1.0)
    wide = _WIDTH - _LEFT - _RIGHT
    parts = [svg.text(_LEFT, top, "a step: bar measured, line predicted", "faint")]
    for at, run in enumerate(runs):
        y = top + _GAP * (at + 1)
        colour = _COLOURS[drawn.index(run)] if run in drawn else "idle"
        parts.append(svg.rectangle(12, y - 10, 9, 9, colour))
        parts.append(svg.text(26, y - 2, _label(run)))
        parts.append(_bar(run, y, wide / longest_s))
    return "".join(parts)


def _bar(run: Run, y: float, px_per_s: float) -> str:
    measured_s, predicted_s = run.standing.measured_step_s, run.standing.predicted_step_s
    parts, end = [], float(_LEFT)
    if measured_s:
        end += px_per_s * measured_s
        told = f"{duration(measured_s)} measured"
        parts.append(svg.rectangle(_LEFT, y - 11, end - _LEFT, _BAR, "compute", title=told))
    if predicted_s:
        x = _LEFT + px_per_s * predicted_s
        parts.append(svg.line(x, y - 13, x, y + 3, "limit-line"))
        end = max(end, x)
    said = duration(measured_s or predicted_s) if measured_s or predicted_s else run.standing.state
    return "".join((*parts, svg.text(end + 6, y - 1, said, "small")))


def _label(run: Run) -> str:
    label = run.label
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 3]}..."
