"""The data doctor's report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

    what is trained on is green, token by token; the rest is grey; every text is escaped

The alternative, a template engine, is more than two tables and a list need.
"""

from __future__ import annotations

from html import escape
from typing import Any

GENERATOR = '<meta name="generator" content="qlora data">'  # by which a page of ours is known
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .8rem; border-radius: 6px;
      font-size: 14px; color: #666 }
pre span { border-right: 1px solid #ddd } pre .t { background: #c9efcf; color: #05400f; border-color: #8fd19a }
pre i { font-style: normal; opacity: .5 }
.key .t { background: #c9efcf; color: #05400f; padding: 0 .3rem }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #16181a } pre { background: #222527; color: #999 } pre span { border-color: #3a3d40 }
  pre .t, .key .t { background: #14401d; color: #bff0c8; border-color: #2b7038 } }
"""


def page(found: dict[str, Any], title: str) -> str:
    """A report of `doctor.report` as HTML."""
    parts: list[str] = [name for name in ("train", "held_out") if name in found]
    body = [f"<h1>{escape(title)}</h1>", _table(found, parts)]
    for name in parts:
        if found[name]["notes"]:
            items = "".join(f"<li>{escape(note)}</li>" for note in found[name]["notes"])
            body.append(f"<h2>Notes on {escape(name.replace('_', ' '))}</h2><ul>{items}</ul>")
    body.append('<h2>Examples</h2><p class="key"><span class="t">Green</span> is trained on, token by token.</p>')
    body += [_example(example) for example in found["shown"]]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'{GENERATOR}<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(found: dict[str, Any], parts: list[str]) -> str:
    """The counts, a row each, a column for each part of the data."""
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in parts)
    rows = []
    for name, value in found["train"].items():
        if isinstance(value, int):
            cells = "".join(f'<td class="n">{found[part][name]:,}</td>' for part in parts)
            rows.append(f"<tr><th>{escape(name.replace('_', ' '))}</th>{cells}</tr>")
    for name in found["train"]["lengths"]:
        cells = "".join(f'<td class="n">{found[part]["lengths"][name]:,}</td>' for part in parts)
        rows.append(f"<tr><th>length: {escape(name)}</th>{cells}</tr>")
    for name, value in found["overlaps"].items():
        cells = f'<td class="n" colspan="{len(parts)}">{value:,}</td>'
        rows.append(f"<tr><th>{escape(name.replace('_', ' '))}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _example(example: dict[str, Any]) -> str:
    """One example, a span for each token; line ends are shown, and are ends of lines too."""
    spans = []
    for text, trained in example["pieces"]:
        shown = escape(text).replace("\n", "<i>↵</i>\n")
        spans.append(f"<span{' class=' + chr(34) + 't' + chr(34) if trained else ''}>{shown}</span>")
    return f"<h3>{escape(example['place'])}</h3><pre>{''.join(spans)}</pre>"
