"""The parts that the HTML pages of a run are made of: one file each, which needs nothing else.

Pictures are SVG inside the page; there are no scripts. Everything is a string.
"""

from collections.abc import Iterable, Sequence
from html import escape

from launcher.autopar.pages import svg

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
table+table{margin-top:14px}
td{padding:4px 14px 4px 0;border-top:1px solid var(--rule);vertical-align:middle}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code{font:12px ui-monospace,monospace}td svg{display:block}.split{display:flex;align-items:center}
.split code{margin:0 12px;white-space:nowrap}.legend{max-width:none;color:inherit;font-size:12px}
.note{background:var(--card);border-radius:8px;padding:10px 16px;margin:16px 0 0}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}
.key:first-child{margin-left:0}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """Return a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{svg.STYLE}{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, lead: str, body: str) -> str:
    """Return a part of a page under a heading; `lead` and `body` are HTML."""
    lead = f"<p>{lead}</p>" if lead else ""
    return f'<section><h2>{title}</h2>{lead}<div class="wide">{body}</div></section>\n'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Return the numbers that matter most, each with its name, side by side."""
    each = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in values
    )
    return f'<div class="tiles">{"".join(each)}</div>'


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """Return a table; a row is its cells, one after the other."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def cell(value: str) -> str:
    """Return a cell with text."""
    return f"<td>{escape(value)}</td>"


def number(value: str) -> str:
    """Return a cell with a number."""
    return f'<td class="n">{escape(value)}</td>'
