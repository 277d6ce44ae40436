"""What runs came to, from their folders alone: no torch, no network, finished or not.

python -m dnal_dist.report RUN            write RUN/report.html, RUN/report.md and RUN/plots/, and print the table
python -m dnal_dist.report RUN RUN ...    compare runs, or those of a sweep's folder
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dnal_dist import comparison, comparison_files, page, plots, published, report_md, results
from dnal_dist.common import text
from dnal_dist.page import write
from dnal_dist.results import Run, load, summary

__all__ = ["Run", "compare", "load", "print_table", "summary", "write", "write_all"]


def write_all(run: str | Path | Run, draw: bool = True) -> None:
    """Write RUN/report.html, RUN/report.md and, to `draw`, RUN/plots/*.svg and *.png; each file appears whole or not at all.

    Raises ValueError as `load` does, OSError if the folder cannot be written.
    """
    run = run if isinstance(run, Run) else load(run)
    page.write(run)
    result = results.result_of(run)
    report_md.write(run, result, plots.write(run, result) if draw else {})


def print_table(run: str | Path | Run, console=None) -> None:
    """Print the final table, on `console` (a rich Console) or stdout; plain and uncut where that is no terminal.

    Raises ValueError as `load` does.
    """
    run = run if isinstance(run, Run) else load(run)
    say = teller(console)
    result = results.result_of(run)
    rows = results.rows(result)
    width = max(len(label) for label, _ in rows)
    say((text.printable(run.name), "bold"))
    for label, value in rows:
        say(f"{label:<{width}}   ", (value, "bold"))
    if (run.folder / "report.html").exists():
        say(f"{'report':<{width}}   {run.folder / 'report.html'}")
    if place := published.place(run, result):
        _print_place(place, say)
    if not result["finished"]:
        say((results.where(run), "yellow"))
    for message in text.counted(result["warnings"]):
        say((f"WARNING: {text.printable(message)}", "yellow"))
    if result["collapsed"]:
        say((f"THE ARCHITECTURE COLLAPSED: {results.collapse(run)}", "bold red"))


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


def main() -> None:
    """Command line: exit code 2 and one line on stderr if a folder holds no run or cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.report",
        description="One run: write RUN/report.html, a page that needs no network, RUN/report.md and RUN/plots/, and print the "
        "run's final table. Several: compare them, mean and standard deviation over seeds. Works while runs are still going, and "
        "on those that were stopped.",
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="run folder, for example runs/digits, or a sweep's, which holds runs")
    parser.add_argument("--output", metavar="FOLDER", help="where a comparison goes; default: the closest folder of all its runs")
    args = parser.parse_args()
    # A name that the terminal's encoding lacks is no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    try:
        if len(args.run) > 1 or comparison.is_sweep(Path(args.run[0])):
            compare(args.run, args.output)
        elif args.output:
            raise ValueError("--output: goes with a comparison of runs; a single run's report is written into its own folder")
        else:
            run = load(args.run[0])
            write_all(run)
            print_table(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
