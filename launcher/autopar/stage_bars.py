"""Bars of one submesh: where its time in a step goes, and how near its memory comes to the limit."""

from collections import Counter
from collections.abc import Mapping

from launcher.autopar import svg
from launcher.autopar.timeline import Timeline
from launcher.autopar.timeline_picture import COMPUTE
from launcher.autopar.wording import percent, size

_TIME_WIDTH, _MEMORY_WIDTH, _HEIGHT = 300, 120, 16  # px


def shares_of_step(timeline: Timeline) -> tuple[dict[str, float], ...]:
    """Return, per submesh, what shares of the step go to each kind of work, to waiting, to idling."""
    busy_s: Counter[tuple[int, str]] = Counter()
    for event in timeline.events:
        if event.kind in COMPUTE:
            busy_s[event.submesh, event.kind] += event.end_s - event.start_s
    shares = []
    for submesh, exposed_s in enumerate(timeline.exposed_s):
        parts = {str(kind): busy_s[submesh, kind] / timeline.step_s for kind in COMPUTE}
        left = max(0.0, 1.0 - sum(parts.values()))
        parts["wait"] = min(left, exposed_s / timeline.step_s)
        shares.append(parts | {"idle": left - parts["wait"]})
    return tuple(shares)


def time_bar(shares: Mapping[str, float]) -> str:
    """Draw the shares of a step side by side."""
    parts, x = [], 0.0
    for css, share in shares.items():
        width = share * _TIME_WIDTH
        if width < 0.05:
            continue
        parts.append(svg.rectangle(x, 0, width, _HEIGHT, css, title=f"{css}: {percent(share)}"))
        if width >= 34:
            ink = "on" if css in COMPUTE else "small"
            name = f"{100 * share:.0f} %"
            parts.append(svg.text(x + width / 2, 11.5, name, ink, anchor="middle"))
        x += width
    label = ", ".join(f"{css} {percent(share)}" for css, share in shares.items())
    return svg.picture(_TIME_WIDTH, _HEIGHT, "".join(parts), label=label)


def memory_bar(peak_bytes: float, limit_bytes: float) -> str:
    """Draw a peak against the limit, in another colour where it goes beyond."""
    share = peak_bytes / limit_bytes
    css = "update" if share <= 1 else "limit"
    scale = _MEMORY_WIDTH / max(1.0, share)
    parts = (
        svg.rectangle(0, 0, scale, _HEIGHT, "idle"),
        svg.rectangle(0, 0, share * scale, _HEIGHT, css, title=f"{percent(share)} of the limit"),
        svg.line(scale, 0, scale, _HEIGHT, "limit-line"),
        svg.text(_MEMORY_WIDTH + 8, 12, size(peak_bytes)),
    )
    return svg.picture(_MEMORY_WIDTH + 68, _HEIGHT, "".join(parts), label=size(peak_bytes))
