"""The page and the table of a run, from its folder alone: no torch, no network, finished or not.

python -m dnal_dist.report RUN     write RUN/report.html and print the table
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from string import Template

import yaml
from plotly.offline import get_plotlyjs

NETWORKS = {
    "pretrain": "full, no gates",
    "search": "full, gated",
    "prune": "compact, as cut",
    "finetune": "compact",
}


@dataclass(frozen=True)
class Run:
    """A run folder in memory: the recipe as a dictionary and as text, the records of metrics.jsonl in their order."""

    folder: Path
    recipe: dict
    recipe_text: str
    records: list[dict]

    def of(self, kind: str, phase: str | None = None) -> list[dict]:
        """Records of one kind, of one phase if given."""
        return [r for r in self.records if r.get("kind") == kind and phase in (None, r.get("phase"))]

    def last(self, kind: str, phase: str | None = None) -> dict:
        """The latest record of one kind; empty if there is none yet."""
        return next(reversed(self.of(kind, phase)), {})

    def series(self, kind: str, x: str, y: str, phase: str | None = None) -> tuple[list[float], list[float]]:
        """Two keys of the records in which both are finite numbers; a loss that became NaN leaves a gap."""
        pairs = [(r.get(x), r.get(y)) for r in self.of(kind, phase)]
        finite = [pair for pair in pairs if all(isinstance(v, int | float) and math.isfinite(v) for v in pair)]
        return [a for a, _ in finite], [b for _, b in finite]

    def setting(self, part: str, key: str) -> object:
        """One key of one part of the recipe, None where there is none."""
        settings = self.recipe.get(part)
        return settings.get(key) if isinstance(settings, dict) else None

    @property
    def name(self) -> str:
        """The run's name by its own record, else by its recipe, else its folder's."""
        return str(self.last("start").get("name") or self.recipe.get("name") or self.folder.resolve().name)


def load(run: str | Path) -> Run:
    """Read a run folder.

    A last line of metrics.jsonl that was cut short is left out, and recipe.yaml may be absent. Raises ValueError naming
    the path and the remedy if the folder or metrics.jsonl is missing, holds no record, or has a broken line before its
    last.
    """
    folder = Path(run)
    path, recipe_path = folder / "metrics.jsonl", folder / "recipe.yaml"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder; give the folder that a recipe names as its 'output'")
    try:
        lines = path.read_bytes().split(b"\n")
        recipe_text = recipe_path.read_text("utf-8") if recipe_path.exists() else ""
        recipe = yaml.safe_load(recipe_text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, so {folder} is not a run folder; start the run first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: cannot be read ({error}); mend the file or its permissions") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{recipe_path}: not valid YAML ({reason}); mend it or move it away") from None
    return Run(folder, recipe if isinstance(recipe, dict) else {}, recipe_text, _records(path, lines))


def _records(path: Path, lines: list[bytes]) -> list[dict]:
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError:
            # The last line of a run that was killed while it wrote.
            if number == numbered[-1][0]:
                break
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; remove this line and try again")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no record yet; wait for the run's first iterations, or start it again")
    return records


def summary(run: str | Path | Run) -> dict:
    """What a run came to, finished or not; a key whose value is not known yet is absent.

    accuracy {phase: top-1 of its last evaluation}, full and compact (costs as in metrics.jsonl), macs_ratio and
    params_ratio (compact / full, exact rule), channels {total, kept}, collapsed, warnings, seconds,
    phase_seconds {phase: seconds}, phase (the last one seen), finished. Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    start, prune, end = run.last("start"), run.last("prune"), run.last("end")
    elapsed = _elapsed(run)
    known = {
        "accuracy": {r["phase"]: r["accuracy"] for r in run.of("eval") if "phase" in r and "accuracy" in r},
        "full": prune.get("full") or start.get("full"),
        "compact": prune.get("compact"),
        "collapsed": bool(prune.get("collapsed")),
        "warnings": [str(r.get("message", "")) for r in run.of("warning")],
        "seconds": end.get("seconds", sum(elapsed.values())),
        "phase_seconds": {phase: seconds for phase, seconds in elapsed.items() if phase},
        "phase": next((r["phase"] for r in reversed(run.records) if "phase" in r), None),
        "finished": bool(end),
    }
    if known["full"] and known["compact"]:
        for key in ("macs", "params"):
            known[f"{key}_ratio"] = known["compact"]["exact"][key] / max(known["full"]["exact"][key], 1)
    if start.get("sites"):
        known["channels"] = {"total": sum(start["sites"].values())}
        if "kept" in prune:
            known["channels"]["kept"] = sum(prune["kept"].values())
    return {key: value for key, value in known.items() if value is not None}


def _elapsed(run: Run) -> dict[str, float]:
    """Seconds of each phase ("" outside of any), as the run told them, else from the times of its records."""
    told = {r["phase"]: r["seconds"] for r in run.of("phase")} | run.last("end").get("phase_seconds", {})
    seconds: dict[str, float] = {}
    for before, record in pairwise(run.records):
        # The time between a stop and its resume is nobody's.
        if record.get("kind") != "start" and "time" in before and "time" in record:
            phase = record.get("phase", "")
            seconds[phase] = seconds.get(phase, 0.0) + record["time"] - before["time"]
    return seconds | told


def _amount(count: float, like: float | None = None) -> str:
    """Three digits and a unit, 2.42 M; in the unit of `like` where that stays readable."""
    for reference in (count if like is None else like, count):
        units = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
        scale, unit = next((u for u in units if reference >= 0.9995 * u[0]), (1, ""))
        if count / scale >= 0.01:
            break
    return f"{count / scale:.3g}{unit}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if share == 0 or share >= 0.001 else f"{100 * share:.2g} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _fewer(ratio: float) -> str:
    return f"{1 / ratio:,.{0 if ratio < 0.01 else 1}f}x fewer" if ratio else "nothing left"


def _counted(messages: list[str]) -> list[str]:
    """Each message once, in order, with how often it came."""
    return [message if n == 1 else f"{message} ({n:,} times)" for message, n in Counter(messages).items()]


def _when(result: dict, phase: str) -> str:
    """When an accuracy was measured: after a phase, or in one that still goes on."""
    goes_on = phase == result.get("phase") != "prune" and not result["finished"] and phase not in result["ended"]
    return f"so far in {phase}" if goes_on else f"after {'pruning' if phase == 'prune' else phase}"


def _result(run: Run) -> dict:
    return summary(run) | {"ended": {r.get("phase") for r in run.of("phase")}}


def _where(run: Run) -> str:
    """Where an unfinished run stands."""
    train = run.last("train")
    if not train:
        return "Not finished: no iteration is on record yet."
    steps = f"iteration {train.get('step', 0):,} of {train.get('phase_steps', 0):,}"
    return f"Not finished: at {steps} of {train.get('phase')}."


def _collapse(run: Run) -> str:
    weight = run.setting("architecture", "penalty_weight")
    here = "" if weight is None else f" ({weight} in this run)"
    return (
        "The search would have closed nearly every channel, so the network that was kept is not one it chose. "
        f"Lower architecture.penalty_weight{here} and run again."
    )


def print_table(run: str | Path | Run, console=None) -> None:
    """Print the final table, on `console` (a rich Console) or stdout; plain and uncut where that is no terminal.

    Raises ValueError as `load` does.
    """
    from rich.console import Console
    from rich.text import Text

    run = run if isinstance(run, Run) else load(run)
    console = console or Console()

    def say(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)

    result = _result(run)
    rows = _rows(result)
    width = max(len(label) for label, _ in rows)
    say((_printable(run.name), "bold"))
    for label, value in rows:
        say(f"{label:<{width}}   ", (value, "bold"))
    if (run.folder / "report.html").exists():
        say(f"{'report':<{width}}   {run.folder / 'report.html'}")
    if not result["finished"]:
        say((_where(run), "yellow"))
    for message in _counted(result["warnings"]):
        say((f"WARNING: {_printable(message)}", "yellow"))
    if result["collapsed"]:
        say((f"THE ARCHITECTURE COLLAPSED: {_collapse(run)}", "bold red"))


def _printable(words: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in words)


def _rows(result: dict) -> list[tuple[str, str]]:
    order = [*NETWORKS, *(phase for phase in result["accuracy"] if phase not in NETWORKS)]
    accuracies = [(phase, result["accuracy"][phase]) for phase in order if phase in result["accuracy"]]
    rows = [(f"accuracy {_printable(_when(result, phase))}", _percent(value, 2)) for phase, value in accuracies]
    for key, words in (("macs", "multiply-adds"), ("params", "parameters")):
        for rule in ("exact", "paper"):
            full, compact = (result.get(which, {}).get(rule, {}).get(key) for which in ("full", "compact"))
            label = words if rule == "exact" else f"{words} (paper's rule)"
            if full and compact is not None:
                ratio = compact / full
                rows.append((label, f"{_amount(full)} -> {_amount(compact, full)}, {_percent(ratio)}, {_fewer(ratio)}"))
            elif full:
                rows.append((label, f"{_amount(full)} in the full network"))
    channels = result.get("channels", {})
    if "kept" in channels:
        share = _percent(channels["kept"] / max(channels["total"], 1))
        rows.append(("channels kept", f"{channels['kept']:,} of {channels['total']:,}, {share}"))
    return [*rows, ("time", _duration(result["seconds"]))]


def write(run: str | Path | Run) -> Path:
    """Write RUN/report.html, one page that needs no network, and give its path.

    The page appears whole or not at all. Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    page = run.folder / "report.html"
    draft = page.with_name(f".report.html.{os.getpid()}")
    try:
        draft.write_text(_page(run), encoding="utf-8")
        os.replace(draft, page)
    finally:
        draft.unlink(missing_ok=True)
    return page


def _page(run: Run) -> str:
    result, phases, curves, search = _result(run), _phases(run), _curves(run), _search(run)
    numbers = {"phases": phases, "curves": curves, "search": search}
    sections = [
        _curves_section(run, phases, curves, result),
        _search_section(search),
        _section("Channels kept", *_channels(run)),
        _section("Cost", _COST_NOTE, _cost_table(result)),
        _section("Time", _TIME_NOTE, _time_table(run, result)),
        _section("Recipe and environment", "", _recipe(run), _environment(run)),
    ]
    footer = f"Derived from metrics.jsonl and recipe.yaml: {len(run.records):,} records, up to {_date(run)}."
    template = files("dnal_dist").joinpath("report_template.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"{run.name}: run report"),
        name=escape(run.name),
        about=_text(_about(run)),
        result=_text(_headline(run, result)),
        notices=_notices(run, result),
        tiles=_tiles(run, result),
        sections="\n".join(sections),
        footer=_text(footer),
        # Without "<" no text of the run can end the script element that holds it.
        numbers=json.dumps(numbers, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


def _phases(run: Run) -> list[tuple[str, int, int]]:
    """Each phase that trained, with the iterations of the run at which it began (exclusive) and at which it stands."""
    steps: dict[str, list[dict]] = {}
    for record in run.of("train"):
        steps.setdefault(str(record.get("phase")), []).append(record)
    return [
        (phase, records[0]["global_step"] - records[0].get("step", 1), records[-1]["global_step"])
        for phase, records in steps.items()
    ]


def _thinned(series: tuple[list[float], list[float]], limit: int = 1500) -> tuple[list[float], list[float]]:
    """At most `limit` points, means of equal blocks: a long run's page stays light and no trend is hidden."""
    xs, ys = series
    block = math.ceil(len(xs) / limit) or 1
    starts = range(0, len(xs), block)
    return [mean(xs[i : i + block]) for i in starts], [mean(ys[i : i + block]) for i in starts]


def _curves(run: Run) -> dict:
    """Points [xs, ys] over the iterations of the run: {accuracy, cross_entropy: {train, held_out, prune}, loss}."""
    curves: dict = {
        key: {
            "train": _thinned(run.series("train", "global_step", key)),
            "held_out": run.series("eval", "global_step", key),
            "prune": run.series("eval", "global_step", key, "prune"),
        }
        for key in ("accuracy", "cross_entropy")
    }
    return curves | {"loss": _thinned(run.series("train", "global_step", "loss", "search"))}


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
    return {
        "edges": [epochs[0], *((a + b) / 2 for a, b in pairwise(epochs)), end],
        "epochs": epochs,
        "delta": [_number(r.get("delta", math.nan)) for r in records],
        "counts": [r["histogram"] for r in records],
        "threshold": prune.get("threshold", run.setting("architecture", "threshold")),
        "open": _thinned(opened),
        "macs": _thinned(expected),
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


def _table(name: str, label: str, head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = ""
    for first, *rest in rows:
        body += f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
    head_row = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return _scroll(label, f'<table class="{name}">{head_row}<tbody>{body}</tbody></table>')


def _date(run: Run) -> str:
    told = [r["time"] for r in run.records if "time" in r]
    return f"{datetime.fromtimestamp(told[-1], UTC):%Y-%m-%d %H:%M} UTC" if told else "an unknown time"


def _about(run: Run) -> str:
    start, model = run.last("start"), run.setting("model", "name")
    parts = [str(model)] if model else []
    if "train_samples" in start:
        parts.append(f"{start['train_samples']:,} training and {start.get('val_samples', 0):,} held-out pictures")
    if "world_size" in start:
        many = "1 process" if start["world_size"] == 1 else f"{start['world_size']} processes"
        parts.append(f"{many} on {start.get('device', 'an unnamed device')}")
    return ", ".join([*parts, _date(run)])


def _headline(run: Run, result: dict) -> str:
    phase, accuracy = next(reversed(result["accuracy"].items()), ("", None))
    if result["finished"] and accuracy is not None and "macs_ratio" in result:
        macs, params = _percent(result["macs_ratio"]), _percent(result["params_ratio"])
        kept = f"{macs} of the full network's multiply-adds and {params} of its parameters"
        return f"{_percent(accuracy, 2)} top-1 accuracy with {kept}."
    reached = "" if accuracy is None else f" Top-1 accuracy {_percent(accuracy, 2)} {_when(result, phase)}."
    return ("Finished." if result["finished"] else _where(run)) + reached


def _notices(run: Run, result: dict) -> str:
    notices = ""
    if result["collapsed"]:
        words = f"<strong>The architecture collapsed.</strong> {_text(_collapse(run))}"
        notices += f'<div class="alarm" role="alert"><p>{words}</p></div>'
    if messages := _counted(result["warnings"]):
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
        detail = f"full network: {_percent(before, 2)}" if compared else _when(result, phase)
        tiles.append(("Top-1 accuracy", _percent(accuracy, 2), detail))
    for key, words in (("macs", "Multiply-adds"), ("params", "Parameters")):
        if f"{key}_ratio" in result:
            full, compact, ratio = result["full"]["exact"][key], result["compact"]["exact"][key], result[f"{key}_ratio"]
            tiles.append((words, _percent(ratio), f"{_amount(compact, full)} of {_amount(full)}, {_fewer(ratio)}"))
        elif "full" in result:
            tiles.append((words, _amount(result["full"]["exact"][key]), "full network"))
    if channels := result.get("channels"):
        total, kept = channels["total"], channels.get("kept")
        known = (_percent(kept / max(total, 1)), f"{kept:,} of {total:,} kept") if kept is not None else None
        tiles.append(("Channels", *(known or (f"{total:,}", "with a gate"))))
    images = run.last("end").get("images")
    tiles.append(("Time", _duration(result["seconds"]), f"{images:,} training pictures" if images else "so far"))
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
        "full": "" if full is None else f"full network, {_amount(full)} multiply-adds",
        "compact": "" if compact is None else f"compact network, {_amount(compact, full)}",
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
        cells = [_percent(record[key], 2) if key in record else "" for key in ("accuracy", "top5")]
        cells += [f"{record[key]:{form}}" if key in record else "" for key, form in (("cross_entropy", ".4f"), ("samples", ","))]
        rows.append([_when(result, phase), NETWORKS.get(phase, ""), *cells])
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
    fate = '<span class="flag">rescued</span>' if rescued else _text(_percent(share, 0)) if left else "closed"
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
        rows.append(["compact / full", *(_percent(b / a, 2) if a and b is not None else "" for a, b in pairs)])
    head = ["network", "multiply-adds", "parameters", "multiply-adds (paper)", "parameters (paper)"]
    return _table("cost", "Cost of the full and of the compact network", head, rows)


def _time_table(run: Run, result: dict) -> str:
    rows = []
    for phase, seconds in result["phase_seconds"].items():
        last = run.last("train", phase)
        steps = f"{last.get('step', 0):,} of {last.get('phase_steps', 0):,}" if last else ""
        _, speeds = run.series("train", "step", "images_per_second", phase)
        _, waits = run.series("train", "step", "data_wait_seconds", phase)
        waiting = f"{_duration(sum(waits))}, {_percent(sum(waits) / seconds)}" if waits and seconds else ""
        rows.append([phase, _duration(seconds), steps, f"{median(speeds):,.0f}" if speeds else "", waiting])
    if rows:
        rows.append(["whole run", _duration(result["seconds"]), "", "", ""])
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


def main() -> None:
    """Command line: exit code 2 and one line on stderr if the folder holds no run or cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.report",
        description="Write RUN/report.html, a page that needs no network, and print the run's final table. "
        "Works while the run is still going, and on one that was stopped.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, for example runs/digits")
    args = parser.parse_args()
    # A name that the terminal's encoding lacks is no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    try:
        run = load(args.run)
        write(run)
        print_table(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
