"""Groups of bars as an SVG file, with marks beside them for what was measured.

Left out: negative values, and axes that are not linear from 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.autopar.pages import svg
from launcher.autopar.text.wording import digits

_LEFT, _TOP, _HEIGHT, _BOTTOM = 44, 62, 230, 40  # px
_BAR, _GAP = 11, 16
_LEAST_WIDTH = 620
_LEGEND_COLUMN = 84
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A group: value by series. A missing series takes no part; a value of 0 is drawn as a cross.

    Attributes:
        marks: Values to draw as a line across the bar, 0 as a cross above it.
    """

    label: str
    values: Mapping[str, float]
    marks: Mapping[str, float] = field(default_factory=dict)


def bar_chart(
    title: str, unit: str, colours: Mapping[str, str], groups: Sequence[Bars], below: str
) -> str:
    """Draw groups of bars side by side.

    Args:
        colours: series -> class of `svg.STYLE`, in the order of the bars.
        below: what the groups are.
    """
    highest = max((v for g in groups for v in (*g.values.values(), *g.marks.values())), default=1)
    top = _round_up(highest or 1)
    widths = [_BAR * max(1, len(_series(colours, group))) + _GAP for group in groups]
    width = max(_LEAST_WIDTH, _LEFT + sum(widths) + _GAP)
    spread = (width - _LEFT - _GAP) / max(1, sum(widths))
    body, x = [_frame(title, unit, below, width, top), _legend(colours, groups)], float(_LEFT)
    for group, own in zip(groups, widths, strict=True):
        begin = x + (own * spread - own + _GAP) / 2
        body.append(_group(group, colours, begin, top))
        middle = begin + (own - _GAP) / 2
        body.append(svg.text(middle, _TOP + _HEIGHT + 15, group.label, anchor="middle"))
        x += own * spread
    return svg.picture(width, _TOP + _HEIGHT + _BOTTOM, "".join(body), label=title, alone=True)


def _series(colours: Mapping[str, str], group: Bars) -> list[str]:
    return [name for name in colours if name in group.values]


def _round_up(value: float) -> float:
    """The next number whose `_TICKS` parts are round."""
    part = value / _TICKS
    unit = 10 ** math.floor(math.log10(part))
    return _TICKS * unit * next(step for step in (1, 1.5, 2, 3, 4, 5, 8, 10) if step * unit >= part)


def _y(value: float, top: float) -> float:
    return _TOP + _HEIGHT * (1 - value / top)


def _frame(title: str, unit: str, below: str, width: float, top: float) -> str:
    parts = [
        svg.text(_LEFT, 16, title, "title"),
        svg.text(_LEFT, _TOP - 8, unit, "faint"),
        svg.text(width - _GAP, _TOP + _HEIGHT + 32, below, "faint", anchor="end"),
    ]
    for tick in range(_TICKS + 1):
        value = top * tick / _TICKS
        y = _y(value, top)
        parts.append(svg.line(_LEFT, y, width - _GAP, y))
        parts.append(svg.text(_LEFT - 6, y + 4, digits(value), "faint", anchor="end"))
    return "".join(parts)


def _legend(colours: Mapping[str, str], groups: Sequence[Bars]) -> str:
    drawn = {name for group in groups for name in group.values}
    parts = []
    for at, name in enumerate(name for name in colours if name in drawn):
        x = _LEFT + at * _LEGEND_COLUMN
        parts.append(svg.rectangle(x, 26, 9, 9, colours[name]))
        parts.append(svg.text(x + 13, 34, name, "small"))
    return "".join(parts)


def _group(group: Bars, colours: Mapping[str, str], x: float, top: float) -> str:
    parts = []
    for at, name in enumerate(_series(colours, group)):
        left, value = x + at * _BAR, group.values[name]
        told = f"{group.label}, {name}: {digits(value) if value else 'none'}"
        if value:
            y = _y(value, top)
            height = _TOP + _HEIGHT - y
            parts.append(svg.rectangle(left, y, _BAR - 2, height, colours[name], title=told))
        else:
            parts.append(_cross(left, _TOP + _HEIGHT - 5, "line"))
        if name in group.marks:
            parts.append(_mark(left, group.marks[name], top))
    return "".join(parts)


def _mark(left: float, value: float, top: float) -> str:
    if not value:
        return _cross(left, _TOP + _HEIGHT - 14, "limit-line")
    y = _y(value, top)
    return svg.line(left - 1, y, left + _BAR - 1, y, "limit-line")


def _cross(left: float, y: float, css: str) -> str:
    right = left + _BAR - 4
    return svg.line(left + 1, y - 3, right, y + 3, css) + svg.line(
        left + 1, y + 3, right, y - 3, css
    )
