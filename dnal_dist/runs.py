"""The runs in a folder: state, progress and results. No torch.

python -m dnal_dist.runs runs             those in runs/, in sweeps too: three folders deep
python -m dnal_dist.runs runs --watch     again every few seconds
python -m dnal_dist.runs runs --json      for programs
"""

import json
import os
import sys
import time
from pathlib import Path

from dnal_dist.common import text
from dnal_dist.common.door import argument, parser_of
from dnal_dist.report.run_list import DEPTH, EVERY, SILENT, STATES, listed

COLOURS = {"running": "green", "seems to run": "green", "queued": "cyan", "stopped": "yellow", "killed": "red", "broken": "red"}


def cells(one: dict, folder: Path) -> list[str]:
    """A run's line of the table."""
    run = Path(one["run"])
    where = str(run.relative_to(folder)) if run != folder else str(run)
    step = f"{one['step']}/{one.get('phase_steps', '?')}" if "step" in one else ""
    state = STATES[one["state"]] + (f": {one['why']}" if "why" in one else "")
    if "job" in one and one["state"] in ("running", "queued", "seems to run"):
        state += f" (job {one['job']})"
    done = one["state"] in ("finished", "missed")
    return [
        text.printable(where),
        text.printable(state),
        str(one.get("phase", "")) if not done else "",
        step if not done else "",
        text.percent(one["accuracy"], 2) if "accuracy" in one else "",
        text.percent(one["macs_ratio"]) if "macs_ratio" in one else "",
        text.number(one["images_per_second"]) if "images_per_second" in one else "",
        text.duration(60 * round(one["eta"] / 60)) if "eta" in one else "",
        f"{text.duration(one['checkpoint_age'])} ago" if "checkpoint_age" in one and not done else "",
        str(one.get("warnings") or ""),
    ]


HEAD = ["run", "state", "phase", "step", "accuracy", "macs", "images/s", "left", "last saved", "warnings"]
WARNINGS = 'warnings: in a run\'s report.html, or grep \'"kind": "warning"\' RUN/metrics.jsonl'


def _print(folder: Path, found: list[dict]) -> None:
    from rich.console import Console
    from rich.text import Text

    # Uncut, whatever the width; colours on a terminal only. Captured, since rich has an exit code of its own for a closed pipe.
    console, lines = Console(soft_wrap=True, highlight=False), [cells(one, folder) for one in found]
    widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]
    colours = ["bold", *(COLOURS.get(one["state"], "") for one in found)]
    with console.capture() as captured:
        for line, colour in zip([HEAD, *lines], colours, strict=True):
            words = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
            console.print(Text("  ".join(words).rstrip(), colour))
    print(captured.get(), end="")
    if any(one.get("warnings") for one in found):
        print(WARNINGS)


def main() -> None:
    seems = "its disk is shared with other machines, where its lock may not be seen, and its last record is younger than"
    states = f"states: {'; '.join(STATES.values())}.\nA run seems to run if {seems} {SILENT / 60:.0f} minutes."
    parser = parser_of("dnal_dist.runs", __doc__, epilog=states)
    parser.add_argument("folder", type=argument, metavar="FOLDER", help="for example runs")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--watch", action="store_true", help=f"repeat every {EVERY:.0f} s, until Ctrl-C")
    args = parser.parse_args()
    if sys.stdout is None:
        # Closed by whoever started this: there is nobody to list runs for.
        return
    # A name that the terminal's encoding lacks is no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    if not args.folder.is_dir():
        print(f"error: {args.folder}: no such folder; give the one that runs are in, such as runs", file=sys.stderr)
        sys.exit(2)
    try:
        while True:
            found = listed(args.folder)
            if args.watch and sys.stdout.isatty():
                print("\033[H\033[J", end="")
            if args.json:
                print(json.dumps(found, indent=None if args.watch else 1))
            elif found:
                _print(args.folder, found)
            else:
                print(f"{args.folder}: no run in it, nor {DEPTH} folders deep")
            sys.stdout.flush()
            if not args.watch:
                return
            time.sleep(EVERY)
    except (KeyboardInterrupt, BrokenPipeError):
        # So that Python does not try to write what is left to a pipe that nobody reads.
        os._exit(0)


if __name__ == "__main__":
    main()
