"""The page of a report: one HTML file with everything inline, which runs and fetches nothing. This module imports no torch."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

# With this policy, even a text that was not escaped by mistake could neither run code nor connect to the network.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1160px; margin: 2em auto; padding: 0 1.2em; }}
h1 {{ font-size: 1.6em; margin-bottom: .2em; }} h2 {{ font-size: 1.15em; margin: 2em 0 .5em; }}
p {{ max-width: 75ch; }} .note {{ color: #5a6577; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35em .6em; text-align: right; border-bottom: 1px solid #dde2ea; white-space: nowrap; }}
th {{ border-bottom: 2px solid #aab3c2; }} th.text, td.text {{ text-align: left; }}
tr.best td {{ background: #e8f4ea; font-weight: 600; }}
img {{ max-width: 100%; height: auto; display: block; }}
li {{ overflow-wrap: anywhere; }}
</style></head><body>
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int, best: int | None) -> str:
    """Return a table; its first ``texts`` columns are text, and row ``best`` is highlighted."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="text"' if k < texts else "" for k in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "\n".join(f'<tr class="{"best" if k == best else ""}">{line(cells, "td")}</tr>' for k, cells in enumerate(rows))
    return f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def section(title: str, note: str, content: str) -> str:
    """Return a section; ``content`` is HTML."""
    return f'<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n{content}'


def figure(title: str, caption: str, image: bytes) -> str:
    """Return a section with a picture in it."""
    source = base64.b64encode(image).decode()
    return section(title, caption, f'<img alt="{escape(title)}" src="data:image/png;base64,{source}">')


def listing(title: str, note: str, items: Sequence[str]) -> str:
    """Return a section with a list in it."""
    return section(title, note, "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in items) + "</ul>")


def page(title: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """Return the whole page; the sections are HTML, everything else is text."""
    lines = "".join(f"<br>{escape(key)}: {escape(value)}" for key, value in facts.items()).removeprefix("<br>")
    return (
        HEAD.format(title=escape(title))
        + f"<h1>{escape(title)}</h1>\n<p>{lines}</p>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
