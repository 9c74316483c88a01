"""Numbers as people read them in a plan: three digits and a unit, ranges, plurals."""

from collections.abc import Iterable, Sequence

_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(number: int, noun: str) -> str:
    """Write a number with its noun: `1 host`, `2 batches`, `3 entries`."""
    return f"{number} {noun_for(number, noun)}"


def noun_for(number: int, noun: str) -> str:
    """Put a noun into the form that goes with a number."""
    if number == 1:
        return noun
    if noun.endswith("ry"):
        return f"{noun[:-1]}ies"
    return f"{noun}{'es' if noun.endswith(('ch', 'sh')) else 's'}"


def either(choices: Sequence[str]) -> str:
    """Write a choice: `1`, `1 or 2`, `1, 2 or 4`."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def digits(value: float) -> str:
    """Write a number with at least three digits: `0.123`, `12.3`, `1234`."""
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def large(number: int) -> str:
    """Write a large number in words: `39.1 billion`."""
    for unit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit * 0.9995:
            return f"{digits(number / unit)} {word}"
    return str(number)


def seconds(value: float) -> str:
    """Write a time: `85 us`, `12.3 ms`, `3.21 s`, `142 s`."""
    if value >= 0.9995 or value == 0:
        return f"{digits(value)} s"
    if value >= 0.9995e-3:
        return f"{digits(value * 1e3)} ms"
    return f"{digits(value * 1e6)} us"


def size(num_bytes: float) -> str:
    """Write a size in memory: `13.2 GiB`."""
    for unit, name in _BINARY:
        if num_bytes >= unit * 0.9995:
            return f"{digits(num_bytes / unit)} {name}"
    return f"{digits(num_bytes)} B"


def percent(fraction: float) -> str:
    """Write a share: `5.6 %`."""
    return f"{100 * fraction:.1f} %"


def ranges(indices: Iterable[int]) -> str:
    """Write indices with runs of neighbours joined: `0-3,7`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def some_ranges(indices: Iterable[int], width: int) -> str:
    """Write as many runs as there is room for: `0,4-7,..`."""
    text = ranges(indices)
    while len(text) > width and "," in text:
        kept = text.removesuffix(",..").rsplit(",", 1)[0]
        text = f"{kept},.."
        if "," not in kept:
            break
    return text


def shortened(text: str, width: int) -> str:
    """Cut a text to a width in its middle, since the ends of paths tell most."""
    if len(text) <= width:
        return text
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def aligned(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lay out rows of cells in columns; those numbered in `right` end where their column does."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
