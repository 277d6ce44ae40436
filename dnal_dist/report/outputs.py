"""The files and tables of a run, or of several."""

from collections.abc import Callable
from pathlib import Path

from dnal_dist.common import atomic, text
from dnal_dist.common.console import printer
from dnal_dist.common.span import spanned
from dnal_dist.report import comparison, comparison_files, figures, page, published, records, style, words
from dnal_dist.report.records import Run, load

ON_PAGE = ("curves", "search", "classes", "cost")


@spanned("report")
def write_all(run: str | Path | Run, draw: bool = True) -> None:
    """Write RUN/report.html, RUN/report.md and, to `draw`, RUN/plots/*.svg and *.png; each file appears whole or not at all.

    Raises InputError as `load` does and for a RUN/plots that is a link, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    result = records.result_of(run)
    with style.drawing():
        drawings = figures.draw(run, result, figures.TITLES if draw else ON_PAGE)
        embedded = {name: style.embed(drawings[name]) for name in ON_PAGE if name in drawings}
        atomic.put(run.folder / "report.html", page.html(run, result, embedded).encode(errors="replace"))
        atomic.put(run.folder / "report.md", page.markdown(run, result, list(drawings) if draw else []).encode(errors="replace"))
        if draw:
            figures.write(run, drawings)


def print_table(run: str | Path | Run, console=None) -> None:
    """Print the final table, on `console` (a rich Console) or stdout; plain and uncut where that is no terminal.

    Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    say = printer(console)
    result = records.result_of(run)
    place = published.place(run, result)
    rows = words.rows(result, place is not None)
    width = max(len(label) for label, _ in rows)
    say((text.printable(run.name), "bold"))
    for label, value in rows:
        say(f"{label:<{width}}   ", (value, "bold"))
    if (run.folder / "report.html").exists():
        say(f"{'report':<{width}}   {run.folder / 'report.html'}")
    if place:
        _print_place(place, say)
    if not result["finished"]:
        say((words.where(run), "yellow"))
    for message in text.counted(result["warnings"]):
        say((f"WARNING: {text.printable(message)}", "yellow"))
    if result["collapsed"]:
        say((f"THE ARCHITECTURE COLLAPSED: {words.collapse(run)}", "bold red"))


def _print_place(place: published.Place, say: Callable) -> None:
    say(f"\namong the published rows of {place.table.title} (arXiv 2103.02126):")
    comparison_files.columns(place.lines(), "this run", say)
    for remark in place.remarks:
        say(remark)


def compare(given: list[str | Path], output: str | Path | None = None, console=None) -> None:
    """Compare runs, print the table and write comparison.html, .md and .csv, pareto.svg and .png into `output`, by default the
    closest folder that all of them lie in.

    given: run folders, or sweeps' folders, which hold runs. Raises ValueError naming a folder that holds no run or a file that
    cannot be read, OSError if the files cannot be written.
    """
    found = comparison.compare(given)
    folder = Path(output) if output else found.parent
    comparison_files.write(found, folder)
    comparison_files.show(found, folder, printer(console))
