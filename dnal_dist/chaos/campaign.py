"""A campaign: reference runs, kills, resumes, and their tally."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dnal_dist.chaos import equality, instrument
from dnal_dist.chaos.attempt import ByClock, Ended, Train, attempt, isolated, temporary_of
from dnal_dist.chaos.instrument import AIMABLE, LAST, PLACES, STAGES, Aim
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.nets import compact

# An attempt is stuck after STUCK times the seconds of the whole run and PATIENCE more.
STUCK, PATIENCE = 10, 60
# Exit codes of a run that trained to its end; 3 where its network misses the recipe's target.
FINISHED = {0, 3}


class Position:
    """Stage (its number) and global step of a run folder's newest checkpoint; both 0 without one."""

    def __init__(self, run: Path):
        step, phase = max(map(checkpoint.place, checkpoint.found(run / "checkpoints")), default=checkpoint.UNKNOWN)
        # The first stage is that of the start-up.
        self.step, self.stage = max(0, step), phase + 1


class Reference:
    """An uninterrupted run on `ranks` processes: others are compared with it, and kills are aimed at the places that it entered."""

    def __init__(self, train: Train, base: Path, ranks: int):
        self.ranks, self.folder = ranks, base / f"whole-{ranks}"
        ended = attempt(train, self.folder, base / f"work-whole-{ranks}", ranks, None, float("inf"))
        self.codes, self.board = ended.codes, ended.board
        what = f"the uninterrupted run on {ranks} process{'es' if ranks > 1 else ''}"
        if not set(ended.codes) <= FINISHED or not (self.folder / "compact").exists():
            raise InputError(_failed(what, ended))
        if left := [f"{kind} ({found})" for kind, found in ended.left.items() if found]:
            raise InputError(_failed(f"{what} left {', '.join(left)} behind and cannot be a reference: it", ended))
        self.seconds = ended.seconds
        self.start = float(self.board["trained"].max()) - ended.began
        self.training = float(self.board["ended"].max() - self.board["trained"].max())
        self.end = self.seconds - self.start - self.training

    def by_clock(self, rng: random.Random, position: Position, everyone: bool) -> ByClock:
        """A kill at any time from the start of the processes to their expected end."""
        total = int(self.board["steps"].max())
        left = self.start + self.training * (1 - position.step / total) + self.end
        return ByClock(rng.randrange(self.ranks), rng.uniform(0, left), everyone)

    def aim(self, rng: random.Random, position: Position, everyone: bool) -> Aim:
        """A kill at any place that a run still enters after `position`."""
        counts = np.array([self._entries_left(rank, position) for rank in range(self.ranks)])
        places = [number for number, name in enumerate(PLACES) if name in AIMABLE and counts[:, number].max() >= 1]
        place = rng.choice(places)
        rank = rng.choice([rank for rank in range(self.ranks) if counts[rank, place] >= 1])
        seconds = self.board["seconds"][rank, place] / max(1, self.board["counts"][rank, :, place].sum())
        leaving = PLACES[place] != LAST and rng.random() < 0.25
        if PLACES[place] == LAST:
            seconds = self.end
        occurrence = rng.randint(1, int(counts[rank, place]))
        return Aim(rank, PLACES[place], occurrence, rng.uniform(0, seconds), leaving, everyone, rng.random())

    def _entries_left(self, rank: int, position: Position) -> np.ndarray:
        """About how often a process enters each place from `position` on."""
        counts, steps = self.board["counts"][rank], self.board["steps"][rank]
        left = np.array(counts[0], float)
        for stage in range(max(1, position.stage), len(STAGES)):
            first, last = int(steps[stage - 1]), int(steps[stage])
            fraction = (last - position.step) / (last - first) if stage == position.stage and last > first else 1.0
            left += counts[stage] * fraction
        return left.round()


def draw_kill(rng: random.Random, reference: Reference, position: Position) -> Aim | ByClock:
    """Half of the kills come by the clock, half are aimed at a place."""
    everyone = reference.ranks == 1 or rng.random() < 0.5
    draw = reference.by_clock if rng.random() < 0.5 else reference.aim
    return draw(rng, position, everyone)


@dataclass
class Tally:
    """Counts of a campaign."""

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
    """Runs compared with the uninterrupted one."""
    rounds: int = 0
    forced: int = 0
    longest_restart: float = 0.0
    longest_stop: float = 0.0
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(key of summary.CHECKS, finding)."""

    @property
    def kills(self) -> int:
        return self.hit_by_aim.total() + self.hit_by_clock.total()

    def add(self, kill: Aim | ByClock, ended: Ended) -> None:
        place = instrument.place_of(ended.board[kill.rank])
        (self.hit_by_aim if isinstance(kill, Aim) else self.hit_by_clock)[place] += 1
        self.everyone += kill.everyone
        self.forced += ended.forced
        self.longest_stop = max(self.longest_stop, ended.stop_seconds)


class Chaos:
    """Kills and resumes of `train` on the numbers of processes in `ranks`, one of them drawn for each start."""

    def __init__(self, train: Train, ranks: list[int], seed: int, base: Path, tolerance: float):
        self.train, self.base, self.tolerance = train, base, tolerance
        self.rng, self.tally = random.Random(seed), Tally()
        self.references = {number: Reference(train, base, number) for number in ranks}
        self.exact = len(ranks) == 1

    def go(self, kills: int, progress: Callable[[str], None]) -> None:
        """Rounds of one run each, until `kills` have happened and the last run has ended. Stops at a fault. progress: called with a
        line of text after each start."""
        while self.tally.kills < kills and not self.tally.faults:
            self.tally.rounds += 1
            self._round(kills, progress)

    def _round(self, kills: int, progress: Callable[[str], None]) -> None:
        run, tally, after_kill, enough = self.base / f"run-{self.tally.rounds}", self.tally, False, False
        while True:
            position, reference = Position(run), self.references[self.rng.choice([*self.references])]
            kill = None if enough or tally.kills >= kills else draw_kill(self.rng, reference, position)
            if isinstance(kill, Aim):
                tally.aimed[kill.place] += 1
            if after_kill:
                tally.resumed[STAGES[position.stage]] += 1
            # A finished run is killed once more; then another begins, in which more can happen.
            enough = STAGES[position.stage] == "done"
            work = self.base / f"work-{tally.starts}"
            limit = PATIENCE + STUCK * reference.seconds
            ended = attempt(self.train, run, work, reference.ranks, kill, limit)
            tally.starts += 1
            tally.ended += not ended.killed
            self._check_end(ended, reference)
            if after_kill and ended.board["trained"].all():
                restart = float(ended.board["trained"].max()) - ended.began
                tally.longest_restart = max(tally.longest_restart, restart)
            if ended.killed:
                tally.add(kill, ended)
            progress(f"kills {tally.kills} of {kills}: run {tally.rounds}, from {STAGES[position.stage]} {position.step}")
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

    def _check_end(self, ended: Ended, reference: Reference) -> None:
        faults = self.tally.faults
        if ended.timed_out:
            faults.append(("end", _failed("a start", ended)))
        elif not ended.killed and ended.codes != reference.codes:
            faults.append(("end", _failed("a start that was not killed", ended)))
        faults += [(kind, found) for kind, found in ended.left.items() if found]

    def _compare(self, run: Path) -> None:
        self.tally.compared += 1
        found = compare(run, next(iter(self.references.values())).folder, None if self.exact else self.tolerance)
        self.tally.faults += [("equal", one) for one in found]
        remains = [path.name for path in run.rglob("*") if path.name.endswith((".unfinished", ".removed"))]
        remains += [path.name for path in run.rglob("damaged-*")]
        self.tally.faults += [("folder", f"{name} is left in the run folder") for name in remains]
        if isolated(compact.load, run / "compact"):
            self.tally.faults.append(("folder", "its compact network cannot be loaded"))


def compare(run: Path, whole: Path, tolerance: float | None) -> list[str]:
    """Differences between two run folders, or why they cannot be compared. tolerance: on the accuracy; None: bit for bit."""
    try:
        return equality.same(run, whole) if tolerance is None else equality.alike(run, whole, tolerance)
    except (OSError, ValueError) as error:
        return [str(error)]
    except (LookupError, TypeError) as error:
        return [f"its records cannot be compared: {type(error).__name__}: {error}"]


def _failed(what: str, ended: Ended) -> str:
    ended_with = "did not come to an end" if ended.timed_out else f"ended with exit codes {ended.codes}"
    return f"{what} {ended_with}; its last lines:\n" + "\n".join(f"    {line}" for line in ended.lines)
