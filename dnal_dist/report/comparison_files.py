"""A comparison of runs as files and words: table on the console, comparison.html, .md and .csv, pareto.svg and .png. No torch."""

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dnal_dist.common import atomic, text
from dnal_dist.report import comparison, pareto, seeds, style, templates, words
from dnal_dist.report.comparison import Comparison, Row
from dnal_dist.report.tables import Table

_NOTE = (
    "Runs whose settings differ in nothing but the seed are one row: mean ± standard deviation (n - 1) over those that "
    "finished. Costs are for one image, by the exact rule. Not dominated: no other row of the figure, published ones included "
    "where they compare, has at least the accuracy for at most the cost."
)


def write(found: Comparison, folder: Path) -> None:
    """Write everything into `folder`, which is made if need be; each file appears whole or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    image = ""
    if found.diagrams:
        with style.drawing():
            style.save(figure(found), folder / "pareto")
        image = base64.b64encode((folder / "pareto.svg").read_bytes()).decode()
    else:
        for suffix in ("svg", "png"):
            (folder / f"pareto.{suffix}").unlink(missing_ok=True)
    atomic.put(folder / "comparison.csv", as_csv(found).encode())
    context = {
        "title": title(found),
        "note": _NOTE,
        "more": more_keys(found),
        "runs": table(found),
        "remarks": remarks(found),
        "image": image,
        "published": [published_table(found, name) for name in found.tables],
    }
    for name in ("comparison.md", "comparison.html"):
        atomic.put(folder / name, templates.render(name, **context).encode(errors="replace"))


def figure(found: Comparison) -> style.Drawing:
    """Accuracy against cost, a diagram for each validation set; at least one must be there. Call it inside `style.drawing`."""
    keys = [key.rpartition(".")[2].replace("_", " ") for key in found.keys if key != found.series]
    by = f", by {style.words(keys[0])}" if len(keys) == 1 else ""
    panels = []
    for diagram in found.diagrams:
        points = [point for point, _ in diagram.marks]
        panels.append(pareto.Panel(diagram.size, points, title=style.words(diagram.title, 90), by=by))
    return pareto.figure(panels)


def table(found: Comparison) -> Table:
    """A line for each row, those that are not dominated to stand out. What is not known is a dash."""
    keys = found.keys[: comparison.MOST_KEYS]
    head = ["top-1", "top-5", "MACs", "of full", "parameters", "of full", "time", "not dominated"]
    lines = []
    for row in found.rows:
        who = (
            [style.words(seeds.value_text(row.settings.get(key)), 60) for key in keys]
            if row.settings and keys
            else [row.runs[0].name]
        )
        who += ["-"] * (max(len(keys), 1) - len(who))
        many = f"{len(row.finished)}" if not row.unfinished else f"{len(row.finished)} of {len(row.runs)}"
        folders = ", ".join(where(run.folder, found) for run in row.runs)
        many = style.words(folders if many == "1" else f"{many}: {folders}", 60)
        cells = [_mean(row, name, text.percents) for name in ("accuracy", "top5")]
        for key in ("macs", "params"):
            cells += [_mean(row, key, text.spread), _mean(row, f"{key}_ratio", lambda mean, std: text.percents(mean, std, 1))]
        time = _mean(row, "seconds", lambda mean, std: text.duration(mean))
        lines.append([*map(text.printable, [*who, many]), *cells, time, _judged(row, found)])
    front = [number for number, row in enumerate(found.rows) if row in found.front]
    return Table("comparison", "The runs", [*(keys or ["name"]), "runs", *head], lines, front, stacks=True)


def _judged(row: Row, found: Comparison) -> str:
    """Whether it is dominated; and that its network is not the search's choice, which makes the answer worth little."""
    answer = "yes" if row in found.front else "-" if row.mean("accuracy") is None else "no"
    share = f"{len(row.collapsed)} of {len(row.finished)} " if len(row.finished) > 1 else ""
    return f"{answer}, {share}collapsed" if row.collapsed else answer


def _mean(row: Row, name: str, write: Callable[[float, float | None], str]) -> str:
    mean = row.mean(name)
    return "-" if mean is None else write(mean, row.std(name))


def published_table(found: Comparison, name: str) -> Table:
    """A published table with the runs' rows among it, these to stand out."""
    pairs = found.among(name)
    return found.tables[name].lines([line for line, _ in pairs], [n for n, (_, row) in enumerate(pairs) if row is not None])


def remarks(found: Comparison) -> list[str]:
    """What to know before reading the numbers, a sentence each."""
    rows, lines = found.rows, []
    sets = dict.fromkeys(comparison.validation(run) for row in rows for run in row.runs)
    if len(sets) > 1:
        lines.append(f"WARNING: the runs have different validation sets, so their accuracies do not compare: {', '.join(sets)}.")
    for row in rows:
        lines += _remarks_of_row(row, found)
    for name, table in found.tables.items():
        if apart := found.differences(name):
            lines.append(f"Not comparable with the published rows of {table.title}, since the set-up differs: {'; '.join(apart)}.")
    for run in (run for row in rows for run in row.unfinished):
        stopped = " It was stopped; the same command goes on." if run.records[-1]["kind"] == "stop" else ""
        lines.append(f"{where(run.folder, found)}: {words.where(run)}{stopped} It counts in no number.")
    lines += [f"{where(folder, found)}: has not begun." for folder in found.waiting]
    return list(map(text.printable, lines))


def _remarks_of_row(row: Row, found: Comparison) -> list[str]:
    lines, who = [], row.label(found.keys)
    tried = Counter(str(run.recipe.get("seed")) for run in row.finished if run.recipe)
    if twice := [seed for seed, count in tried.items() if count > 1]:
        lines.append(f"WARNING: {who}: more than one run of seed {', '.join(twice)}, which are no independent measurements.")
    sizes = {run.last("start").get("world_size") for run in row.finished}
    if len(sizes) > 1 and not row.settings.get("training.sync_batchnorm"):
        many = ", ".join(sorted(map(str, sizes)))
        lines.append(f"{who}: its runs had {many} processes, each of which normalises its own part of a batch.")
    for what, key in (("code", "code"), ("backends", "backend")):
        known = {str(start.get(key, "unknown"))[:60] for run in row.finished for start in run.of("start")}
        if len(known) > 1:
            lines.append(f"{who}: its runs had different {what}: {', '.join(sorted(map(words.commit, known)))}.")
    for run in row.runs:
        if changes := seeds.changes(run):
            lines.append(f"{where(run.folder, found)}: changed on the way ({'; '.join(changes)}), so it is a row of its own.")
    lines += [f"{where(run.folder, found)}: {run.faults}." for run in row.runs if run.faults]
    for run in row.collapsed:
        lines.append(f"WARNING: {where(run.folder, found)}: the architecture collapsed; its network is not the search's choice.")
    return lines


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
        numbers = ["" if value is None else value for name in measures for value in (row.mean(name), row.std(name))]
        folders = " ".join(where(run.folder, found) for run in row.runs)
        values = [_cell("" if value is None else seeds.value_text(value)) for value in settings]
        many = [len(row.finished), len(row.unfinished), len(row.collapsed)]
        writer.writerow([*values, *many, _cell(tried), *numbers, int(row in found.front), _cell(folders)])
    return file.getvalue()


def _cell(words: str) -> str:
    """Words that a spreadsheet takes for words, not for a formula."""
    words = text.printable(words)
    try:
        float(words)
    except ValueError:
        return f"'{words}" if words[:1] in ("=", "+", "-", "@") else words
    return words


def show(found: Comparison, folder: Path, say: Callable[..., None]) -> None:
    """Print the tables and the remarks, each line by `say`, which takes words or (words, style of rich)."""
    say((title(found), "bold"))
    columns(table(found), "not dominated", say)
    for name in found.tables:
        own = published_table(found, name)
        say(f"\n{own.label} (arXiv 2103.02126):")
        columns(own, "these runs", say)
    for line in filter(None, [more_keys(found), *remarks(found)]):
        say((line, "yellow") if line.startswith("WARNING") else line)
    say(f"written: {', '.join(name for name in comparison.OUTPUTS if (folder / name).exists())} in {folder}")


def columns(table: Table, mark: str, say: Callable[..., None]) -> None:
    """A table in letters, its `own` rows marked, and below it what the `mark` means."""
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    for number, (first, *rest) in enumerate([table.head, *table.rows], -1):
        cells = "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))])
        say((f"> {cells}", "bold") if number in table.own else f"  {cells}")
    if table.own:
        say(f"  (> {mark})")
