"""The few SVG elements that the pictures of a plan are made of, and the colours they share.

Elements are strings. Colours are CSS classes, so that one picture follows the reader's light or
dark theme, in a page as well as in a file of its own.
"""

from html import escape

# Class -> (colour on white, on black). Blue and orange are apart for colour-blind readers too.
_COLOURS = {
    "forward": ("#7db1ec", "#6aa3e3"),
    "backward": ("#f6b45f", "#e8a450"),
    "weight": ("#e9d27f", "#d3bb63"),
    "compute": ("#93a4de", "#8596d2"),
    "again": ("#cfd6f3", "#565f8c"),
    "communicate": ("#ee929c", "#dd808b"),
    "synchronize": ("#b598e8", "#ac8fe2"),
    "update": ("#77c59c", "#6dbb93"),
    "transfer": ("#8b929c", "#8b929c"),
    "wait": ("#c9ced6", "#565d68"),
    "idle": ("#eceef1", "#2a2f36"),
    "limit": ("#d33f49", "#ff6b74"),
    "ink": ("#1d2430", "#e6e9ee"),
    "faint": ("#667080", "#98a2b1"),
}


def _style() -> str:
    light, dark = (
        "".join(f"--{name}:{shades[theme]};" for name, shades in _COLOURS.items())
        for theme in (0, 1)
    )
    classes = "".join(f".{name}{{fill:var(--{name})}}" for name in _COLOURS)
    return (
        f":root{{{light}color-scheme:light dark}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"
        "svg text{font:11px system-ui,sans-serif;fill:var(--ink)}svg text.faint{fill:var(--faint)}"
        "svg text.small{font-size:9px}svg text.title{font-size:12px;font-weight:600}"
        "svg text.on{fill:#16202e;font-size:9px;text-anchor:middle}svg .line{stroke:var(--faint);"
        "stroke-width:.6;fill:none}svg .limit-line{stroke:var(--limit);stroke-width:1.5}"
        "svg .hatch{stroke:var(--ink);stroke-width:.5;fill:none;opacity:.55}"
    )


STYLE = _style()


def number(value: float) -> str:
    """Write a coordinate, with no more digits than can be seen."""
    return f"{value:.1f}".removesuffix(".0")


def rectangle(
    x: float,
    y: float,
    width: float,
    height: float,
    css: str,
    *,
    title: str = "",
    round_px: float = 0,
) -> str:
    """Draw a box of a class of `STYLE`; the title shows when a pointer rests on it."""
    corner = f' rx="{number(round_px)}"' if round_px else ""
    shape = (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.2))}" '
        f'height="{number(height)}" class="{css}"{corner}'
    )
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def text(x: float, y: float, content: str, css: str = "", *, anchor: str = "start") -> str:
    """Write a line of text on a baseline."""
    classes = f' class="{css}"' if css else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{number(x)}" y="{number(y)}"{classes}{side}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str = "line") -> str:
    """Draw a straight line."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{css}"/>'


def path(commands: str, css: str) -> str:
    """Draw a path."""
    return f'<path d="{commands}" class="{css}"/>'


def picture(width: float, height: float, body: str, *, label: str, alone: bool = False) -> str:
    """Wrap elements to a picture; one that stands alone brings its colours and its background."""
    wide, high = number(width), number(height)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        f'width="{wide}" height="{high}" role="img" aria-label="{escape(label)}">'
    )
    if not alone:
        return f"{head}{body}</svg>"
    paper = (
        f"<style>{STYLE}.paper{{fill:#fff}}"
        "@media(prefers-color-scheme:dark){.paper{fill:#15181d}}</style>"
        f"{rectangle(0, 0, width, height, 'paper')}"
    )
    return f"{head}{paper}{body}</svg>\n"
