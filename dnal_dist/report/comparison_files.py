"""A comparison of runs in words and files: table on the console, comparison.html, .md and .csv, pareto.svg and .png. No torch."""

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from dnal_dist.common import atomic, text
from dnal_dist.report import comparison, markdown, markup, page, pareto, records, seeds, style
from dnal_dist.report.comparison import Comparison, Row

_NOTE = (
    "Runs that differ in nothing with a say but their seed are one row: mean ± standard deviation (n - 1) over those that "
    "finished. Costs are for one image, by the exact rule. Not dominated: no other row of the figure, published ones included "
    "where they compare, has at least the accuracy for at most the cost."
)


def write(found: Comparison, folder: Path) -> None:
    """Write everything into `folder`, which is made if need be; each file appears whole or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    image = None
    if found.diagrams:
        with style.drawing():
            style.save(figure(found), folder / "pareto")
        image = (folder / "pareto.svg").read_bytes()
    else:
        for suffix in ("svg", "png"):
            (folder / f"pareto.{suffix}").unlink(missing_ok=True)
    atomic.put(folder / "comparison.csv", as_csv(found).encode())
    atomic.put(folder / "comparison.md", as_markdown(found).encode())
    atomic.put(folder / "comparison.html", as_html(found, image).encode())


def figure(found: Comparison):
    """Accuracy against cost, a diagram for each validation set; at least one must be there. Call it within `canvas.drawing`."""
    keys = [key.rpartition(".")[2].replace("_", " ") for key in found.keys if key != found.series]
    by = f", by {style.words(keys[0])}" if len(keys) == 1 else ""
    panels = []
    for diagram in found.diagrams:
        points = [point for point, _ in diagram.marks]
        panels.append(pareto.Panel(diagram.size, points, title=style.words(diagram.title, 90), by=by))
    return pareto.figure(panels)


def table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head and a line for each row. What is not known is a dash."""
    keys = found.keys[: comparison.MOST_KEYS]
    head = [
        *(keys or ["run"]),
        "runs",
        "top-1",
        "top-5",
        "MACs",
        "of full",
        "parameters",
        "of full",
        "time",
        "not dominated",
    ]
    lines = []
    for row in found.rows:
        who = [_setting(row, key) for key in keys] if row.settings and keys else [row.runs[0].name]
        who += ["-"] * (max(len(keys), 1) - len(who))
        many = f"{len(row.finished)}" if not row.unfinished else f"{len(row.finished)} of {len(row.runs)}"
        told = [_told(row, name, text.percents) for name in ("accuracy", "top5")]
        for key in ("macs", "params"):
            told += [_told(row, key, text.spread), _told(row, f"{key}_ratio", _share)]
        time = _told(row, "seconds", lambda mean, std: text.duration(mean))
        lines.append([*map(text.printable, who), many, *told, time, _judged(row, found)])
    return head, lines


def _judged(row: Row, found: Comparison) -> str:
    """Whether it is dominated; and that its network is not the search's choice, which makes the answer worth little."""
    answer = "yes" if row in found.front else "-" if row.mean("accuracy") is None else "no"
    share = f"{len(row.collapsed)} of {len(row.finished)} " if len(row.finished) > 1 else ""
    return f"{answer}, {share}collapsed" if row.collapsed else answer


def _setting(row: Row, key: str) -> str:
    value = seeds.value_text(row.settings.get(key))
    return value if len(value) <= 60 else f"{value[:59]}…"


def _share(mean: float, std: float | None) -> str:
    return text.percents(mean, std, 1)


def _told(row: Row, name: str, tell: Callable[[float, float | None], str]) -> str:
    mean = row.mean(name)
    return "-" if mean is None else tell(mean, row.std(name))


def published_table(found: Comparison, name: str) -> tuple[list[str], list[list[str]], list[int]]:
    """A published table with the runs' rows among it: its head, its lines, and which of these are the runs'."""
    pairs = found.among(name)
    head, lines = found.tables[name].lines([told for told, _ in pairs])
    return head, lines, [number for number, (_, row) in enumerate(pairs) if row is not None]


def remarks(found: Comparison) -> list[str]:
    """What to know before reading the numbers, a sentence each."""
    rows, told = found.rows, []
    sets = dict.fromkeys(comparison.validation(run) for row in rows for run in row.runs)
    if len(sets) > 1:
        told.append(f"WARNING: the runs have different validation sets, so their accuracies do not compare: {', '.join(sets)}.")
    for row in rows:
        told += _remarks_of_row(row, found)
    for name, table in found.tables.items():
        if apart := found.differences(name):
            told.append(f"Not comparable with the published rows of {table.title}, since the set-up differs: {'; '.join(apart)}.")
    for run in (run for row in rows for run in row.unfinished):
        stopped = " It was stopped; the same command goes on." if run.records[-1].get("kind") == "stop" else ""
        told.append(f"{where(run.folder, found)}: {records.where(run)}{stopped} It has no say in any number.")
    told += [f"{where(folder, found)}: has not begun." for folder in found.waiting]
    return list(map(text.printable, told))


def _remarks_of_row(row: Row, found: Comparison) -> list[str]:
    told, who = [], row.label(found.keys)
    tried = Counter(str(run.recipe.get("seed")) for run in row.finished if run.recipe)
    if twice := [seed for seed, count in tried.items() if count > 1]:
        told.append(f"WARNING: {who}: more than one run of seed {', '.join(twice)}, which are no independent measurements.")
    sizes = {run.last("start").get("world_size") for run in row.finished}
    if len(sizes) > 1 and not row.settings.get("training.sync_batchnorm"):
        many = ", ".join(sorted(map(str, sizes)))
        told.append(f"{who}: its runs had {many} processes, each of which normalises its own part of a batch.")
    for what, key in (("code", "code"), ("backends", "backend")):
        known = {str(start.get(key, "unknown"))[:60] for run in row.finished for start in run.of("start")}
        if len(known) > 1:
            told.append(f"{who}: its runs had different {what}: {', '.join(sorted(map(_short, known)))}.")
    for run in row.runs:
        if changes := seeds.changes(run):
            told.append(f"{where(run.folder, found)}: changed on the way ({'; '.join(changes)}), so it is a row of its own.")
    for run in row.collapsed:
        told.append(f"WARNING: {where(run.folder, found)}: the architecture collapsed; its network is not the search's choice.")
    return told


def _short(name: str) -> str:
    """A commit as people write it, with the mark of a checkout that had changes."""
    return name[:12] + name[40:] if len(name) >= 40 else name


def where(folder: Path, found: Comparison) -> str:
    """A run's folder as seen from the closest one that all of them lie in."""
    return text.printable(str(folder.resolve().relative_to(found.parent)))


def title(found: Comparison) -> str:
    runs, rows = sum(len(row.runs) for row in found.rows), len(found.rows)
    more = f"; {len(found.waiting):,} more not begun" if found.waiting else ""
    return f"Comparison of {runs:,} run{'s' * (runs != 1)} in {rows:,} row{'s' * (rows != 1)}{more}"


def more_keys(found: Comparison) -> str:
    """Names the keys for which the table has no room; empty if there is none."""
    rest = found.keys[comparison.MOST_KEYS :]
    return text.printable(f"The rows also differ in {', '.join(rest)}: see comparison.csv.") if rest else ""


def as_markdown(found: Comparison) -> str:
    """The comparison as Markdown that GitHub renders."""
    head, lines = table(found)
    cells = [[markdown.text(cell) for cell in line] for line in lines]
    parts = [
        f"# {title(found)}",
        _NOTE,
        markdown.table([markdown.text(cell) for cell in head], cells),
        markdown.text(more_keys(found)),
    ]
    parts.append("\n".join(f"- {markdown.text(remark)}" for remark in remarks(found)))
    if found.diagrams:
        parts.append("[![Accuracy against cost](pareto.png)](pareto.svg)")
    for name, told in found.tables.items():
        names, body, own = published_table(found, name)
        cells = [
            [f"**{markdown.text(c)}**" if number in own else markdown.text(c) for c in line] for number, line in enumerate(body)
        ]
        parts += [f"## {_among(told.title)}", _BY_PAPER, markdown.table(names, cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


_BY_PAPER = "As published in arXiv 2103.02126; costs by the paper's rule."


def _among(title: str) -> str:
    return f"Among the published rows of {title}"


def as_csv(found: Comparison) -> str:
    """Every number in full, shares between 0 and 1, and every key in which the rows differ."""
    file, measures = io.StringIO(), comparison.MEASURES
    writer = csv.writer(file, lineterminator="\n")
    numbers = [f"{name}_{of}" for name in measures for of in ("mean", "std")]
    counts = ["finished", "unfinished", "collapsed"]
    writer.writerow([*map(_cell, found.keys), *counts, "seeds", *numbers, "not_dominated", "folders"])
    for row in found.rows:
        settings = [row.settings.get(key) for key in found.keys]
        tried = " ".join(str(run.recipe.get("seed", "")) for run in row.finished)
        told = ["" if value is None else value for name in measures for value in (row.mean(name), row.std(name))]
        folders = " ".join(where(run.folder, found) for run in row.runs)
        values = [_cell("" if value is None else seeds.value_text(value)) for value in settings]
        many = [len(row.finished), len(row.unfinished), len(row.collapsed)]
        writer.writerow([*values, *many, _cell(tried), *told, int(row in found.front), _cell(folders)])
    return file.getvalue()


def _cell(words: str) -> str:
    """Words that a spreadsheet takes for words, not for a formula."""
    words = text.printable(words)
    try:
        float(words)
    except ValueError:
        return f"'{words}" if words[:1] in ("=", "+", "-", "@") else words
    return words


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
$css
main, footer { max-width: 78rem; }
table.comparison :is(th, td) { padding-inline: 0.6rem; }
.image { display: block; width: 100%; max-width: 52rem; margin: 0.75rem 0 0; padding: 0.75rem; }
.image { background: #fff; border-radius: 6px; }
.remarks { margin: 1rem 0 0; padding-left: 1.2rem; font-size: 0.9rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<header><h1>$title</h1></header>
$sections
</main>
<footer>Derived from metrics.jsonl and recipe.yaml of each run.</footer>
</body>
</html>
""")


def as_html(found: Comparison, image: bytes | None) -> str:
    """A page that needs no network; `image` is its figure, an SVG."""
    head, lines = table(found)
    front = [number for number, row in enumerate(found.rows) if row in found.front]
    notes = "".join(f"<li>{markup.text(remark)}</li>" for remark in remarks(found))
    runs = markup.table("comparison", "The runs", head, lines, front)
    sections = [
        markup.section("Runs", f"{_NOTE} {more_keys(found)}", runs, f'<ul class="remarks">{notes}</ul>' if notes else ""),
        markup.section("Accuracy against cost", "", _image(image)),
    ]
    for name, told in found.tables.items():
        heading = escape(_among(told.title))
        sections.append(markup.section(heading, _BY_PAPER, markup.table("published", heading, *published_table(found, name))))
    return _PAGE.substitute(title=escape(title(found)), css=page.part("report.css"), sections="\n".join(sections))


def _image(image: bytes | None) -> str:
    if image is None:
        return ""
    words = "Diagram of top-1 accuracy against cost; the table above gives the values of the runs"
    return f'<img class="picture" alt="{words}" src="data:image/svg+xml;base64,{base64.b64encode(image).decode()}">'


def tell(found: Comparison, folder: Path, say: Callable[..., None]) -> None:
    """The table, the published ones and the remarks, each line by `say`, which takes words or (words, style of rich)."""
    say((title(found), "bold"))
    head, lines = table(found)
    columns(head, lines, [number for number, row in enumerate(found.rows) if row in found.front], "not dominated", say)
    for name, told in found.tables.items():
        say(f"\n{_among(told.title)} (arXiv 2103.02126):")
        columns(*published_table(found, name), "these runs", say)
    for line in filter(None, [more_keys(found), *remarks(found)]):
        say((line, "yellow") if line.startswith("WARNING") else line)
    say(f"written: {', '.join(name for name in comparison.OUTPUTS if (folder / name).exists())} in {folder}")


def columns(head: list[str], lines: list[list[str]], own: list[int], mark: str, say: Callable[..., None]) -> None:
    """A table in letters, its rows `own` marked, and below it what the `mark` means."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for number, (first, *rest) in enumerate([head, *lines], -1):
        cells = "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))])
        say((f"> {cells}", "bold") if number in own else f"  {cells}")
    if own:
        say(f"  (> {mark})")
