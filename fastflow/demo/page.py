"""HTML by hand: the style sheet and the few elements that the report is made of. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .tables import Table

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --grey: #69707d; --line: #e3e6ea; --blue: #2563a8; --tint: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 56px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 44px 0 6px; }
p { margin: 0 0 12px; max-width: 44rem; }
.quiet { color: var(--grey); font-size: 0.9rem; }
.scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); margin: 26px 0 0; gap: 1px;
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--line); }
dl div { background: #fff; padding: 12px 14px; }
dt { color: var(--grey); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; height: auto; margin: 10px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; margin: 10px 0 8px; }
th { text-align: right; font-weight: 500; color: var(--grey); font-size: 0.82rem; white-space: nowrap; }
td { text-align: right; white-space: nowrap; }
th, td { padding: 5px 0 5px 16px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.total td { font-weight: 600; border-bottom: 0; }
td.bar { width: 42%; min-width: 90px; }
td.bar span { display: block; height: 9px; border-radius: 2px; background: var(--blue); min-width: 1px; }
table.pairs td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--grey); width: 30%; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px; white-space: pre-wrap;
  font: 0.85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 10px 0; }
@media (max-width: 520px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 1.4rem; }
  .scroll img { min-width: 600px; }
  .bar { display: none; }
  th, td { padding-left: 10px; }
  table { font-size: 0.84rem; }
}
"""


def document(title: str, sections: Sequence[str]) -> str:
    """The whole page."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def heading(text: str, below: str = "") -> str:
    """A section's title, and a paragraph below it."""
    return f"<h2>{escape(text)}</h2>" + (f"<p>{escape(below)}</p>" if below else "")


def figures(values: Sequence[tuple[str, str]]) -> str:
    """Numbers to read first, in boxes: (what, how much)."""
    boxes = "".join(f"<div><dd>{escape(v)}</dd><dt>{escape(k)}</dt></div>" for k, v in values)
    return f"<dl>{boxes}</dl>"


def image(path: Path, alt: str) -> str:
    """A PNG file, inside the page. On a narrow screen it scrolls sideways rather than shrink beyond reading."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<div class="scroll"><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></div>'


def table(content: Table) -> str:
    """A titled table with its note."""
    bar = '<th class="bar"></th>' if content.bars else ""
    head = "".join(f"<th>{escape(h)}</th>" for h in content.head) + bar
    rows = []
    for number, row in enumerate(content.rows):
        cells = "".join(f"<td>{escape(c)}</td>" for c in row)
        if content.bars:
            share = number < len(content.bars) and f'<span style="width:{100 * content.bars[number]:.1f}%"></span>'
            cells += f'<td class="bar">{share or ""}</td>'
        last = content.total and number == len(content.rows) - 1
        rows.append(f'<tr class="total">{cells}</tr>' if last else f"<tr>{cells}</tr>")
    note = f'<p class="quiet">{escape(content.note)}</p>' if content.note else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'{heading(content.title)}<div class="scroll"><table>{body}</table></div>{note}'


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'
