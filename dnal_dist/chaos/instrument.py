"""The train command inside a process that `dnal_dist.chaos` kills, with a listener at the spans of the run (common/span.py).

Each process records in a file, the board, its present place, how often it entered each place and the seconds there. The board
outlives the process, so it also shows where a kill by the clock hit.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dnal_dist.common import span
from dnal_dist.common.phases import PHASES

# A process is always at one of these three, or within a span; kills are aimed at the others and at the third.
START_UP, BETWEEN_STEPS, LAST = "start-up", "between steps", "after the last checkpoint"
SPANS = ("recipe write", "checkpoint read", "data wait", "weight step", "architecture step", "forward", "backward", "sync")
SPANS += ("optimizer", "logging", "evaluation", "gather", "checkpoint", "checkpoint write", "prune", "compaction", "compact write")
SPANS += ("report", "write", "fsync", "rename", "removal")
PLACES = (START_UP, BETWEEN_STEPS, *SPANS, LAST)
AIMABLE = (*SPANS, LAST)
# Phases of a run, with the time before its first one.
STAGES = (START_UP, *PHASES)
FIELDS = [
    ("pid", "i8"),
    ("where", "i1", 2),  # place of the main thread and of any other; -1: none
    ("began", "f8"),  # on the machine's monotonic clock, as the next two
    ("trained", "f8"),
    ("ended", "f8"),
    ("fired", "i1"),  # 1: the aimed kill hit the main thread, 2: another one; 0: it did not happen
    ("steps", "i8", len(STAGES)),  # steps of this process by the end of each stage
    ("counts", "i8", (len(STAGES), len(PLACES))),
    ("seconds", "f8", len(PLACES)),
]


@dataclass(frozen=True)
class Aim:
    """A kill at the `occurrence`-th entry of `rank` to `place`: `delay` seconds later, or at the end of the place if `leaving`.
    everyone: all ranks are killed, not this one alone. fraction: of a file's content that is written by then."""

    rank: int
    place: str
    occurrence: int
    delay: float
    leaving: bool
    everyone: bool
    fraction: float


def new_board(path: Path, ranks: int) -> np.ndarray:
    board = np.memmap(path, FIELDS, "w+", shape=(ranks,))
    board["where"] = -1
    return board


def place_of(entry: np.ndarray) -> str:
    """Last place of the process with this entry of a board. A checkpoint may be written beside training: an aimed kill then hit
    the thread that it was aimed at, one by the clock the writer."""
    main, beside = entry["where"]
    in_writer = beside >= 0 if entry["fired"] == 0 else entry["fired"] == 2
    return PLACES[max(beside if in_writer else main, 0)]


def write_orders(path: Path, board: Path, aim: Aim | None) -> None:
    path.write_text(json.dumps({"board": str(board), "aim": None if aim is None else asdict(aim)}))


def main(orders: Path, arguments: list[str]) -> None:
    """Run the train command with `arguments` under the orders in a file; exits as that command does."""
    found = json.loads(orders.read_text())
    span.attach(Instrument(np.memmap(found["board"], FIELDS, "r+"), None if found["aim"] is None else Aim(**found["aim"])))
    sys.argv = ["dnal_dist.train", *arguments]
    runpy.run_module("dnal_dist.train", run_name="__main__", alter_sys=True)


class Instrument:
    """The listener: keeps this process's entry of the board and carries out `aim`."""

    def __init__(self, board: np.ndarray, aim: Aim | None):
        rank = int(os.environ.get("RANK", 0))
        self.board, self.entry = board, board[rank]
        self.aim = aim if aim is not None and aim.rank == rank else None
        self.entered = dict.fromkeys(PLACES, 0)
        self.stage = self.steps = 0
        self.entry["where"][0] = PLACES.index(START_UP)
        self.entry["began"], self.entry["pid"] = time.monotonic(), os.getpid()

    def __call__(self, name: str, detail: object) -> contextlib.AbstractContextManager:
        if name == "training":
            return self.training()
        if name in PHASES:
            return self.phase(name)
        return self.at(name, detail) if name in SPANS else contextlib.nullcontext()

    @contextlib.contextmanager
    def at(self, place: str, detail: object = None) -> Iterator[None]:
        """This thread is at `place` meanwhile, and may be killed there."""
        slot = _slot()
        number, before = PLACES.index(place), self.entry["where"][slot]
        self.entry["where"][slot] = number
        self.entry["counts"][self.stage, number] += 1
        self.entered[place] += 1
        aimed = self.aim is not None and (place, self.entered[place]) == (self.aim.place, self.aim.occurrence)
        if aimed and not self.aim.leaving:
            self._kill_later(slot, detail)
        began = time.monotonic()
        try:
            yield
        finally:
            if aimed and self.aim.leaving:
                self._kill(slot)
            self.entry["seconds"][number] += time.monotonic() - began
            self.entry["where"][slot] = before
        if place in ("weight step", "architecture step"):
            self.steps += 1
            self.entry["steps"][self.stage :] = self.steps

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Also the prune phase, which is both a phase and a place."""
        self.stage = STAGES.index(name)
        with self.at(name) if name in SPANS else contextlib.nullcontext():
            yield
        self.stage += 1

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.stage = 1
        self.entry["trained"] = time.monotonic()
        self.entry["where"][0] = PLACES.index(BETWEEN_STEPS)
        yield
        self.entry["ended"] = time.monotonic()
        # Entered for good: all that follows is after the last checkpoint.
        self.end = self.at(LAST)
        self.end.__enter__()

    def _kill_later(self, slot: int, detail: object) -> None:
        if self.aim.place == "write":
            path, content = detail
            path.write_bytes(content[: int(self.aim.fraction * len(content))])
        elif self.aim.delay >= 1e-4:
            timer = threading.Timer(self.aim.delay, self._kill, [slot])
            timer.daemon = True
            timer.start()
            return
        self._kill(slot)

    def _kill(self, slot: int) -> None:
        self.entry["fired"] = slot + 1
        others = [int(pid) for pid in self.board["pid"] if pid not in (0, os.getpid())]
        for pid in others if self.aim.everyone else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _slot() -> int:
    return 0 if threading.current_thread() is threading.main_thread() else 1
