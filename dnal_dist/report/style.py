"""What all figures of runs have in common: size, letters, colours, files. matplotlib, slow to load, comes with the first one."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

from dnal_dist.common import atomic
from dnal_dist.common.text import amount, printable

WIDTH = 6.4
"""Inches: the text width of a paper in one column."""

# Blue and orange keep apart for colour-blind readers, dark and light in print.
INK, MUTED, RULE, GRID = "#1b212b", "#5a6372", "#b9c0ca", "#e9ecf0"
ACCENT, SECOND, FAINT, BANDS = "#1f5fbf", "#b8500f", "#9db8de", ("#f4f5f7", "#e9effa")
BAR = "#cddcf2"
HEAT = ("#e4edf9", "#a9c6ec", "#5a90d6", "#1f5fbf", "#0a2c66")

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


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Within it matplotlib draws as this module says, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name may have letters that the font lacks.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(height: float):
    """An empty Figure of the text's width and `height` inches. Call it and draw within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure, stem: Path) -> None:
    """Write STEM.svg and STEM.png, each whole or not at all; equal figures give equal files. Raises OSError."""
    # The layout is slow, and the same for both.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], metadata=metadata)
        atomic.put(stem.with_name(stem.name + suffix), content.getvalue())


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
