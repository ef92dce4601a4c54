"""The page of a report: one HTML file with everything inline, which fetches nothing. This module imports no torch."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

FILTERED = 8
"""Smallest number of rows of a table with a filter."""
# With this policy, even a text that was not escaped by mistake could neither run code nor connect to the network: the only script
# is the one whose checksum is named here.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{checksum}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{css}</style></head><body>
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        order: what it is sorted by (None: by its text).
        link: an address to go to.
        tone: its class: ``soft``, ``note``, ``bad`` or ``long``.
    """

    text: str
    order: float | None = None
    link: str = ""
    tone: str = ""


@functools.cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def address(path: Path, out: Path) -> str:
    """Return the address of a directory, relative to the page in ``out``, so that both may be moved together."""
    relative = os.path.relpath(path.resolve(), out.resolve())
    return "./" + quote(os.fsencode(relative)) + "/"


def link(text: str, to: str) -> str:
    """Return a link as HTML."""
    return f'<a href="{escape(to)}">{escape(text)}</a>'


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], texts: int, best: int | None) -> str:
    """Return a table that sorts and filters.

    Args:
        name: a word that no other table of the page has.
        head: the names of the columns.
        rows: the cells.
        texts: the first columns, which are text.
        best: the row that is highlighted.
    """

    def kind(k: int, tone: str = "") -> str:
        found = " ".join(filter(None, ["text" if k < texts or tone == "long" else "", tone]))
        return f' class="{found}"' if found else ""

    def shown(k: int, cell: Cell) -> str:
        order = "" if cell.order is None else f' data-order="{cell.order!r}"'
        inside = link(cell.text, cell.link) if cell.link else escape(cell.text)
        return f"<td{kind(k, cell.tone)}{order}>{inside}</td>"

    def line(k: int, row: Sequence[Cell]) -> str:
        cells = "".join(shown(n, cell) for n, cell in enumerate(row))
        return f'<tr class="best">{cells}</tr>' if k == best else f"<tr>{cells}</tr>"

    tones = ["long" if any(row[k].tone == "long" for row in rows) else "" for k in range(len(head))]
    top = "".join(
        f'<th scope="col"{kind(k, tone)}><span>{escape(each)}</span></th>'
        for k, (each, tone) in enumerate(zip(head, tones, strict=True))
    )
    body = "\n".join(line(k, row) for k, row in enumerate(rows))
    sorts = len(rows) > 1
    classes = ' class="sorts"' if sorts else ""
    bar = (
        f'<div class="filter" data-table="{name}" hidden><label>Filter: <input type="search" '
        f'placeholder="words that a row must have"></label><output role="status"></output></div>\n'
    )
    return (
        (bar if len(rows) >= FILTERED else "")
        + f'<div class="wide-table" role="region" aria-label="{name}" tabindex="0"><table id="{name}"{classes}>'
        + f"<thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def section(name: str, title: str, content: str, note: str = "") -> str:
    """Return a section; ``content`` is HTML, everything else is text."""
    said = f'<p class="soft">{escape(note)}</p>\n' if note else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{said}{content}</section>'


def figure(svgs: str) -> str:
    """Return a figure; its argument is SVG."""
    return f"<figure>{svgs}</figure>"


def command(text: str) -> str:
    """Return a command line with a button that copies it."""
    return f'<div class="copy"><code>{escape(text)}</code><button type="button" hidden>Copy</button></div>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listing(items: Sequence[str]) -> str:
    """Return a list."""
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in items) + "</ul>"


def page(title: str, facts: str, contents: Mapping[str, str], sections: Sequence[str]) -> str:
    """Return the whole page; ``contents`` has the titles of the sections. These are HTML, and everything else is text."""
    script = "\n" + _file("page.js")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    places = "".join(f"<li>{link(text, f'#{name}')}</li>" for name, text in contents.items())
    return (
        HEAD.format(title=escape(title), css=_file("page.css"), checksum=checksum)
        + f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(facts)}</p>\n'
        + f'<nav aria-label="sections"><ul>{places}</ul></nav>\n<main>\n'
        + "\n".join(sections)
        + f"\n</main>\n<script>{script}</script>\n</body></html>\n"
    )
