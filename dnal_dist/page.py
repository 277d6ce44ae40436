"""The page of a run, report.html: self-contained, from the run's folder alone. No torch."""

import json
import math
import os
import re
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from string import Template

from plotly.offline import get_plotlyjs

from dnal_dist import published, results
from dnal_dist.results import Run


def write(run: str | Path | Run) -> Path:
    """Write RUN/report.html, one page that needs no network, and give its path.

    The page appears whole or not at all. Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else results.load(run)
    page = run.folder / "report.html"
    draft = page.with_name(f".report.html.{os.getpid()}")
    try:
        draft.write_text(_page(run), encoding="utf-8")
        os.replace(draft, page)
    finally:
        draft.unlink(missing_ok=True)
    return page


def _page(run: Run) -> str:
    result, phases, curves, search = results.result_of(run), results.spans(run), _curves(run), _search(run)
    place = published.place(run, result)
    numbers = {"phases": phases, "curves": curves, "search": search, "published": place.figure() if place else None}
    sections = [
        _curves_section(run, phases, curves, result),
        _search_section(search),
        _section("Channels kept", *_channels(run)),
        _section("Cost", _COST_NOTE, _cost_table(result)),
        _published_section(place),
        _section("Time", _TIME_NOTE, _time_table(run, result)),
        _section("Recipe and environment", "", _recipe(run), _environment(run)),
    ]
    footer = f"Derived from metrics.jsonl and recipe.yaml: {len(run.records):,} records, up to {results.date(run)}."
    template = files("dnal_dist").joinpath("report_template.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"{run.name}: run report"),
        name=escape(run.name),
        about=_text(results.about(run)),
        result=_text(results.headline(run, result)),
        notices=_notices(run, result),
        tiles=_tiles(run, result),
        sections="\n".join(sections),
        footer=_text(footer),
        # Without "<" no text of the run can end the script element that holds it.
        numbers=json.dumps(numbers, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


def _curves(run: Run) -> dict:
    """Points [xs, ys] over the iterations of the run: {accuracy, cross_entropy: {train, held_out, prune}, loss}."""
    curves: dict = {
        key: {
            "train": results.thinned(run.series("train", "global_step", key)),
            "held_out": run.series("eval", "global_step", key),
            "prune": run.series("eval", "global_step", key, "prune"),
        }
        for key in ("accuracy", "cross_entropy")
    }
    return curves | {"loss": results.thinned(run.series("train", "global_step", "loss", "search"))}


def _search(run: Run, limit: int = 240) -> dict | None:
    """What the search's figure shows: counts of gates (columns of 20 bins), each column's epoch and delta, the edges
    between columns, two curves over epochs, and multiply-adds to compare with. None before the search.

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
    end = max(epochs[-1], *opened[0], *expected[0]) if len(epochs) > 1 else epochs[0] + 1
    prune, full = run.last("prune"), run.last("prune").get("full") or run.last("start").get("full")
    driven = run.setting("architecture", "target") is not None
    return {
        "edges": [epochs[0], *((a + b) / 2 for a, b in pairwise(epochs)), end],
        "epochs": epochs,
        "delta": [results.number(r.get("delta", math.nan)) for r in records],
        "counts": [r["histogram"] for r in records],
        # After a budget it is not the gates' own height that decides.
        "threshold": None if driven else prune.get("threshold", run.setting("architecture", "threshold")),
        "open": results.thinned(opened),
        "macs": results.thinned(expected),
        "full": full["exact"]["macs"] if full else None,
        "compact": prune["compact"]["exact"]["macs"] if "compact" in prune else None,
    }


_COST_NOTE = (
    "For one picture. The exact rule counts every multiply-add and parameter of the network as it is; "
    "the paper's rule counts as the paper's tables do."
)
_TIME_NOTE = (
    "Speed is the median over a phase's records, evaluations not counted. "
    "Waiting is time in which training stood still for want of data."
)
_LABELS = {
    "curves": "Line charts of accuracy and loss over the run, phases shaded; the table below gives the final values",
    "search": "Charts over the epochs of the search: gates by value, share of open gates, expected multiply-adds",
    "published": "Chart of top-1 accuracy against size, the published rows and this run; the table below gives its values",
}


def _text(words: str) -> str:
    """Escaped, with numbers kept on one line with their units."""
    return re.sub(r"(\d) (?=(?:[kMGsh]|min|UTC)\b|%)", r"\1&nbsp;", escape(words)).replace("x fewer", "&times;&nbsp;fewer")


def _section(title: str, note: str, *parts: str) -> str:
    note = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<section><h2>{title}</h2>{note}{''.join(parts)}</section>" if any(parts) else ""


def _plot(name: str, legend: dict[str, str]) -> str:
    """A place for a figure, with its legend {class of the sample: words}."""
    items = "".join(f'<li><i class="{kind}"></i>{_text(words)}</li>' for kind, words in legend.items() if words)
    legend_list = f'<ul class="legend">{items}</ul>'
    return f'{legend_list}<div class="plot" id="{name}" role="img" aria-label="{_LABELS[name]}"></div>'


def _scroll(label: str, table: str, size: str = "") -> str:
    return f'<div class="scroll {size}" role="region" tabindex="0" aria-label="{label}">{table}</div>'


def _table(name: str, label: str, head: list[str], rows: list[list[str]], own: int | None = None) -> str:
    """A table, its first column the rows' names; `own` is the row to make stand out."""
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = ""
    for number, (first, *rest) in enumerate(rows):
        cells = f'<th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}'
        body += f'<tr class="own">{cells}</tr>' if number == own else f"<tr>{cells}</tr>"
    head_row = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return _scroll(label, f'<table class="{name}">{head_row}<tbody>{body}</tbody></table>')


def _notices(run: Run, result: dict) -> str:
    notices = ""
    if result["collapsed"]:
        words = f"<strong>The architecture collapsed.</strong> {_text(results.collapse(run))}"
        notices += f'<div class="alarm" role="alert"><p>{words}</p></div>'
    if messages := results.counted(result["warnings"]):
        items = "".join(f"<li>{_text(message)}</li>" for message in messages)
        title = "Warning" if len(messages) == 1 else f"{len(messages):,} warnings"
        notices += f'<div class="caution" role="note"><strong>{title}</strong><ul tabindex="0">{items}</ul></div>'
    return notices


def _tiles(run: Run, result: dict) -> str:
    tiles = []
    if result["accuracy"]:
        phase, accuracy = next(reversed(result["accuracy"].items()))
        before = result["accuracy"].get("pretrain")
        compared = before is not None and phase != "pretrain"
        detail = f"full network: {results.percent(before, 2)}" if compared else results.when(result, phase)
        tiles.append(("Top-1 accuracy", results.percent(accuracy, 2), detail))
    for key, words in (("macs", "Multiply-adds"), ("params", "Parameters")):
        if f"{key}_ratio" in result:
            full, compact, ratio = result["full"]["exact"][key], result["compact"]["exact"][key], result[f"{key}_ratio"]
            tiles.append(
                (
                    words,
                    results.percent(ratio),
                    f"{results.amount(compact, full)} of {results.amount(full)}, {results.fewer(ratio)}",
                )
            )
        elif "full" in result:
            tiles.append((words, results.amount(result["full"]["exact"][key]), "full network"))
    if channels := result.get("channels"):
        total, kept = channels["total"], channels.get("kept")
        known = (results.percent(kept / max(total, 1)), f"{kept:,} of {total:,} kept") if kept is not None else None
        tiles.append(("Channels", *(known or (f"{total:,}", "with a gate"))))
    images = run.last("end").get("images")
    tiles.append(("Time", results.duration(result["seconds"]), f"{images:,} training pictures" if images else "so far"))
    cells = "".join(
        f'<div><dt>{label}</dt><dd class="value">{_text(value)}</dd><dd class="detail">{_text(detail)}</dd></div>'
        for label, value, detail in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _curves_section(run: Run, phases: list[tuple[str, int, int]], curves: dict, result: dict) -> str:
    legend = {
        "training": "training batches",
        "held-out": "held-out pictures",
        "compact": "after pruning" if curves["accuracy"]["prune"][0] else "",
        "penalty": "training loss with the penalty" if curves["loss"][0] else "",
    }
    spans = ", ".join(f"{phase} {first + 1:,} to {last:,}" for phase, first, last in phases)
    note = f"Iterations: {spans}. Training values are means over the batches between two records."
    plot = _plot("curves", legend) if phases else ""
    return _section("Accuracy and loss", note, plot, _accuracy_table(run, result))


def _search_section(search: dict | None) -> str:
    if not search:
        return ""
    threshold, full, compact = search["threshold"], search["full"], search["compact"]
    legend = {
        "threshold": "" if threshold is None else f"threshold {threshold}: channels above stay",
        "full": "" if full is None else f"full network, {results.amount(full)} multiply-adds",
        "compact": "" if compact is None else f"compact network, {results.amount(compact, full)}",
    }
    delta = f"{search['delta'][0]} to {search['delta'][-1]}"
    note = (
        f"A gate is sigmoid(delta * alpha): as the hardness delta grows, here from {delta}, gates move to 0 or 1. "
        "The colour is the number of gates at a value."
    )
    return _section("The search", note, _plot("search", legend))


def _accuracy_table(run: Run, result: dict) -> str:
    rows = []
    for phase in result["accuracy"]:
        record = run.last("eval", phase)
        cells = [results.percent(record[key], 2) if key in record else "" for key in ("accuracy", "top5")]
        cells += [f"{record[key]:{form}}" if key in record else "" for key, form in (("cross_entropy", ".4f"), ("samples", ","))]
        rows.append([results.when(result, phase), results.NETWORKS.get(phase, ""), *cells])
    head = ["held-out pictures", "network", "top-1", "top-5", "cross-entropy", "pictures"]
    return _table("accuracy", "Accuracy after each phase", head, rows)


def _channels(run: Run) -> tuple[str, str]:
    """What the section says, and a row for each site."""
    sites, prune = run.last("start").get("sites") or {}, run.last("prune")
    kept = prune.get("kept") or run.last("gates").get("open")
    if not sites or kept is None:
        return "", ""
    widest, rescued = max(*sites.values(), 1), set(prune.get("rescued", []))
    rows = "".join(_site(site, channels, kept.get(site, 0), widest, site in rescued) for site, channels in sites.items())
    closed = sum(not kept.get(site) for site in sites)
    note = f"{sum(kept.values()):,} of {sum(sites.values()):,} channels in {len(sites):,} layers"
    note += "." if prune else ": gates above the threshold so far."
    note += f" Closed as a whole: {closed:,}." if closed else ""
    note += " Rescued: the layer would have closed, and keeps its strongest channel." if rescued else ""
    # As wide as the longest name needs, within reason.
    letters = min(max(len(str(site)) for site in sites) + 4, 40)
    head = '<th scope="col">layer</th><td></td><th scope="col">channels</th><th scope="col">kept</th>'
    table = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    table = f'<table class="channels" style="--name:{letters}ch">{table}</table>'
    return note, _scroll("Channels kept per layer", table, "tall")


def _site(site: str, channels: int, left: int, widest: int, rescued: bool) -> str:
    """One row: the bar is as long as the full layer is wide, and filled as far as channels stay."""
    share = left / max(channels, 1)
    fate = '<span class="flag">rescued</span>' if rescued else _text(results.percent(share, 0)) if left else "closed"
    bar = f'<span style="width:{100 * channels / widest:.2f}%"><i style="width:{100 * share:.2f}%"></i></span>'
    # Long names break at their dots first.
    name = re.sub(r"([._])", r"\1<wbr>", escape(str(site)))
    cells = f'<td class="bar" aria-hidden="true">{bar}</td><td>{left:,} of {channels:,}</td><td>{fate}</td>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


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
        rows.append(["compact / full", *(results.percent(b / a, 2) if a and b is not None else "" for a, b in pairs)])
    head = ["network", "multiply-adds", "parameters", "multiply-adds (paper)", "parameters (paper)"]
    return _table("cost", "Cost of the full and of the compact network", head, rows)


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
    table = _table("published", "The run among the published rows", *place.lines())
    note = f"{place.table.title}, as published in arXiv 2103.02126. {' '.join(place.remarks)}"
    return _section("Among the published results", note, _plot("published", legend), table)


def _time_table(run: Run, result: dict) -> str:
    rows = []
    for phase, seconds in result["phase_seconds"].items():
        last = run.last("train", phase)
        steps = f"{last.get('step', 0):,} of {last.get('phase_steps', 0):,}" if last else ""
        _, speeds = run.series("train", "step", "images_per_second", phase)
        _, waits = run.series("train", "step", "data_wait_seconds", phase)
        waiting = f"{results.duration(sum(waits))}, {results.percent(sum(waits) / seconds)}" if waits and seconds else ""
        rows.append([phase, results.duration(seconds), steps, f"{median(speeds):,.0f}" if speeds else "", waiting])
    if rows:
        rows.append(["whole run", results.duration(result["seconds"]), "", "", ""])
    head = ["phase", "time", "iterations", "pictures/s", "waiting for data"]
    return _table("time", "Time of each phase", head, rows)


def _recipe(run: Run) -> str:
    if not run.recipe_text:
        return '<p class="note">recipe.yaml is not in the run folder.</p>'
    text = f'<pre tabindex="0" role="region" aria-label="recipe.yaml">{escape(run.recipe_text)}</pre>'
    return f"<details><summary>The recipe, with all its defaults</summary>{text}</details>"


def _environment(run: Run) -> str:
    start, resumes = run.last("start"), sum(bool(r.get("resumed")) for r in run.of("start"))
    words = {
        "device": "device",
        "backend": "backend",
        "world_size": "processes",
        "init_from": "weights to begin with",
        "steps_per_epoch": "iterations an epoch",
        "dropped_per_epoch": "pictures left out of each epoch",
    }
    rows = [[label, str(start[key])] for key, label in words.items() if key in start]
    if bad := sum(run.series("train", "step", "bad_samples")[1]):
        rows.append(["unreadable pictures skipped", f"{bad:,}"])
    if resumes:
        rows.append(["resumed", f"{resumes} times" if resumes > 1 else "once"])
    rows += [[str(name), str(version)] for name, version in (start.get("versions") or {}).items()]
    return _table("facts", "Environment of the run", [], rows)
