"""Bars of one submesh: where its time in a step goes, and how near its memory comes to the limit."""

from collections.abc import Sequence

from launcher.autopar.pages import svg
from launcher.autopar.predictions.step_parts import StepParts
from launcher.autopar.text.wording import percent, size

_TIME_WIDTH, _MEMORY_WIDTH, _HEIGHT = 300, 120, 16  # px
_LEAST_SHARE = 1e-4  # of a step, that a bar of this width can show

# Part of a step -> (its colour, what a legend says).
PART_KEYS = {
    "computation": ("compute", "computation"),
    "recomputation": ("again", "recomputation"),
    "communication": ("communicate", "communication"),
    "synchronization": ("synchronize", "synchronization of gradients"),
    "update": ("update", "update"),
    "transfers": ("wait", "waits for a transfer"),
    "bubble": ("idle", "bubble"),
}


def time_bar(parts: StepParts, longest_s: float) -> str:
    """Draw the parts of a step side by side; a step of `longest_s` has the whole width."""
    drawn, x = [], 0.0
    shares = {name: part_s / parts.step_s for name, part_s in parts.named().items()}
    for name, share in shares.items():
        width = share * parts.step_s / longest_s * _TIME_WIDTH
        if share <= _LEAST_SHARE:
            continue
        css = PART_KEYS[name][0]
        title = f"{name}: {percent(share)}"
        drawn.append(svg.rectangle(x, 0, width, _HEIGHT, css, title=title))
        if width >= 34:
            ink = "small" if css in ("wait", "idle", "again") else "on"
            drawn.append(
                svg.text(x + width / 2, 11.5, f"{100 * share:.0f} %", ink, anchor="middle")
            )
        x += width
    label = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
    return svg.picture(_TIME_WIDTH, _HEIGHT, "".join(drawn), label=label)


def bar_legend(bars: Sequence[StepParts]) -> str:
    """Explain the colours of the parts that some bar has."""
    shown = {
        name
        for parts in bars
        for name, part_s in parts.named().items()
        if part_s > _LEAST_SHARE * parts.step_s
    }
    keys = "".join(
        f'<i class="key" style="background:var(--{css})"></i>{text}'
        for name, (css, text) in PART_KEYS.items()
        if name in shown
    )
    return f'<p class="legend">{keys}</p>'


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
