"""The templates of pages and Markdown files. Whatever comes from a run is escaped here: as HTML in *.html, as Markdown in *.md."""

import json
import re
from functools import cache

from markupsafe import Markup, escape

from dnal_dist.common.text import printable


def render(name: str, **context: object) -> str:
    """A file of the folder templates, filled in."""
    return _environment(name.rpartition(".")[2]).get_template(name).render(context)


@cache
def _environment(form: str):
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dnal_dist.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # What is no markup already becomes words, so in Markdown too nothing has to be remembered.
        finalize=_words if form == "md" else None,
    )
    environment.filters |= {"units": _units, "breakable": _breakable, "fence": _fence, "script": _script}
    environment.globals["source"] = lambda name: Markup(environment.loader.get_source(environment, name)[0])
    return environment


def _units(words: str) -> Markup:
    """HTML in which a number stays on one line with its unit."""
    units = r"(\d) (?=(?:k?Wh|[kMGT]?B|[kMGsh]|min|UTC)\b|%)"
    return Markup(re.sub(units, r"\1&nbsp;", str(escape(words))).replace("x fewer", "&times;&nbsp;fewer"))


def _breakable(name: str) -> Markup:
    """HTML of a module's name: a long one breaks at its dots first."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _script(data: object) -> Markup:
    """JSON inside of a script element, which no text in it can end."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def markdown(words: object) -> str:
    """Words that GitHub renders as words: no markup, no HTML, no end of a table's cell, no mention and no reference."""
    # An entity is never read as markup. Signs inside a word (penalty_weight, 1-2) are no markup.
    marked = re.sub(
        r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)|^\s*(?:[#+=-]+|\d+[.)])(?=\s+\S)",
        lambda found: "".join(f"&#{ord(c)};" for c in found[0]),
        printable(str(words)),
    )
    return re.sub(r"(?<!&)([@#])(?=\w)", r"\1<!-- -->", marked)


def _words(value: object) -> Markup:
    return value if hasattr(value, "__html__") else Markup(markdown(value))


def _fence(content: str, language: str = "") -> Markup:
    """Lines as a block of code in Markdown, whatever they hold."""
    lines = "\n".join(printable(line.expandtabs(4)) for line in content.splitlines())
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", lines)), 3)
    return Markup(f"{ticks}{language}\n{lines}\n{ticks}")
