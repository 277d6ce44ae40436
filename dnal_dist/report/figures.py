"""The figures of one run, RUN/plots/*.svg and *.png, from its folder alone. No torch."""

import math
from itertools import pairwise

from dnal_dist.common import text
from dnal_dist.report import pareto, published, style
from dnal_dist.report import records as report_records
from dnal_dist.report.records import Run, thinned, when

TITLES = {
    "curves": "Accuracy and loss over the iterations",
    "search": "The gates and the expected cost over the search",
    "channels": "Channels kept in each layer",
    "cost": "Accuracy against cost",
}


def write(run: Run, result: dict) -> dict[str, str]:
    """Draw what the run has records for: {name of the figure: its title}. Raises OSError if RUN/plots cannot be written.

    A figure of an earlier report that has no records now is removed.
    """
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    drawn = {}
    with style.drawing():
        for name, draw in (("curves", curves), ("search", search), ("channels", channels), ("cost", cost)):
            figure = draw(run, result)
            if figure is None:
                for suffix in (".svg", ".png"):
                    (folder / f"{name}{suffix}").unlink(missing_ok=True)
            else:
                style.save(figure, folder / name)
                drawn[name] = TITLES[name]
    return drawn


def curves(run: Run, result: dict):
    """Accuracy and cross-entropy of training batches and of held-out images; None before the first iteration."""
    spans = report_records.spans(run)
    if not spans:
        return None
    figure = style.figure(4.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, scale in ((upper, "accuracy", 100), (lower, "cross_entropy", 1)):
        _bands(axes, spans, named=axes is upper)
        _curve(axes, thinned(run.series("train", "global_step", key)), scale, "training batches", style.FAINT, 1)
        held_out = [r for r in run.of("eval") if r.get("phase") != "prune"]
        points = Run(run.folder, {}, "", held_out).series("eval", "global_step", key)
        dots = {"marker": "o", "markersize": 2.5} if len(points[0]) < 100 else {}
        _curve(axes, points, scale, "held-out images", style.ACCENT, 1.4, **dots)
        mark = {"marker": "D", "markersize": 5, "linestyle": "none", "zorder": 4}
        _curve(axes, run.series("eval", "global_step", key, "prune"), scale, "after pruning", style.SECOND, 1, **mark)
    penalised = thinned(run.series("train", "global_step", "loss", "search"))
    _curve(lower, penalised, 1, "training loss with the penalty", style.SECOND, 1.1, linestyle=":")
    losses = [y for line in lower.get_lines() for y in line.get_ydata() if y > 0]
    if losses and max(losses) / min(losses) > 30:
        lower.set_yscale("log")
        style.plain_log(lower.yaxis)
    upper.set_ylabel("top-1 accuracy (%)")
    lower.set_ylabel("cross-entropy (nats)")
    lower.set_xlabel("iteration")
    lower.xaxis.set_major_formatter("{x:,.0f}")
    lower.set_xlim(0, max(last for _, _, last in spans))
    style.legend(lower, above=True)
    return figure


def _curve(axes, points: tuple[list[float], list[float]], scale: float, label: str, colour: str, width: float, **how) -> None:
    xs, ys = points
    if xs:
        axes.plot(xs, [scale * y for y in ys], color=colour, linewidth=width, label=label, **how)


def _bands(axes, spans: list[tuple[str, int, int]], named: bool) -> None:
    """Shade the phases, and name them above where there is room."""
    end = max(last for _, _, last in spans)
    for number, (phase, first, last) in enumerate(spans):
        axes.axvspan(first, last, color=style.BANDS[number % 2], linewidth=0, zorder=0)
        if named and 75 * (last - first) > end * len(phase):
            where = {"xytext": (0, 4), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
            axes.annotate(style.words(phase), ((first + last) / 2, 1), ha="center", color=style.MUTED, **where)


def search(run: Run, result: dict):
    """Histogram of the gates over the epochs of the search, and expected MACs below; None before the search."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    records = [r for r in run.of("gates") if "epoch" in r and sum(r.get("histogram", [])) > 0]
    records = list({r["epoch"]: r for r in records if len(r["histogram"]) == len(records[-1]["histogram"])}.values())
    if not records:
        return None
    records = records[:: math.ceil(len(records) / 240)]
    epochs, expected = [r["epoch"] for r in records], thinned(run.series("train", "epoch", "expected_macs", "search"))
    # Each column reaches halfway to its neighbours: a record is the gates at one moment.
    end = max(epochs[-1], *expected[0]) if len(epochs) > 1 else epochs[0] + 1
    edges = [epochs[0], *((a + b) / 2 for a, b in pairwise(epochs)), end]
    bins = len(records[0]["histogram"])
    figure = style.figure(4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    counts = [[r["histogram"][i] or math.nan for r in records] for i in range(bins)]
    shades, most = LinearSegmentedColormap.from_list("gates", style.HEAT), max(10, *(c for r in records for c in r["histogram"]))
    mesh = upper.pcolormesh(edges, [i / bins for i in range(bins + 1)], counts, cmap=shades, norm=LogNorm(1, most), linewidth=0)
    bar = figure.colorbar(mesh, ax=[upper, lower], aspect=40, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label("gates with this value")
    style.amounts(bar.ax.yaxis)
    upper.set_ylabel("gate")
    upper.grid(False)
    _threshold(upper, run)
    _hardness(upper, records)
    _expected(lower, run, expected, end)
    lower.set_xlim(epochs[0], end)
    lower.set_xlabel("epoch of the search")
    return figure


def _threshold(axes, run: Run) -> None:
    # After a budget it is not the gates' own height that decides.
    driven = run.setting("architecture", "target") is not None
    value = None if driven else run.last("prune").get("threshold", run.setting("architecture", "threshold"))
    if isinstance(value, int | float):
        axes.axhline(value, color=style.SECOND, linestyle=":", linewidth=1.2)
        where = {"xytext": (-3, -3), "textcoords": "offset points", "xycoords": ("axes fraction", "data")}
        axes.annotate(f"threshold {value:g}", (1, value), ha="right", va="top", color=style.SECOND, **where)


def _hardness(axes, records: list[dict]) -> None:
    """The hardness delta on an axis above."""
    told = [r for r in records if isinstance(r.get("delta"), int | float)]
    told = told[:: math.ceil(len(told) / 6) or 1]
    if told:
        above = axes.secondary_xaxis("top")
        above.set_xticks([r["epoch"] for r in told], [text.number(r["delta"]) for r in told])
        above.set_xlabel("hardness delta")
        above.spines["top"].set_visible(False)


def _expected(axes, run: Run, expected: tuple[list[float], list[float]], end: float) -> None:
    prune = run.last("prune")
    full = (prune.get("full") or run.last("start").get("full") or {}).get("exact", {}).get("macs")
    compact = prune.get("compact", {}).get("exact", {}).get("macs")
    _curve(axes, expected, 1, "expected", style.ACCENT, 1.4)
    if full:
        axes.axhline(full, color=style.MUTED, linestyle=":", linewidth=1.2, label=f"full network, {text.amount(full)}")
    if compact is not None:
        mark = {"marker": "D", "markersize": 5, "linestyle": "none", "clip_on": False, "zorder": 4}
        _curve(axes, ([end], [compact]), 1, f"compact network, {text.amount(compact, full)}", style.SECOND, 1, **mark)
    axes.set_ylim(0)
    axes.set_ylabel("MACs\nfor one image")
    style.amounts(axes.yaxis)
    style.legend(axes)


def channels(run: Run, result: dict):
    """A bar for each layer that has gates, filled as far as its channels stay; None while none is known to."""
    sites, prune = run.last("start").get("sites") or {}, run.last("prune")
    kept = prune.get("kept") or run.last("gates").get("open")
    if not sites or not kept:
        return None
    names, places = list(sites), range(len(sites))
    named = len(sites) <= 60
    labels = [style.words(name) if named else "" for name in names]
    figure = style.figure(2.6 + 0.04 * max(map(len, labels)))
    axes = figure.subplots()
    width = 0.8 if named else 1
    axes.bar(places, list(sites.values()), width, color=style.BAR, label="full network")
    label = "kept" if prune else "gates above the threshold so far"
    axes.bar(places, [kept.get(site, 0) for site in sites], width, color=style.ACCENT, label=label)
    closed = [i for i in places if not kept.get(names[i])]
    if closed:
        none = {"marker": "x", "markersize": 3, "linestyle": "none", "color": style.SECOND, "clip_on": False, "zorder": 4}
        axes.plot(closed, [0] * len(closed), label="closed as a whole", **none)
    if named:
        axes.set_xticks(places, labels, rotation=90, fontsize=min(8, 300 / len(sites)))
        axes.set_xlabel("layer")
    else:
        axes.set_xlabel(f"layer, of {len(sites)}, in the order of the network")
    axes.set_xlim(-0.7, len(sites) - 0.3)
    axes.set_ylabel("channels")
    axes.grid(axis="x", visible=False)
    style.legend(axes, above=True)
    return figure


def cost(run: Run, result: dict):
    """Accuracy against cost: among the published rows where there are any, else of the full and the compact network."""
    place = published.place(run, result)
    points = pareto.of_table(place.rows, place.table, not place.differences) if place and place.own else _own_points(result)
    if not any(point.kind == "own" for point in points):
        return None
    size = pareto.unit(place.table) if place and place.own else "MACs for one image"
    return pareto.figure([pareto.Panel(size, points, {"own": style.words(run.name)})])


def _own_points(result: dict) -> list[pareto.Point]:
    found, points = result["accuracy"], []
    for which, phase, kind in (("full", "pretrain", "baseline"), ("compact", "prune", "own"), ("compact", "finetune", "own")):
        macs = result.get(which, {}).get("exact", {}).get("macs")
        if macs and phase in found:
            label = "" if kind == "baseline" else when(result, phase)
            points.append(pareto.Point(kind, label, macs, 100 * found[phase]))
    return points
