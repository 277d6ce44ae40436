"""Kill a run at random instants, resume it each time, and compare what it comes to with a run that was left alone.

python -m dnal_dist.chaos recipes/digits.yaml --kills 50 --seed 0
python -m dnal_dist.chaos recipes/digits.yaml --kills 50 --ranks 1,2 --report chaos.md
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dnal_dist import compare, recipe, verdict, victim
from dnal_dist.attempt import ByClock, Ended, Train, attempt, become_reaper, isolated, kill_family, temporary_of
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.nets import compact
from dnal_dist.victim import ALWAYS, PLACES, STAGES, Aim

# An attempt that takes so many times the seconds of the whole run, and so many more, is stuck.
STUCK, PATIENCE = 10, 60
# Exit codes of a run that trained to its end; 3 where its network does not meet the recipe's target.
WELL = {0, 3}


class Position:
    """Where a run folder's newest checkpoint stands: number of the stage and global step; (0, 0) if there is none."""

    def __init__(self, run: Path):
        step, phase = max(map(checkpoint.place, checkpoint.found(run / "checkpoints")), default=checkpoint.UNKNOWN)
        # The first stage is that of the start-up.
        self.step, self.stage = max(0, step), phase + 1


class Reference:
    """An uninterrupted run on `ranks` processes: what others are compared with, and where kills may be aimed at."""

    def __init__(self, train: Train, base: Path, ranks: int):
        self.ranks, self.folder = ranks, base / f"whole-{ranks}"
        ended = attempt(train, self.folder, base / f"work-whole-{ranks}", ranks, None, float("inf"))
        self.codes, self.board = ended.codes, ended.board
        what = f"the uninterrupted run on {ranks} process{'es' if ranks > 1 else ''}"
        if not set(ended.codes) <= WELL or not (self.folder / "compact").exists():
            raise InputError(_failed(what, ended))
        if left := [f"{kind} ({found})" for kind, found in ended.left.items() if found]:
            raise InputError(_failed(f"{what} left {', '.join(left)} behind, so that no other can be held to it: it", ended))
        self.seconds = ended.seconds
        self.start = float(self.board["trained"].max()) - ended.begun
        self.training = float(self.board["ended"].max() - self.board["trained"].max())
        self.end = self.seconds - self.start - self.training

    def by_clock(self, rng: random.Random, position: Position, everyone: bool) -> ByClock:
        """At any time of what is left, from the start of the processes to their end."""
        total = int(self.board["steps"].max())
        left = self.start + self.training * (1 - position.step / total) + self.end
        return ByClock(rng.randrange(self.ranks), rng.uniform(0, left), everyone)

    def aim(self, rng: random.Random, position: Position, everyone: bool) -> Aim:
        """At any place that is still to come."""
        counts = np.array([self._to_come(rank, position) for rank in range(self.ranks)])
        places = [n for n, name in enumerate(PLACES) if name not in ALWAYS and counts[:, n].max() >= 1]
        place = rng.choice(places)
        rank = rng.choice([rank for rank in range(self.ranks) if counts[rank, place] >= 1])
        seconds = self.board["seconds"][rank, place] / max(1, self.board["counts"][rank, :, place].sum())
        if PLACES[place] == "after the last checkpoint":
            seconds = self.end
        occurrence = rng.randint(1, int(counts[rank, place]))
        return Aim(rank, PLACES[place], occurrence, rng.uniform(0, seconds), everyone, rng.random())

    def _to_come(self, rank: int, position: Position) -> np.ndarray:
        """How often, about, a process comes to each place from `position` on."""
        counts, steps = self.board["counts"][rank], self.board["steps"][rank]
        left = np.array(counts[0], float)
        for stage in range(max(1, position.stage), len(STAGES)):
            first, last = int(steps[stage - 1]), int(steps[stage])
            share = (last - position.step) / (last - first) if stage == position.stage and last > first else 1.0
            left += counts[stage] * share
        return left.round()


@dataclass
class Tally:
    """What is counted on the way."""

    aimed: Counter = field(default_factory=Counter)
    hit_by_aim: Counter = field(default_factory=Counter)
    hit_by_clock: Counter = field(default_factory=Counter)
    resumed: Counter = field(default_factory=Counter)
    everyone: int = 0
    missed: int = 0
    starts: int = 0
    ended: int = 0
    """Starts that were not killed."""
    compared: int = 0
    """Runs held against the uninterrupted one."""
    rounds: int = 0
    forced: int = 0
    longest_restart: float = 0.0
    longest_stop: float = 0.0
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(check of verdict.CHECKS, what was found)."""

    @property
    def kills(self) -> int:
        return self.hit_by_aim.total() + self.hit_by_clock.total()

    def add(self, kill: Aim | ByClock, ended: Ended) -> None:
        place = victim.place_of(ended.board[kill.rank])
        (self.hit_by_aim if isinstance(kill, Aim) else self.hit_by_clock)[place] += 1
        self.everyone += kill.everyone
        self.forced += ended.forced
        self.longest_stop = max(self.longest_stop, ended.stop_seconds)


class Chaos:
    """Kills and resumptions of `train` on the numbers of processes in `ranks`, one of them drawn for each start."""

    def __init__(self, train: Train, ranks: list[int], seed: int, base: Path, tolerance: float):
        self.train, self.base, self.tolerance = train, base, tolerance
        self.rng, self.tally = random.Random(seed), Tally()
        self.references = {number: Reference(train, base, number) for number in ranks}
        self.exact = len(ranks) == 1

    def go(self, kills: int, tell) -> None:
        """Rounds of one run each, until so many kills have happened and the last run has come to its end. Stops at a fault.
        tell: called with a word on where it stands, whenever something has happened."""
        while self.tally.kills < kills and not self.tally.faults:
            self.tally.rounds += 1
            self._round(kills, tell)

    def _round(self, kills: int, tell) -> None:
        run, tally, after_kill, enough = self.base / f"run-{self.tally.rounds}", self.tally, False, False
        while True:
            position, reference = Position(run), self.references[self.rng.choice([*self.references])]
            kill = None if enough or tally.kills >= kills else self._draw(reference, position)
            if after_kill:
                tally.resumed[STAGES[position.stage]] += 1
            # A run that has nothing left to train is killed once more; then another is begun, in which more can happen.
            enough = STAGES[position.stage] == "done"
            work = self.base / f"work-{tally.starts}"
            limit = PATIENCE + STUCK * reference.seconds
            ended = attempt(self.train, run, work, reference.ranks, kill, limit)
            tally.starts += 1
            tally.ended += not ended.killed
            self._look_after(ended, reference)
            if after_kill and ended.board["trained"].all():
                restart = float(ended.board["trained"].max()) - ended.begun
                tally.longest_restart = max(tally.longest_restart, restart)
            if ended.killed:
                tally.add(kill, ended)
            tell(f"run {tally.rounds}, start {tally.starts}, from {STAGES[position.stage]} {position.step}")
            if tally.faults:
                return
            shutil.rmtree(work)
            if not ended.killed:
                tally.missed += kill is not None
                break
            after_kill = True
        self._compare(run)
        if not tally.faults:
            shutil.rmtree(run)
            shutil.rmtree(temporary_of(run))

    def _draw(self, reference: Reference, position: Position) -> Aim | ByClock:
        everyone = reference.ranks == 1 or self.rng.random() < 0.5
        if self.rng.random() < 0.5:
            return reference.by_clock(self.rng, position, everyone)
        aim = reference.aim(self.rng, position, everyone)
        self.tally.aimed[aim.place] += 1
        return aim

    def _look_after(self, ended: Ended, reference: Reference) -> None:
        faults = self.tally.faults
        if ended.timed_out:
            faults.append(("end", _failed("a start", ended)))
        elif not ended.killed and ended.codes != reference.codes:
            faults.append(("end", _failed("a start that was not killed", ended)))
        faults += [(kind, found) for kind, found in ended.left.items() if found]

    def _compare(self, run: Path) -> None:
        whole = next(iter(self.references.values())).folder
        self.tally.compared += 1
        try:
            found = compare.same(run, whole) if self.exact else compare.alike(run, whole, self.tolerance)
        except (OSError, ValueError) as error:
            found = [str(error)]
        except (LookupError, TypeError) as error:
            found = [f"its records cannot be compared: {type(error).__name__}: {error}"]
        self.tally.faults += [("equal", one) for one in found]
        remains = [path.name for path in run.rglob("*") if path.name.endswith((".unfinished", ".removed"))]
        remains += [path.name for path in run.rglob("damaged-*")]
        self.tally.faults += [("folder", f"{name} is left in the run folder") for name in remains]
        if isolated(compact.load, run / "compact"):
            self.tally.faults.append(("folder", "its compact network cannot be loaded"))


def _failed(what: str, ended: Ended) -> str:
    ended_with = "did not come to an end" if ended.timed_out else f"ended with exit codes {ended.codes}"
    return f"{what} {ended_with}; its last lines:\n" + "\n".join(f"    {line}" for line in ended.lines)


def main() -> None:
    if sys.argv[1:2] == ["--victim"]:
        victim.main(Path(sys.argv[2]), sys.argv[3:])
        return
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(_run(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(args: argparse.Namespace) -> int:
    if taken := [one for one in args.overrides if one.startswith(("output=", "tracking.tracker="))]:
        raise InputError(f"override '{taken[0]}': chaos runs into folders of its own, without a tracker; leave it out")
    overrides = (*args.overrides, "tracking.tracker=none", "tracking.plots=false")
    settings = recipe.load(args.recipe, list(overrides))
    if args.config_file is not None and not Path(args.config_file).is_file():
        raise InputError(f"--config_file {args.config_file}: no such file; see recipes/accelerate/")
    if args.report is not None and not args.report.parent.is_dir():
        raise InputError(f"--report {args.report}: there is no folder {args.report.parent}; make it")
    train, begun = Train(args.recipe, overrides, args.config_file), time.monotonic()
    base = _base(args.keep)
    become_reaper()
    try:
        chaos = Chaos(train, args.ranks, args.seed, base, args.tolerance)
        _watched(chaos, args.kills)
        passed = not chaos.tally.faults
        if passed and args.keep is None:
            shutil.rmtree(base)
    except BaseException:
        _give_up(base if args.keep is None else None)
        raise
    told = verdict.markdown(args, settings.name, chaos.tally, chaos.references, time.monotonic() - begun)
    print(told, flush=True)
    if not passed:
        print(f"what was left is in {base}", file=sys.stderr)
    if args.report is not None:
        args.report.write_text(told + "\n")
    return 0 if passed else 1


def _give_up(base: Path | None) -> None:
    """Leave no process, nor the folder `base`. The processes go first, since they write into it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    kill_family()
    if base is not None:
        shutil.rmtree(base, ignore_errors=True)


def _watched(chaos: "Chaos", kills: int) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("kills"), BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[where]}"))
    # Without threads and without another stdout: processes are forked from here.
    plain = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, **plain) as bar:
        task = bar.add_task("kills", total=kills, where="")

        def tell(where: str) -> None:
            bar.update(task, completed=chaos.tally.kills, where=where)
            bar.refresh()

        chaos.go(kills, tell)


def _base(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="dnal-chaos-"))
    if keep.exists() and any(keep.iterdir()):
        raise InputError(f"--keep {keep}: this folder is not empty; name another one")
    keep.mkdir(parents=True, exist_ok=True)
    return keep


def _ranks(text: str) -> list[int]:
    ranks = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if 0 in ranks or len(set(ranks)) < len(ranks):
        raise argparse.ArgumentTypeError(f"expected numbers of processes such as 2 or 1,2, found {text!r}")
    return ranks


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="what is run; choose short phases, since it is run many times")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many kills have to happen (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan of kills (default: 0)")
    parser.add_argument("--ranks", type=_ranks, default=[1], metavar="N[,N]", help="numbers of processes, one drawn for each start")
    parser.add_argument("--config_file", metavar="FILE", help="start by `accelerate launch` with this config, on its backend")
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="of the accuracy, where numbers of processes mix (default: 0.03)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report, Markdown, there too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder and leave all there")
    args = parser.parse_intermixed_args()
    if args.kills < 1:
        parser.error("--kills: expected at least 1")
    return args


if __name__ == "__main__":
    main()
