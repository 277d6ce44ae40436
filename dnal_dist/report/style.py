"""Size, fonts, colours and files of all figures. matplotlib is slow to import, so only functions that draw import it."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dnal_dist.common import atomic
from dnal_dist.common.text import amount, printable

WIDTH = 6.4
"""Inches: the text width of a paper in one column."""

# Blue and orange keep apart for colour-blind readers, dark and light in print.
INK, MUTED, RULE, GRID = "#1b212b", "#5a6372", "#b9c0ca", "#e9ecf0"
ACCENT, SECOND, FAINT, BANDS = "#1f5fbf", "#b8500f", "#9db8de", ("#f4f5f7", "#e9effa")
BAR = "#cddcf2"
HEAT = ("#e4edf9", "#a9c6ec", "#5a90d6", "#1f5fbf", "#0a2c66")

# The page's variable for each colour, so that figures follow its light and dark scheme.
_VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "wire", GRID: "grid", ACCENT: "accent", SECOND: "second", FAINT: "faint",
    BANDS[0]: "band-even", BANDS[1]: "band-odd", "#ffffff": "ground",
}  # fmt: skip

STYLE = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "savefig.dpi": 200,
    "svg.hashsalt": "dnal_dist",
    # Names of runs are words, not formulas.
    "text.parse_math": False,
}


class Values(NamedTuple):
    """Values that a page shows at the pointer: points in the coordinates of `axes`, and a text for each.

    reach: how far from a point it is shown, as fractions of the panel's width and height; None: the nearest one across.
    """

    axes: Any
    name: str
    xs: list[float]
    ys: list[float]
    texts: list[str]
    reach: tuple[float, float] | None = None


@dataclass
class Drawing:
    """A matplotlib Figure and its values for the page."""

    figure: Any
    values: list[Values] = field(default_factory=list)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Inside this context matplotlib has this module's style, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name may have letters that the font lacks.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(height: float) -> Drawing:
    """An empty figure of the text's width and `height` inches. Call it and draw inside `drawing`."""
    from matplotlib.figure import Figure

    return Drawing(Figure(figsize=(WIDTH, height), layout="constrained"))


def settle(figure) -> None:
    """Lay the figure out, once for all its forms: that takes the most time."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")


def save(drawing: Drawing, stem: Path) -> None:
    """Write STEM.svg and STEM.png, each whole or not at all; equal figures give equal files. Raises OSError."""
    settle(drawing.figure)
    for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
        atomic.put(stem.with_name(stem.name + suffix), _printed(drawing.figure, suffix[1:], metadata))


def _printed(figure, form: str, metadata: dict | None = None) -> bytes:
    """The settled figure as svg or png. Figure.savefig draws twice, first for a layout."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    content, dpi = io.BytesIO(), figure.dpi
    try:
        figure.dpi = matplotlib.rcParams["savefig.dpi"]
        if form == "svg":
            FigureCanvasSVG(figure).print_svg(content, metadata=metadata)
        else:
            FigureCanvasAgg(figure).print_png(content, metadata=metadata)
    finally:
        figure.dpi = dpi
    return content.getvalue()


def embed(drawing: Drawing) -> dict:
    """The figure for a page: {svg: the element as text, panels: its values in the SVG's coordinates}."""
    import matplotlib
    from matplotlib.collections import QuadMesh

    settle(drawing.figure)
    # A heat map has thousands of cells: as an image it stays small.
    meshes = drawing.figure.findobj(QuadMesh)
    for mesh in meshes:
        mesh.set_rasterized(True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        content = _printed(drawing.figure, "svg").decode()
    for mesh in meshes:
        mesh.set_rasterized(False)
    # What a document of its own needs, and a part of a page must not have.
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", content, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: _variable(found[0]), svg)
    width, height = (72 * inches for inches in drawing.figure.get_size_inches())
    # Zooming changes the part that is seen, not the size.
    svg = svg.replace("<svg", f'<svg style="aspect-ratio: {width:g} / {height:g}"', 1)
    return {"svg": svg, "panels": _panels(drawing, height)}


def _variable(colour: str) -> str:
    return f"var(--{_VARIABLES[colour]})" if colour in _VARIABLES else colour


def _panels(drawing: Drawing, height: float) -> list[dict]:
    panels: dict = {}
    points = 72 / drawing.figure.dpi
    for axes, name, xs, ys, texts, reach in drawing.values:
        frame = axes.get_window_extent()
        box = (frame.x0 * points, height - frame.y1 * points, frame.x1 * points, height - frame.y0 * points)
        panel = panels.setdefault(axes, {"box": [round(edge, 1) for edge in box], "reach": reach, "series": []})
        pixels = axes.transData.transform(list(zip(xs, ys, strict=True)))
        across, down = [round(x * points, 1) for x in pixels[:, 0]], [round(height - y * points, 1) for y in pixels[:, 1]]
        panel["series"].append({"name": name, "x": across, "y": down, "text": texts})
    return list(panels.values())


def words(text: object, most: int = 40) -> str:
    """Text that comes from a run: printable, and cut where it is long."""
    text = printable(str(text))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def amounts(axis) -> None:
    """Ticks such as 250 M in place of 2.5e8."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value) if value > 0 else "0"))
    axis.set_minor_formatter(NullFormatter())


def plain_log(axis) -> None:
    """Ticks 0.1, 0.2, 0.5, 1, ... as far as there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    digits = (1,) if decades > 2.2 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def legend(axes, above: bool = False) -> None:
    """Each label once, in one row or two: between panels, right above `axes`, or `above` the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if not once:
        return
    # About as many letters as fit in a row, a sample being as wide as six.
    rows = 1 if sum(len(label) + 6 for label in once) < 106 else 2
    how = {"ncols": math.ceil(len(once) / rows), "columnspacing": 1.4, "borderaxespad": 0}
    if above:
        axes.figure.legend(once.values(), once.keys(), loc="outside upper left", **how)
    else:
        axes.legend(once.values(), once.keys(), loc="lower left", bbox_to_anchor=(0, 1.02), **how)
