"""Everything that is written and printed of a run, or of several."""

from collections.abc import Callable
from pathlib import Path

from dnal_dist.common import text
from dnal_dist.common.span import spanned
from dnal_dist.report import comparison, comparison_files, figures, markdown_report, page, published, records
from dnal_dist.report.records import Run, load


@spanned("report")
def write_all(run: str | Path | Run, draw: bool = True) -> None:
    """Write RUN/report.html, RUN/report.md and, to `draw`, RUN/plots/*.svg and *.png; each file appears whole or not at all.

    Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    page.write(run)
    result = records.result_of(run)
    markdown_report.write(run, result, figures.write(run, result) if draw else {})


def print_table(run: str | Path | Run, console=None) -> None:
    """Print the final table, on `console` (a rich Console) or stdout; plain and uncut where that is no terminal.

    Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    say = teller(console)
    result = records.result_of(run)
    rows = records.rows(result)
    width = max(len(label) for label, _ in rows)
    say((text.printable(run.name), "bold"))
    for label, value in rows:
        say(f"{label:<{width}}   ", (value, "bold"))
    if (run.folder / "report.html").exists():
        say(f"{'report':<{width}}   {run.folder / 'report.html'}")
    if place := published.place(run, result):
        _print_place(place, say)
    if not result["finished"]:
        say((records.where(run), "yellow"))
    for message in text.counted(result["warnings"]):
        say((f"WARNING: {text.printable(message)}", "yellow"))
    if result["collapsed"]:
        say((f"THE ARCHITECTURE COLLAPSED: {records.collapse(run)}", "bold red"))


def _print_place(place: published.Place, say: Callable) -> None:
    say(f"\namong the published rows of {place.table.title} (arXiv 2103.02126):")
    comparison_files.columns(*place.lines(), "this run", say)
    for remark in place.remarks:
        say(remark)


def compare(given: list[str], output: str | None = None, console=None) -> None:
    """Compare runs, print the table and write comparison.html, .md and .csv, pareto.svg and .png into `output`, by default the
    closest folder that all of them lie in.

    given: run folders, or folders of sweeps, whose runs lie within. Raises ValueError naming a folder that holds no run or what
    cannot be read, OSError if the files cannot be written.
    """
    found = comparison.compare(given)
    folder = Path(output) if output else found.parent
    comparison_files.write(found, folder)
    comparison_files.tell(found, folder, teller(console))


def teller(console=None) -> Callable:
    """What prints words, or (words, style), uncut; plain where stdout is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    return lambda *parts: console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)
