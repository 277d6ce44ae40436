"""Pieces of the run's page: escaped text, sections, tables, places for figures. Whatever comes from a run is escaped here."""

import re
from collections.abc import Collection
from html import escape

_UNITS = r"(\d) (?=(?:k?Wh|[kMGT]?B|[kMGsh]|min|UTC)\b|%)"


def text(words: str) -> str:
    """Escaped, with numbers kept on one line with their units."""
    return re.sub(_UNITS, r"\1&nbsp;", escape(words)).replace("x fewer", "&times;&nbsp;fewer")


def breakable(name: str) -> str:
    """An escaped name of a module: long ones break at their dots first."""
    return re.sub(r"([._])", r"\1<wbr>", escape(name))


def section(title: str, note: str, *parts: str) -> str:
    """A section with a heading; empty where it has no part."""
    note = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{title}</h2>{note}{''.join(parts)}</section>" if any(parts) else ""


def plot(name: str, label: str, legend: dict[str, str]) -> str:
    """A place for a figure, with its legend {class of the sample: words}."""
    items = "".join(f'<li><i class="{kind}"></i>{text(words)}</li>' for kind, words in legend.items() if words)
    return f'<ul class="legend">{items}</ul><div class="plot" id="{name}" role="img" aria-label="{label}"></div>'


def scroll(label: str, content: str, size: str = "") -> str:
    """A region that scrolls by itself, by keyboard too."""
    return f'<div class="scroll {size}" role="region" tabindex="0" aria-label="{label}">{content}</div>'


def table(name: str, label: str, head: list[str], rows: list[list[str]], own: Collection[int] = (), size: str = "") -> str:
    """A table, its first column the rows' names; `own` are the rows to make stand out. Columns without any content are left out."""
    if not rows:
        return ""
    used = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows)]
    columns = "".join(f'<th scope="col">{text(head[i])}</th>' for i in used) if head else ""
    body = ""
    for number, row in enumerate(rows):
        first, *rest = (row[i] for i in used)
        cells = f'<th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}'
        body += f'<tr class="own">{cells}</tr>' if number in own else f"<tr>{cells}</tr>"
    head_row = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return scroll(label, f'<table class="{name}">{head_row}<tbody>{body}</tbody></table>', size)
