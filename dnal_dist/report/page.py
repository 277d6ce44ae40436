"""The page of a run, report.html: self-contained, from the run's folder alone. No torch."""

import json
import math
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from dnal_dist.common import atomic, text
from dnal_dist.report import accounts, explorer, markup, published
from dnal_dist.report import records as report_records
from dnal_dist.report.records import NETWORKS, Run, about, collapse, date, headline, load, result_of, thinned, when


def write(run: str | Path | Run) -> Path:
    """Write RUN/report.html, one page that needs no network, and give its path.

    The page appears whole or not at all. Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    page = run.folder / "report.html"
    atomic.put(page, _page(run).encode(errors="replace"))
    return page


def _page(run: Run) -> str:
    result, phases, curves, search = result_of(run), report_records.spans(run), _curves(run), _search(run)
    place, explored = published.place(run, result), explorer.numbers(run)
    figure = place.figure() if place else None
    numbers = {"phases": phases, "curves": curves, "search": search, "published": figure, "explorer": explored}
    sections = [
        explorer.section(run, explored),
        _curves_section(run, phases, curves, result),
        _search_section(search),
        markup.section("Cost of the network", _COST_NOTE, _cost_table(result)),
        _published_section(place),
        accounts.section(run, result),
        accounts.environment(run),
        accounts.receipts(run),
    ]
    footer = f"Derived from metrics.jsonl and recipe.yaml: {len(run.records):,} records, up to {date(run)}."
    return Template(part("report_template.html")).substitute(
        title=escape(f"{run.name}: run report"),
        css=part("report.css"),
        name=escape(run.name),
        about=markup.text(about(run)),
        result=markup.text(headline(run, result)),
        notices=_notices(run, result),
        tiles=_tiles(run, result),
        sections="\n".join(sections),
        footer=markup.text(footer),
        # Without "<" no text of the run can end the script element that holds it.
        numbers=json.dumps(numbers, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        js=part("report.js") + part("explorer.js"),
    )


def part(name: str) -> str:
    """A file of which pages are made, as text."""
    return files("dnal_dist.report").joinpath(name).read_text("utf-8")


def _curves(run: Run) -> dict:
    """Points [xs, ys] over the iterations of the run: {accuracy, cross_entropy: {train, held_out, prune}, loss}."""
    curves: dict = {
        key: {
            "train": thinned(run.series("train", "global_step", key)),
            "held_out": run.series("eval", "global_step", key),
            "prune": run.series("eval", "global_step", key, "prune"),
        }
        for key in ("accuracy", "cross_entropy")
    }
    return curves | {"loss": thinned(run.series("train", "global_step", "loss", "search"))}


def _search(run: Run, limit: int = 240) -> dict | None:
    """What the search's figure shows: counts of gates (columns of 20 bins), each column's epoch and delta, the edges
    between columns, two curves over epochs, and MACs to compare with. None before the search.

    At most `limit` columns, evenly taken."""
    records = [r for r in run.of("gates") if "epoch" in r and sum(r.get("histogram", [])) > 0]
    # One column for each position and as many bins throughout: the figure cannot show more.
    records = list({r["epoch"]: r for r in records if len(r["histogram"]) == len(records[-1]["histogram"])}.values())
    if not records:
        return None
    records = records[:: math.ceil(len(records) / limit)]
    opened, expected = (run.series("train", "epoch", key, "search") for key in ("open_share", "expected_macs"))
    epochs = [r["epoch"] for r in records]
    # Each column reaches halfway to its neighbours: a record is the gates at one moment.
    end = max([epochs[-1], *opened[0], *expected[0]]) if len(epochs) > 1 else epochs[0] + 1
    prune, full = run.last("prune"), run.last("prune").get("full") or run.last("start").get("full")
    driven = run.setting("architecture", "target") is not None
    return {
        "edges": [epochs[0], *((a + b) / 2 for a, b in pairwise(epochs)), end],
        "epochs": epochs,
        "delta": [text.number(r.get("delta", math.nan)) for r in records],
        "counts": [r["histogram"] for r in records],
        # After a budget it is not the gates' own height that decides.
        "threshold": None if driven else prune.get("threshold", run.setting("architecture", "threshold")),
        "open": thinned(opened),
        "macs": thinned(expected),
        "full": full["exact"]["macs"] if full else None,
        "compact": prune["compact"]["exact"]["macs"] if "compact" in prune else None,
    }


_COST_NOTE = (
    "For one image. The exact rule counts every multiply-add and parameter of the network as it is; "
    "the paper's rule counts as the paper's tables do."
)
_LABELS = {
    "curves": "Line charts of accuracy and loss over the run, phases shaded; the table below gives the final values",
    "search": "Charts over the epochs of the search: gates by value, share of open gates, expected MACs",
    "published": "Chart of top-1 accuracy against size, the published rows and this run; the table below gives its values",
}


def _notices(run: Run, result: dict) -> str:
    notices = ""
    if result["collapsed"]:
        words = f"<strong>The architecture collapsed.</strong> {markup.text(collapse(run))}"
        notices += f'<div class="alarm" role="alert"><p>{words}</p></div>'
    if messages := text.counted(result["warnings"]):
        items = "".join(f"<li>{markup.text(message)}</li>" for message in messages)
        title = "Warning" if len(messages) == 1 else f"{len(messages):,} warnings"
        notices += f'<div class="caution" role="note"><strong>{title}</strong><ul tabindex="0">{items}</ul></div>'
    return notices


def _tiles(run: Run, result: dict) -> str:
    tiles = []
    if result["accuracy"]:
        phase, accuracy = next(reversed(result["accuracy"].items()))
        before = result["accuracy"].get("pretrain")
        compared = before is not None and phase != "pretrain"
        detail = f"full network: {text.percent(before, 2)}" if compared else when(result, phase)
        tiles.append(("Top-1 accuracy", text.percent(accuracy, 2), detail))
    for key, words in (("macs", "MACs"), ("params", "Parameters")):
        if f"{key}_ratio" in result:
            full, compact, ratio = result["full"]["exact"][key], result["compact"]["exact"][key], result[f"{key}_ratio"]
            tiles.append(
                (
                    words,
                    text.percent(ratio),
                    f"{text.amount(compact, full)} of {text.amount(full)}, {text.fewer(ratio)}",
                )
            )
        elif "full" in result:
            tiles.append((words, text.amount(result["full"]["exact"][key]), "full network"))
    if channels := result.get("channels"):
        total, kept = channels["total"], channels.get("kept")
        known = (text.percent(kept / max(total, 1)), f"{kept:,} of {total:,} kept") if kept is not None else None
        tiles.append(("Channels", *(known or (f"{total:,}", "with a gate"))))
    images = run.last("end").get("images")
    tiles.append(("Time", text.duration(result["seconds"]), f"{images:,} training images" if images else "so far"))
    cells = "".join(
        f'<div><dt>{label}</dt><dd class="value">{markup.text(value)}</dd><dd class="detail">{markup.text(detail)}</dd></div>'
        for label, value, detail in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _curves_section(run: Run, phases: list[tuple[str, int, int]], curves: dict, result: dict) -> str:
    legend = {
        "training": "training batches",
        "held-out": "held-out images",
        "compact": "after pruning" if curves["accuracy"]["prune"][0] else "",
        "penalty": "training loss with the penalty" if curves["loss"][0] else "",
    }
    spans = ", ".join(f"{phase} {first + 1:,} to {last:,}" for phase, first, last in phases)
    note = f"Iterations: {spans}. Training values are means over the batches between two records."
    plot = markup.plot("curves", _LABELS["curves"], legend) if phases else ""
    return markup.section("Accuracy and loss", note, plot, _accuracy_table(run, result))


def _search_section(search: dict | None) -> str:
    if not search:
        return ""
    threshold, full, compact = search["threshold"], search["full"], search["compact"]
    legend = {
        "threshold": "" if threshold is None else f"threshold {threshold}: channels above stay",
        "full": "" if full is None else f"full network, {text.amount(full)} MACs",
        "compact": "" if compact is None else f"compact network, {text.amount(compact, full)}",
    }
    delta = f"{search['delta'][0]} to {search['delta'][-1]}"
    note = (
        f"A gate is sigmoid(delta * alpha): as the hardness delta grows, here from {delta}, gates move to 0 or 1. "
        "The colour is the number of gates at a value."
    )
    return markup.section("The search", note, markup.plot("search", _LABELS["search"], legend))


def _accuracy_table(run: Run, result: dict) -> str:
    rows = []
    for phase in result["accuracy"]:
        record = run.last("eval", phase)
        cells = [text.percent(record[key], 2) if key in record else "" for key in ("accuracy", "top5")]
        cells += [f"{record[key]:{form}}" if key in record else "" for key, form in (("cross_entropy", ".4f"), ("samples", ","))]
        rows.append([when(result, phase), NETWORKS.get(phase, ""), *cells])
    head = ["held-out images", "network", "top-1", "top-5", "cross-entropy", "pictures"]
    return markup.table("accuracy", "Accuracy after each phase", head, rows)


def _cost_table(result: dict) -> str:
    columns = [(rule, key) for rule in ("exact", "paper") for key in ("macs", "params")]
    costs = [[result.get(which, {}).get(rule, {}).get(key) for rule, key in columns] for which in ("full", "compact")]
    rows = [
        [which, *("" if value is None else f"{value:,}" for value in cost)]
        for which, cost in zip(("full", "compact"), costs, strict=True)
        if which in result
    ]
    if len(rows) == 2:
        pairs = list(zip(*costs, strict=True))
        rows.append(["compact / full", *(text.percent(b / a, 2) if a and b is not None else "" for a, b in pairs)])
    head = ["network", "MACs", "parameters", "MACs (paper)", "parameters (paper)"]
    return markup.table("cost", "Cost of the full and of the compact network", head, rows)


def _published_section(place: published.Place | None) -> str:
    if place is None:
        return ""
    own = bool(place.own and place.own.top1)
    legend = {
        "dnal": "DNAL, by penalty weight",
        "others": "other methods",
        "baseline": "full network",
        "compact": place.own.label if own and not place.differences else "",
        "apart": f"{place.own.label}, not comparable" if own and place.differences else "",
    }
    table = markup.table("published", "The run among the published rows", *place.lines())
    note = f"{place.table.title}, as published in arXiv 2103.02126. {' '.join(place.remarks)}"
    return markup.section("Among the published results", note, markup.plot("published", _LABELS["published"], legend), table)
