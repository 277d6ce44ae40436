"""The page and the table of a run, from its folder alone: no torch, no network, finished or not.

python -m dnal_dist.report RUN     write RUN/report.html and print the table
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dnal_dist import page, plots, published, report_md, results
from dnal_dist.page import write
from dnal_dist.results import Run, load, summary

__all__ = ["Run", "load", "print_table", "summary", "write", "write_all"]


def write_all(run: str | Path | Run) -> None:
    """Write RUN/report.html, RUN/report.md and RUN/plots/*.svg and *.png; each file appears whole or not at all.

    Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    page.write(run)
    result = results.result_of(run)
    report_md.write(run, result, plots.write(run, result))


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

    result = results.result_of(run)
    rows = results.rows(result)
    width = max(len(label) for label, _ in rows)
    say((results.printable(run.name), "bold"))
    for label, value in rows:
        say(f"{label:<{width}}   ", (value, "bold"))
    if (run.folder / "report.html").exists():
        say(f"{'report':<{width}}   {run.folder / 'report.html'}")
    if place := published.place(run, result):
        _print_place(place, say)
    if not result["finished"]:
        say((results.where(run), "yellow"))
    for message in results.counted(result["warnings"]):
        say((f"WARNING: {results.printable(message)}", "yellow"))
    if result["collapsed"]:
        say((f"THE ARCHITECTURE COLLAPSED: {results.collapse(run)}", "bold red"))


def _print_place(place: published.Place, say: Callable) -> None:
    head, rows, own = place.lines()
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    say(f"\namong the published rows of {place.table.title} (arXiv 2103.02126):")
    for number, (first, *rest) in enumerate([head, *rows], -1):
        cells = "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))])
        say((f"> {cells}", "bold") if number == own else f"  {cells}")
    for remark in place.remarks:
        say(remark)


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
        write_all(run)
        print_table(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
