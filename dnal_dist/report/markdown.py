"""Pieces of Markdown as GitHub renders it. Whatever comes from a run is made harmless here."""

import re

from dnal_dist.common.text import printable


def text(words: object) -> str:
    """Words that stay words: no markup, no HTML, no end of a table's cell, no mention and no reference."""
    plain = printable(str(words))
    # An entity is never read as markup; what stands within a word (penalty_weight, 1-2) is none anyway.
    marked = re.sub(r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)|^\s*(?:[#+=-]+|\d+[.)])(?=\s+\S)", lambda found: _entity(found[0]), plain)
    return re.sub(r"(?<!&)([@#])(?=\w)", r"\1<!-- -->", marked)


def _entity(characters: str) -> str:
    return "".join(f"&#{ord(c)};" for c in characters)


def code(words: object) -> str:
    """Words as code, in a table too."""
    return f"<code>{text(words)}</code>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already, the first column to the left; columns without content are left out."""
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [head, [":--" if i == 0 else "--:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def fence(content: str, language: str = "") -> str:
    """Lines as a block of code, whatever they hold."""
    lines = "\n".join(printable(line.expandtabs(4)) for line in content.splitlines())
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", lines)), 3)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def details(summary: str, content: str) -> str:
    """Folded away; `summary` is Markdown already."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"
