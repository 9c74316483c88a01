"""A step's timeline as SVG: one row per submesh, time from left to right.

A short step is drawn whole, every instruction a box. A long one (a pipeline of 1024 microbatches)
is drawn three times: the whole step in slices, where the height of a colour is its share of the
slice, and its beginning and its end with every instruction.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.autopar.pages import svg
from launcher.autopar.programs.instructions import SENDS, Op
from launcher.autopar.programs.timeline import Event, EventKind, Timeline
from launcher.autopar.text.wording import seconds

PASSES = (EventKind.FORWARD, EventKind.BACKWARD, EventKind.WEIGHT)
COMPUTE = (*PASSES, EventKind.SYNCHRONIZE, EventKind.UPDATE)
_DRAWN_SENDS = SENDS - {Op.SEND_NORM}  # one number from each stage to every other: a thicket
_WIDTH, _GUTTER, _RIGHT = 1120, 80, 16  # px: all, the names at the left, air at the right
_MOST_BOXES = 220  # per submesh; beyond, boxes of the whole step would be too thin to see
_ZOOM_BOXES = 64  # that a zoom shows per submesh, if the pipeline has filled by then
_LONGEST_ZOOM_BOXES = 260
_MOST_NAMED_BOXES = 4000
_MOST_TRANSFERS = 500  # lines that still tell something
_PAIRS_PER_SLICE = 6  # of a forward and a backward; in fewer, their beat would show as ripples


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """A span of time and where it is drawn."""

    start_s: float
    end_s: float
    top: float
    row: float
    num_rows: int
    row_name: str  # stage, or submesh where one holds several

    @property
    def height(self) -> float:
        return self.num_rows * (self.row + self.gap)

    @property
    def gap(self) -> float:
        return 3.0 if self.row >= 12 else 1.0

    def x(self, time_s: float) -> float:
        """Return the place of a time, and of one outside at the border."""
        inside_s = min(max(time_s, self.start_s), self.end_s)
        share = (inside_s - self.start_s) / (self.end_s - self.start_s)
        return _GUTTER + (_WIDTH - _GUTTER - _RIGHT) * share

    def y(self, submesh: int) -> float:
        return self.top + submesh * (self.row + self.gap)


def timeline_svg(timeline: Timeline, *, alone: bool = True, until_s: float = 0.0) -> str:
    """Draw a timeline.

    Args:
        alone: As a file of its own, else as part of a page with `svg.STYLE`.
        until_s: Where the axis of the whole step ends if the step ends before, so that two pictures
            can have one scale.
    """
    num_rows = len(timeline.exposed_s)
    boxes = [event for event in timeline.events if event.end_s > event.start_s]
    if not boxes or timeline.step_s <= 0:
        empty = svg.text(8, 20, "This timeline holds no events.", "faint")
        return svg.picture(_WIDTH, 32, empty, label="an empty timeline", alone=alone)
    row = min(24.0, max(5.0, 420 / num_rows))
    name = "stage" if num_rows == len(timeline.stash_peak) else "submesh"
    body = [_legend({event.kind for event in boxes})]
    top = 30.0
    for start_s, end_s, title, is_sliced in _panels(timeline, boxes, until_s):
        frame = _Frame(
            start_s=start_s, end_s=end_s, top=top + 24, row=row, num_rows=num_rows, row_name=name
        )
        body.append(svg.text(_GUTTER, top + 14, title, "title"))
        body += _rows(frame)
        body += _slices(frame, boxes) if is_sliced else _boxes(frame, boxes)
        body += _axis(frame)
        top = frame.top + frame.height + 34
    return svg.picture(_WIDTH, top, "".join(body), label="timeline of a step", alone=alone)


def one_bar_svg(name: str, span_s: float, until_s: float) -> str:
    """Draw a step of which no more is known than what it took, for a page with `svg.STYLE`."""
    frame = _Frame(
        start_s=0.0, end_s=max(span_s, until_s), top=24, row=24.0, num_rows=1, row_name="stage"
    )
    body = (
        svg.text(_GUTTER, 14, f"One step: {seconds(span_s)}", "title"),
        *_rows(frame),
        svg.rectangle(_GUTTER, frame.top, frame.x(span_s) - _GUTTER, frame.row, "wait", title=name),
        svg.text(_GUTTER + 8, frame.top + 16, name),
        *_axis(frame),
    )
    return svg.picture(_WIDTH, frame.top + frame.height + 34, "".join(body), label=name)


def _panels(
    timeline: Timeline, boxes: Sequence[Event], until_s: float
) -> Iterator[tuple[float, float, str, bool]]:
    """Yield what to draw: from, to, title, and whether in slices."""
    step_s = timeline.step_s
    end_s = max(step_s, until_s)
    passes = [event for event in boxes if event.kind in PASSES]
    most = max(_per_submesh(passes, len(timeline.exposed_s)))
    if most <= _MOST_BOXES:
        yield 0.0, end_s, f"One step: {seconds(step_s)}", False
        return
    number = 1 + max(event.instruction.microbatch for event in passes)
    title = f"One step: {seconds(step_s)}, {number} microbatches; height: share of the time"
    yield 0.0, end_s, title, True
    typical_s = float(np.median([event.end_s - event.start_s for event in passes]))
    first_s = min(
        (event.end_s for event in passes if event.stage == 0 and event.kind is EventKind.BACKWARD),
        default=0.0,
    )
    zoom_s = min(
        max(_ZOOM_BOXES * typical_s, 1.3 * first_s), _LONGEST_ZOOM_BOXES * typical_s, step_s
    )
    yield 0.0, zoom_s, f"Its first {seconds(zoom_s)}: the pipeline fills", False
    yield step_s - zoom_s, step_s, f"Its last {seconds(zoom_s)}: it drains, and updates", False


def _per_submesh(events: Sequence[Event], num_submeshes: int) -> list[int]:
    counts = [0] * num_submeshes
    for event in events:
        counts[event.submesh] += 1
    return counts


def _legend(kinds: set[EventKind]) -> str:
    items, x = [], float(_GUTTER)
    for kind, name in (
        (EventKind.FORWARD, "forward"),
        (EventKind.BACKWARD, "backward"),
        *([(EventKind.WEIGHT, "weight gradients")] if EventKind.WEIGHT in kinds else []),
        (EventKind.SYNCHRONIZE, "synchronize gradients"),
        (EventKind.UPDATE, "update"),
        ("idle", "idle: the bubble"),
    ):
        items.append(svg.rectangle(x, 9, 12, 12, str(kind), round_px=2))
        items.append(svg.text(x + 17, 19, name))
        x += 38 + 5.4 * len(name)
    items.append(svg.line(x, 10, x + 14, 20))
    items.append(svg.text(x + 20, 19, "transfer"))
    return "".join(items)


def _rows(frame: _Frame) -> Iterator[str]:
    """The empty rows, which stay visible where a submesh is idle, and their names."""
    every = max(1, math.ceil(10 / (frame.row + frame.gap)))
    for submesh in range(frame.num_rows):
        y = frame.y(submesh)
        yield svg.rectangle(_GUTTER, y, _WIDTH - _GUTTER - _RIGHT, frame.row, "idle")
        if submesh % every == 0:
            middle = y + frame.row / 2 + 3.5
            yield svg.text(
                _GUTTER - 8, middle, f"{frame.row_name} {submesh}", "faint", anchor="end"
            )


def _boxes(frame: _Frame, boxes: Sequence[Event]) -> Iterator[str]:
    """Every instruction in the frame; messages as lines from row to row."""
    seen = [box for box in boxes if box.end_s > frame.start_s and box.start_s < frame.end_s]
    transfers = [box for box in seen if box.instruction.op in _DRAWN_SENDS]
    if len(transfers) <= _MOST_TRANSFERS:  # first, so that they show between the boxes only
        homes = {box.stage: box.submesh for box in boxes}
        yield from (_transfer(frame, box, homes) for box in transfers)
    computing = [box for box in seen if box.kind in COMPUTE]
    if len(computing) > _MOST_NAMED_BOXES:
        yield from _crowd(frame, computing)
        return
    for box in computing:
        yield from _box(frame, box)


def _crowd(frame: _Frame, boxes: Sequence[Event]) -> Iterator[str]:
    """Boxes without names, a submesh's boxes of a kind as one path: a tenth of the bytes."""
    for (submesh, kind), spans in _spans(boxes).items():
        y, row = svg.number(frame.y(submesh)), svg.number(frame.row)
        edges = [(frame.x(start_s), frame.x(end_s)) for start_s, end_s in spans]
        yield svg.path(
            "".join(
                f"M{svg.number(start)} {y}H{svg.number(max(end, start + 0.2))}v{row}"
                f"H{svg.number(start)}z"
                for start, end in edges
            ),
            kind,
        )


def _spans(boxes: Sequence[Event]) -> dict[tuple[int, str], list[tuple[float, float]]]:
    spans = defaultdict(list)
    for box in boxes:
        spans[box.submesh, box.kind].append((box.start_s, box.end_s))
    return spans


def _box(frame: _Frame, box: Event) -> Iterator[str]:
    start, y = frame.x(box.start_s), frame.y(box.submesh)
    width = frame.x(box.end_s) - start
    air = 0.6 if width > 4 else 0.0
    title = f"stage {box.stage} {box.label}: {seconds(box.end_s - box.start_s)}"
    yield svg.rectangle(start, y, width - air, frame.row, box.kind, title=title)
    names = (box.label, box.label[1:])  # `F12`, or only the microbatch: the colour says the rest
    if frame.row_name != "stage":
        names = (str(box.instruction), *names)
    name = next((name for name in names if width >= 6 * len(name) + 2), "")
    if name and frame.row >= 12:
        yield svg.text(start + width / 2, y + frame.row / 2 + 3, name, "on")


def _transfer(frame: _Frame, box: Event, homes: Mapping[int, int]) -> str:
    source, target = box.submesh, homes.get(box.instruction.peer, box.submesh)
    down = target > source
    y1 = frame.y(source) + (frame.row if down else 0)
    y2 = frame.y(target) + (0 if down else frame.row)
    return svg.line(frame.x(box.start_s), y1, frame.x(box.end_s), y2)


def _slices(frame: _Frame, boxes: Sequence[Event]) -> Iterator[str]:
    """Per submesh and kind an area over time, the kinds on top of one another."""
    passes = max(_per_submesh([b for b in boxes if b.kind in PASSES], frame.num_rows))
    num_slices = int(min(max(passes / 2 / _PAIRS_PER_SLICE, 60), 420))
    edges_s = np.linspace(frame.start_s, frame.end_s, num_slices + 1)
    spans = _spans(boxes)
    for submesh in range(frame.num_rows):
        below = np.zeros(num_slices)
        for kind in COMPUTE:
            shares = _busy_s(spans.get((submesh, kind), ()), edges_s) / np.diff(edges_s)
            yield _area(frame, submesh, edges_s, below, below + shares, kind)
            below = below + shares


def _busy_s(spans: Sequence[tuple[float, float]], edges_s: np.ndarray) -> np.ndarray:
    """The time of each slice that spans, which do not overlap, take of it."""
    times = [0.0, *itertools.chain.from_iterable(sorted(spans))]
    steps = np.diff(times)
    steps[::2] = 0.0  # between the spans
    return np.diff(np.interp(edges_s, times, np.concatenate(([0.0], np.cumsum(steps)))))


def _area(
    frame: _Frame, submesh: int, edges_s: np.ndarray, low: np.ndarray, high: np.ndarray, css: str
) -> str:
    if not (high > low).any():
        return ""
    bottom = frame.y(submesh) + frame.row
    xs = [svg.number(frame.x(edge_s)) for edge_s in edges_s]
    tops = [svg.number(bottom - share * frame.row) for share in high]
    floors = [svg.number(bottom - share * frame.row) for share in low]
    commands = [f"M{xs[0]} {tops[0]}"]
    commands += [f"H{x}V{y}" for x, y in zip(xs[1:-1], tops[1:], strict=True)]
    commands.append(f"H{xs[-1]}V{floors[-1]}")
    commands += [f"H{x}V{y}" for x, y in zip(xs[-2:0:-1], floors[-2::-1], strict=True)]
    return svg.path(f"{''.join(commands)}H{xs[0]}Z", css)


def _axis(frame: _Frame) -> Iterator[str]:
    """Ticks at round times."""
    span_s = frame.end_s - frame.start_s
    tick_s = _round_step(span_s / 9)
    y = frame.top + frame.height
    first = math.ceil(frame.start_s / tick_s - 1e-9)
    for index in range(first, math.floor(frame.end_s / tick_s + 1e-9) + 1):
        x = frame.x(index * tick_s)
        yield svg.line(x, y, x, y + 4)
        yield svg.text(x, y + 16, _tick_text(index * tick_s, tick_s), "faint", anchor="middle")


def _round_step(least: float) -> float:
    """The least of 1, 2, 5, 10, ... that is not below a number."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _tick_text(time_s: float, tick_s: float) -> str:
    """A time with as many digits as tell it from the next tick."""
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
    scale, unit = next(((k, name) for k, name in units if tick_s * k >= 0.01), units[-1])
    decimals = max(0, -math.floor(math.log10(tick_s * scale) + 1e-9))
    return f"{time_s * scale:.{decimals}f} {unit}"
