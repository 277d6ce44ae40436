"""The figures of a run, drawn once: for its page, and as RUN/plots/*.svg and *.png."""

import math
from collections.abc import Iterable
from itertools import pairwise
from statistics import mean

from dnal_dist.common import text
from dnal_dist.common.errors import InputError
from dnal_dist.report import pareto, published, records, style
from dnal_dist.report.records import Run, thinned
from dnal_dist.report.style import Drawing, Values
from dnal_dist.report.words import when

TITLES = {
    "curves": "Accuracy and loss over the iterations",
    "search": "The gates and the expected cost over the search",
    "channels": "Channels kept in each layer",
    "classes": "Accuracy and images of each class",
    "cost": "Accuracy against cost",
}


def draw(run: Run, result: dict, names: Iterable[str] = TITLES) -> dict[str, Drawing]:
    """Those of the figures that the run has records for. Call it inside `style.drawing`."""
    drawers = {"curves": curves, "search": search, "channels": channels, "classes": classes, "cost": lambda run: cost(run, result)}
    return {name: drawing for name in names if (drawing := drawers[name](run)) is not None}


def write(run: Run, drawings: dict[str, Drawing]) -> None:
    """Write RUN/plots, and remove figures of an earlier report that have no records now. Raises OSError, InputError for a link."""
    folder = run.folder / "plots"
    if folder.is_symlink():
        raise InputError(f"{folder}: a link to elsewhere, where nothing is written; remove it")
    folder.mkdir(exist_ok=True)
    for name in TITLES:
        if name in drawings:
            style.save(drawings[name], folder / name)
        else:
            for suffix in (".svg", ".png"):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)


def curves(run: Run) -> Drawing | None:
    """Accuracy and cross-entropy of training batches and of validation images; None before the first iteration."""
    spans = records.spans(run)
    if not spans:
        return None
    drawing = style.figure(4.4)
    upper, lower = drawing.figure.subplots(2, 1, sharex=True)
    for axes, key, scale, form in ((upper, "accuracy", 100, "{:.2f} %"), (lower, "cross_entropy", 1, "{:.4f}")):
        _bands(axes, spans, named=axes is upper)
        form = {"scale": scale, "form": form}
        _curve(drawing, axes, thinned(run.series("train", "global_step", key)), "training batches", style.FAINT, 1, **form)
        held_out = [r for r in run.of("eval", has=("global_step", key)) if r.get("phase") != "prune"]
        points = [r["global_step"] for r in held_out], [r[key] for r in held_out]
        dots = {"marker": "o", "markersize": 2.5} if len(points[0]) < 100 else {}
        _curve(drawing, axes, points, "held-out images", style.ACCENT, 1.4, **form, **dots)
        pruned = run.series("eval", "global_step", key, "prune")
        _curve(drawing, axes, pruned, "after pruning", style.SECOND, 1, **form, **_DIAMOND)
    penalised = thinned(run.series("train", "global_step", "loss", "search"))
    _curve(drawing, lower, penalised, "training loss with the penalty", style.SECOND, 1.1, form="{:.4f}", linestyle=":")
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
    return drawing


_DIAMOND = {"marker": "D", "markersize": 5, "linestyle": "none", "zorder": 4}


def _curve(drawing, axes, points, label: str, colour: str, width: float, **how) -> None:
    """A line, and its values for the page. points: ([xs], [ys]); how: scale, form (writes a value) and at (writes an x), else
    matplotlib's."""
    scale, form, at = (how.pop(key, default) for key, default in (("scale", 1), ("form", "{}"), ("at", "iteration {:,.0f}")))
    xs, ys = points
    if xs:
        ys = [scale * y for y in ys]
        axes.plot(xs, ys, color=colour, linewidth=width, label=label, **how)
        write = form if callable(form) else form.format
        drawing.values.append(Values(axes, label, xs, ys, [f"{at.format(x)}: {write(y)}" for x, y in zip(xs, ys, strict=True)]))


def _bands(axes, spans: list[tuple[str, int, int]], named: bool) -> None:
    """Shade the phases, and name them above where there is room."""
    end = max(last for _, _, last in spans)
    for number, (phase, first, last) in enumerate(spans):
        axes.axvspan(first, last, color=style.BANDS[number % 2], linewidth=0, zorder=0)
        if named and 75 * (last - first) > end * len(phase):
            where = {"xytext": (0, 4), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
            axes.annotate(style.words(phase), ((first + last) / 2, 1), ha="center", color=style.MUTED, **where)


def search(run: Run) -> Drawing | None:
    """Histogram of the gates, fraction of open gates and expected MACs over the epochs of the search; None before it."""
    found = sorted((r for r in run.of("gates", has=("epoch", "histogram")) if sum(r["histogram"]) > 0), key=lambda r: r["epoch"])
    # One column for each epoch, and as many bins throughout.
    found = list({r["epoch"]: r for r in found if len(r["histogram"]) == len(found[-1]["histogram"])}.values())
    if not found:
        return None
    found = found[:: math.ceil(len(found) / 240)]
    opened, expected = (thinned(run.series("train", "epoch", key, "search")) for key in ("open_share", "expected_macs"))
    epochs = [r["epoch"] for r in found]
    end = max([epochs[-1], *expected[0], *opened[0]]) if len(epochs) > 1 else epochs[0] + 1
    drawing = style.figure(5.2)
    upper, middle, lower = drawing.figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.3, 1.7))
    _gates(drawing, (upper, middle, lower), found, end)
    _threshold(upper, run)
    _hardness(upper, found)
    how = {"scale": 100, "form": "{:.1f} %", "at": "epoch {:.4g}"}
    _curve(drawing, middle, opened, "open gates", style.ACCENT, 1.4, **how)
    middle.set_ylim(0)
    middle.set_ylabel("open gates\n(%)")
    _expected(drawing, lower, run, expected, end)
    lower.set_xlim(epochs[0], end)
    lower.set_xlabel("epoch of the search")
    return drawing


def _gates(drawing: Drawing, panels: tuple, found: list[dict], end: float) -> None:
    """The heat map: a column for each record, which reaches halfway to its neighbours, since it is the gates at one moment."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    upper, epochs, bins = panels[0], [r["epoch"] for r in found], len(found[0]["histogram"])
    edges = [epochs[0], *((a + b) / 2 for a, b in pairwise(epochs)), end]
    counts = [[r["histogram"][i] or math.nan for r in found] for i in range(bins)]
    shades, most = LinearSegmentedColormap.from_list("gates", style.HEAT), max(10, *(c for r in found for c in r["histogram"]))
    # The colour is a logarithm, so that a single gate still shows beside thousands.
    mesh = upper.pcolormesh(edges, [i / bins for i in range(bins + 1)], counts, cmap=shades, norm=LogNorm(1, most), linewidth=0)
    bar = drawing.figure.colorbar(mesh, ax=panels, aspect=40, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label("gates with this value")
    style.amounts(bar.ax.yaxis)
    upper.set_ylabel("gate")
    upper.grid(False)
    cells = [(n, i, count) for n, record in enumerate(found) for i, count in enumerate(record["histogram"]) if count]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    texts = [f"epoch {epochs[n]:.4g}, {_delta(found[n])}gates near {(i + 0.5) / bins:.3f}: {count:,}" for n, i, count in cells]
    xs, ys = [middles[n] for n, _, _ in cells], [(i + 0.5) / bins for _, i, _ in cells]
    drawing.values.append(Values(upper, "gates", xs, ys, texts, (0.75 / len(found), 0.5 / bins)))


def _delta(record: dict) -> str:
    return f"delta {text.number(record['delta'])}, " if "delta" in record else ""


def _threshold(axes, run: Run) -> None:
    # With a target, rank and cost decide, not a gate's value.
    driven = run.setting("architecture", "target") is not None
    value = None if driven else run.last("prune").get("threshold", run.setting("architecture", "threshold"))
    if isinstance(value, int | float):
        axes.axhline(value, color=style.SECOND, linestyle=":", linewidth=1.2)
        where = {"xytext": (-3, -3), "textcoords": "offset points", "xycoords": ("axes fraction", "data")}
        axes.annotate(f"threshold {value:g}", (1, value), ha="right", va="top", color=style.SECOND, **where)


def _hardness(axes, found: list[dict]) -> None:
    """The hardness delta on an axis above."""
    ticks = [r for r in found if "delta" in r]
    ticks = ticks[:: math.ceil(len(ticks) / 6) or 1]
    if ticks:
        above = axes.secondary_xaxis("top")
        above.set_xticks([r["epoch"] for r in ticks], [text.number(r["delta"]) for r in ticks])
        above.set_xlabel("hardness delta")
        above.spines["top"].set_visible(False)


def _expected(drawing: Drawing, axes, run: Run, expected: tuple[list[float], list[float]], end: float) -> None:
    prune = run.last("prune")
    full, compact = prune.get("full") or run.last("start").get("full"), prune.get("compact")
    full, compact = (one["exact"]["macs"] if one else None for one in (full, compact))
    how = {"form": text.amount, "at": "epoch {:.4g}"}
    _curve(drawing, axes, expected, "expected", style.ACCENT, 1.4, **how)
    if full:
        axes.axhline(full, color=style.MUTED, linestyle=":", linewidth=1.2, label=f"full network, {text.amount(full)}")
    if compact is not None:
        label = f"compact network, {text.amount(compact, full)}"
        _curve(drawing, axes, ([end], [compact]), label, style.SECOND, 1, **how, **_DIAMOND, clip_on=False)
    axes.set_ylim(0)
    axes.set_ylabel("MACs\nfor one image")
    style.amounts(axes.yaxis)
    style.legend(axes)


def channels(run: Run) -> Drawing | None:
    """A bar for each layer that has gates, filled as far as its channels stay; None before any record of them."""
    sites, kept = records.channels(run)
    if not kept:
        return None
    names, places = list(sites), range(len(sites))
    named = len(sites) <= 60
    labels = [style.words(name) if named else "" for name in names]
    drawing = style.figure(2.6 + 0.04 * max(map(len, labels)))
    axes = drawing.figure.subplots()
    width = 0.8 if named else 1
    axes.bar(places, list(sites.values()), width, color=style.BAR, label="full network")
    label = "kept" if run.last("prune") else "gates above the threshold so far"
    axes.bar(places, list(kept.values()), width, color=style.ACCENT, label=label)
    closed = [i for i in places if not kept[names[i]]]
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
    return drawing


def classes(run: Run) -> Drawing | None:
    """Top-1 accuracy of each class, and how many images it has; None without an evaluation that counted them."""
    found = records.by_class(run)
    if not found:
        return None
    drawing, numbers = style.figure(3.2), list(range(len(found)))
    upper, lower = drawing.figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    shares, counts = [100 * right / max(seen, 1) for right, seen in found], [seen for _, seen in found]
    balanced = mean([share for share, seen in zip(shares, counts, strict=True) if seen] or [0])
    upper.bar(numbers, shares, 0.8, color=style.ACCENT)
    upper.axhline(balanced, color=style.SECOND, linestyle=":", linewidth=1.2, label=f"mean over classes, {balanced:.2f} %")
    lower.bar(numbers, counts, 0.8, color=style.BAR)
    texts = [f"class {number}: {share:.2f} % of {seen:,}" for number, share, seen in zip(numbers, shares, counts, strict=True)]
    drawing.values.append(Values(upper, "classes", numbers, shares, texts))
    upper.set_ylim(0, 100)
    upper.set_ylabel("top-1 accuracy (%)")
    lower.set_ylabel("images")
    lower.set_xlabel("class")
    style.legend(upper, above=True)
    return drawing


def cost(run: Run, result: dict) -> Drawing | None:
    """Accuracy against cost: among the published rows where there are any, else of the full and the compact network."""
    place = published.place(run, result)
    points = pareto.of_table(place.rows, place.table, not place.differences) if place else _own_points(result)
    if not place and not any(point.kind == "own" for point in points):
        return None
    size = pareto.unit(place.table) if place else "MACs for one image"
    return pareto.figure([pareto.Panel(size, points, {"own": style.words(run.name)})])


def _own_points(result: dict) -> list[pareto.Point]:
    accuracy, points = result["accuracy"], []
    for which, phase, kind in (("full", "pretrain", "baseline"), ("compact", "prune", "own"), ("compact", "finetune", "own")):
        macs = result.get(which, {}).get("exact", {}).get("macs")
        if macs and phase in accuracy:
            label = "" if kind == "baseline" else when(result, phase)
            points.append(pareto.Point(kind, label, macs, 100 * accuracy[phase]))
    return points
