"""Kill a run at random instants, resume it each time, and compare its end with an undisturbed run's.

python -m dnal_dist.chaos recipes/digits.yaml --kills 50 --seed 0
python -m dnal_dist.chaos recipes/digits.yaml --kills 50 --ranks 1,2 --report chaos.md
"""

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from dnal_dist import recipe
from dnal_dist.chaos import instrument
from dnal_dist.common.door import argument, door, parser_of, several, whole
from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import named


@door
def main() -> None:
    if sys.argv[1:2] == ["--instrument"]:
        instrument.main(Path(sys.argv[2]), sys.argv[3:])
        return
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(_run(args))


def _run(args: argparse.Namespace) -> int:
    # Not at the top: torch takes seconds, and --help does not need it.
    from dnal_dist.chaos import summary
    from dnal_dist.chaos.attempt import Train, become_reaper, kill_family
    from dnal_dist.chaos.campaign import Chaos

    if refused := [one for one in args.overrides if one.startswith(("output=", "tracking.tracker="))]:
        raise InputError(f"override '{refused[0]}': chaos runs into folders of its own, without a tracker; leave it out")
    overrides = (*args.overrides, "tracking.tracker=none", "tracking.plots=false")
    settings = recipe.load(args.recipe, list(overrides))
    if args.config_file is not None and not args.config_file.is_file():
        raise InputError(f"--config_file {args.config_file}: no such file; see {named('recipes/accelerate')}")
    if args.report is not None and not args.report.parent.is_dir():
        raise InputError(f"--report {args.report}: there is no folder {args.report.parent}; make it")
    train, began = Train(args.recipe, overrides, args.config_file), time.monotonic()
    base = _base(args.keep)
    # Imported once, here: the processes of the runs are forks of this one.
    importlib.import_module("dnal_dist.training.command")
    become_reaper()
    try:
        chaos = Chaos(train, args.ranks, args.seed, base, args.tolerance)
        chaos.go(args.kills, _print_progress)
        _print_progress("")
        passed = not chaos.tally.faults
        if passed and args.keep is None:
            shutil.rmtree(base)
    except BaseException:
        # Leave neither a process nor a folder. The processes go first, since they write into it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        kill_family()
        if args.keep is None:
            shutil.rmtree(base, ignore_errors=True)
        raise
    report = summary.markdown(args, settings.name, chaos.tally, chaos.references, time.monotonic() - began)
    print(report, flush=True)
    if not passed:
        print(f"the run folders are kept in {base}", file=sys.stderr)
    if args.report is not None:
        args.report.write_text(report + "\n")
    return 0 if passed else 1


def _print_progress(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


def _base(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="dnal-chaos-"))
    if keep.exists() and any(keep.iterdir()):
        raise InputError(f"--keep {keep}: this folder is not empty; name another one")
    keep.mkdir(parents=True, exist_ok=True)
    return keep


def _arguments() -> argparse.Namespace:
    parser = parser_of("dnal_dist.chaos", __doc__)
    parser.add_argument("recipe", help="recipe to run; choose short phases, since it runs many times")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--kills", type=whole(), default=50, metavar="N", help="number of kills (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: 0)")
    ranks = "numbers of processes, one drawn for each start"
    parser.add_argument("--ranks", type=several(whole()), default=[1], metavar="N[,N]", help=ranks)
    parser.add_argument("--config_file", type=argument, metavar="FILE", help="start by `accelerate launch` with this config")
    tolerance = "on the accuracy, with several numbers of processes (default: 0.03)"
    parser.add_argument("--tolerance", type=float, default=0.03, help=tolerance)
    parser.add_argument("--report", type=argument, metavar="FILE", help="also write the report to this Markdown file")
    parser.add_argument("--keep", type=argument, metavar="FOLDER", help="work in this folder and keep everything there")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
