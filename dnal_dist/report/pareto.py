"""Accuracy against cost as a figure: runs among published rows, and which of them no other dominates. No torch."""

from dataclasses import dataclass, field

from dnal_dist.common.text import amount
from dnal_dist.report import style
from dnal_dist.report.published import OWN, OWNS, Published, Row
from dnal_dist.report.style import Drawing, Values

KINDS = {"DNAL": "dnal", "Baseline": "baseline", OWN: "own", OWNS: "own"}
NAMES = {"others": "other methods", "dnal": "DNAL, by penalty weight", "baseline": "full network", "own": "these runs"}
# In points from the mark, with the part of the label that is put there.
_PLACES = (
    *((0, 5, "center", "bottom"), (0, -5, "center", "top"), (6, 0, "left", "center"), (-6, 0, "right", "center")),
    *((5, 3, "left", "bottom"), (-5, 3, "right", "bottom"), (5, -3, "left", "top"), (-5, -3, "right", "top")),
    *((0, 13, "center", "bottom"), (0, -13, "center", "top"), (12, 8, "left", "bottom"), (-12, 8, "right", "bottom")),
)


@dataclass(frozen=True)
class Point:
    """One mark: its kind (others, dnal, baseline or own), cost and top-1 accuracy in percent, with their standard deviations."""

    kind: str
    label: str
    cost: float
    accuracy: float
    cost_std: float = 0.0
    accuracy_std: float = 0.0
    comparable: bool = True
    series: str = ""
    """Runs of one series look alike."""


def of_row(row: Row, table: Published, comparable: bool = True) -> Point | None:
    """The mark of a row of a published table; None if the row lacks accuracy or cost."""
    size = table.size(row)
    if not row.top1 or not size:
        return None
    kind = KINDS.get(row.method, "others")
    # The legend names the full network and a run that is alone.
    label = "" if row.method == OWN or kind == "baseline" else row.method if kind == "others" else row.penalty_weight
    stds = {f"{mine}_std": float(row.stds.get(its, 0)) for mine, its in (("cost", table.axis), ("accuracy", "top1"))}
    return Point(kind, label, size, float(row.top1), **stds, comparable=comparable or kind != "own")


def of_table(rows: list[Row], table: Published, comparable: bool) -> list[Point]:
    """The marks of a published table with the rows of runs among it; `comparable`: whether these may be held against it."""
    return [point for row in rows if (point := of_row(row, table, comparable))]


def front(points: list[Point]) -> list[Point]:
    """Those that no other one dominates, which has at least the accuracy for at most the cost; cheapest first.

    Where a run is not comparable with the published rows, runs are judged among themselves, and the published rows not at all.
    """
    apart = not all(point.comparable for point in points)
    judged = [point for point in points if point.kind == "own" or not apart]
    best, found = float("-inf"), []
    for point in sorted(judged, key=lambda point: (point.cost, -point.accuracy)):
        if point.accuracy > best or (found and (point.cost, point.accuracy) == (found[-1].cost, found[-1].accuracy)):
            best = point.accuracy
            found.append(point)
    return found


@dataclass(frozen=True)
class Panel:
    """One diagram: what its horizontal axis counts, its marks (at least one), names {kind: in the legend}, a title, and what the
    legend adds to runs that are labelled by something."""

    size: str
    points: list[Point]
    names: dict[str, str] = field(default_factory=dict)
    title: str = ""
    by: str = ""


def figure(panels: list[Panel]) -> Drawing:
    """The diagrams, one below the other. Call it inside `style.drawing`."""
    drawing = style.figure(3.8 * len(panels))
    axes = [part.subplots() for part in drawing.figure.subfigures(len(panels), 1, squeeze=False)[:, 0]]
    for here, panel in zip(axes, panels, strict=True):
        _draw(drawing, here, panel)
    # Labels are placed beside marks, whose places the layout decides.
    style.settle(drawing.figure)
    for here, panel in zip(axes, panels, strict=True):
        _labels(here, sorted(panel.points, key=lambda point: list(_KINDS).index(point.kind)))
    return drawing


def _draw(drawing: Drawing, axes, panel: Panel) -> None:
    undominated, costs = front(panel.points), [point.cost for point in panel.points]
    if max(costs) / max(min(costs), 1e-12) > 3:
        axes.set_xscale("log")
    # Between equal ones there is nothing to draw.
    if len({(point.cost, point.accuracy) for point in undominated}) > 1:
        xs, ys = [point.cost for point in undominated], [point.accuracy for point in undominated]
        axes.plot(xs, ys, drawstyle="steps-post", color=style.RULE, linewidth=1.1, zorder=1, label="not dominated")
    looks, ranks = _looks(panel.points), list(_KINDS)
    for kind, series, comparable in sorted(looks, key=lambda look: -ranks.index(look[0])):
        mine = [point for point in panel.points if _look(point) == (kind, series, comparable)]
        name = f"{series}{panel.by}" if series else (NAMES | panel.names).get(kind, kind) + (panel.by if kind == "own" else "")
        label = name if comparable else f"{name}, not comparable"
        _marks(axes, mine, looks[kind, series, comparable], label, undominated)
        texts = [f"{point.label}{', ' * bool(point.label)}{point.accuracy:.2f} % at {_cost(point)}" for point in mine]
        xs, ys = [point.cost for point in mine], [point.accuracy for point in mine]
        drawing.values.append(Values(axes, label, xs, ys, texts, reach=(0.03, 0.05)))
    axes.margins(0.08, 0.1)
    axes.set_xlabel(panel.size)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(panel.title, fontsize=8.5, loc="left", fontweight="bold")
    if axes.get_xscale() == "log":
        style.plain_log(axes.xaxis)
    if max(costs) >= 1e4:
        style.amounts(axes.xaxis)
    style.legend(axes, above=True)


# Symbol, size in square points and colour; the series of runs by number. No two have one symbol.
_KINDS = {
    "own": ("D", 30, style.SECOND),
    "baseline": ("s", 26, style.MUTED),
    "dnal": ("o", 24, style.ACCENT),
    "others": ("o", 18, style.MUTED),
}
_SERIES = (_KINDS["own"], ("^", 36, "#00735c"), ("v", 36, "#7a3b9e"), ("P", 36, "#6b5900"), ("X", 36, "#a3261c"))
MOST_SERIES = len(_SERIES)


def _look(point: Point) -> tuple[str, str, bool]:
    return point.kind, point.series, point.comparable


def _looks(points: list[Point]) -> dict[tuple[str, str, bool], tuple[str, int, str]]:
    """{kind, series, comparable: its look}."""
    series = list(dict.fromkeys(point.series for point in points if point.kind == "own"))
    own = {name: _SERIES[number % MOST_SERIES] for number, name in enumerate(series)}
    return {_look(point): own[point.series] if point.kind == "own" else _KINDS[point.kind] for point in points}


def _marks(axes, points: list[Point], look: tuple[str, int, str], label: str, undominated: list[Point]) -> None:
    shape, area, colour = look
    for point in points:
        if point.cost_std or point.accuracy_std:
            # On a logarithmic axis a bar cannot reach zero.
            bars = {"xerr": [[min(point.cost_std, 0.99 * point.cost)], [point.cost_std]], "yerr": point.accuracy_std}
            axes.errorbar(point.cost, point.accuracy, **bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)
    rings = [style.INK if point in undominated and len(undominated) > 1 else colour for point in points]
    xs, ys = [point.cost for point in points], [point.accuracy for point in points]
    fill = colour if points[0].comparable else "white"
    axes.scatter(
        xs, ys, area, marker=shape, facecolors=fill, edgecolors=rings, linewidths=1, zorder=4, label=style.words(label, 60)
    )


def _cost(point: Point) -> str:
    return amount(point.cost) if point.cost >= 1e4 else f"{point.cost:g}"


def _labels(axes, points: list[Point]) -> None:
    """Name each mark at the first place that covers no mark and no other name; a name without room is left out."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    frame, reach, looks = axes.get_window_extent(), 3 * axes.figure.dpi / 72, _looks(points)
    marks = axes.transData.transform([(point.cost, point.accuracy) for point in points])
    taken = [Bbox([(x - reach, y - reach), (x + reach, y + reach)]) for x, y in marks]
    for point in points:
        if not point.label:
            continue
        text = axes.annotate(
            style.words(point.label, 32), (point.cost, point.accuracy), (0, 0), textcoords="offset points",
            color=looks[_look(point)][2], fontsize=7, zorder=5, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        for across, up, horizontal, vertical in _PLACES:
            text.set(position=(across, up), ha=horizontal, va=vertical)
            box = text.get_window_extent()
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()


def unit(table: Published) -> str:
    """What the horizontal axis of a published table counts."""
    words = {"flops": "FLOPs, the paper's rule", "params": "parameters, the paper's rule"}[table.axis]
    return f"{words} ({table.columns[table.axis]})"
