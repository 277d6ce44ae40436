"""What runs inside a process that `dnal_dist.chaos` kills: the train command, watched at the places where a kill may matter.

Each process writes to a file, the board, where it is, how often it came to each place and how long it was there. The board outlives
the process, so it also tells where a kill by the clock hit.
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

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common import atomic
from dnal_dist.common.phases import PHASES
from dnal_dist.nets import compact
from dnal_dist.report import outputs
from dnal_dist.training import loop, phases, steps

PLACES = (
    "start-up",
    "reading a checkpoint",
    "writing recipe.yaml",
    "between steps",
    "weight step",
    "architecture step",
    "between parts of a batch",
    "evaluation",
    "pruning",
    "compaction",
    "writing compact/",
    "after the last checkpoint",
    "writing the report",
    "write",
    "between write and fsync",
    "fsync",
    "before rename",
    "after rename",
    "removal",
)
# Of these a process is always at one; a kill cannot be aimed at them by name, since it does not enter them.
ALWAYS = ("start-up", "between steps")
# Where the run stands; before it is set up, and from its last step on, as well.
STAGES = ("start-up", *PHASES)
FIELDS = [
    ("pid", "i8"),
    ("where", "i1", 2),  # of the main thread and of any other; -1: nowhere
    ("stage", "i1"),
    ("resumed", "i1"),  # stage in which training began; 0: not yet
    ("began", "f8"),  # on the machine's monotonic clock, as the next two
    ("trained", "f8"),
    ("ended", "f8"),
    ("fired", "i1"),  # which of the two was the aimed kill's, from 1 on; 0: none
    ("steps", "i8", len(STAGES)),  # the last global step that was seen in a stage
    ("counts", "i8", (len(STAGES), len(PLACES))),
    ("seconds", "f8", len(PLACES)),
]


@dataclass(frozen=True)
class Aim:
    """A kill `delay` seconds after `rank` came to `place` for the `occurrence`-th time in its life; of `everyone`, or of it alone.
    share: of what is being written by then, how much is."""

    rank: int
    place: str
    occurrence: int
    delay: float
    everyone: bool
    share: float


def new_board(path: Path, ranks: int) -> np.ndarray:
    board = np.memmap(path, FIELDS, "w+", shape=(ranks,))
    board["where"] = -1
    return board


def place_of(entry: np.ndarray) -> str:
    """Where the process of this entry of a board was last. While a save is under way beside its training it is at two places: an
    aimed kill hit where it was aimed, one by the clock hit the save."""
    main, beside = entry["where"]
    saving = beside >= 0 if entry["fired"] == 0 else entry["fired"] == 2
    return PLACES[max(beside if saving else main, 0)]


def write_orders(path: Path, board: Path, aim: Aim | None) -> None:
    path.write_text(json.dumps({"board": str(board), "aim": None if aim is None else asdict(aim)}))


def main(orders: Path, arguments: list[str]) -> None:
    """Run the train command with `arguments`, watched as the file `orders` says. Leaves as that command does."""
    told = json.loads(orders.read_text())
    watch = Watch(np.memmap(told["board"], FIELDS, "r+"), None if told["aim"] is None else Aim(**told["aim"]))
    watch.seams()
    sys.argv = ["dnal_dist.train", *arguments]
    runpy.run_module("dnal_dist.train", run_name="__main__", alter_sys=True)


class Watch:
    def __init__(self, board: np.ndarray, aim: Aim | None):
        rank = int(os.environ.get("RANK", 0))
        self.board, self.me = board, board[rank]
        self.aim = aim if aim is not None and aim.rank == rank else None
        self.come = dict.fromkeys(PLACES, 0)
        self.run: phases.Run | None = None
        self.parts = 0
        self.me["where"][0] = PLACES.index("start-up")
        self.me["began"], self.me["pid"] = time.monotonic(), os.getpid()

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[bool]:
        """This process is at `place` meanwhile; yields whether it is to die there."""
        slot = _slot()
        number, before = PLACES.index(place), self.me["where"][slot]
        self.me["where"][slot] = number
        self.me["counts"][self._stage(), number] += 1
        self.come[place] += 1
        aimed = self.aim is not None and (place, self.come[place]) == (self.aim.place, self.aim.occurrence)
        if aimed and place != "write":
            self._die(slot)
        began = time.monotonic()
        try:
            yield aimed
        finally:
            self.me["seconds"][number] += time.monotonic() - began
            self.me["where"][slot] = before

    def _stage(self) -> int:
        if self.run is None:
            return int(self.me["stage"])
        stage = STAGES.index(self.run.phase)
        self.me["stage"], self.me["steps"][stage] = stage, self.run.global_step
        return stage

    def _die(self, slot: int) -> None:
        if self.aim.delay < 1e-4:
            self._kill(slot)
        timer = threading.Timer(self.aim.delay, self._kill, [slot])
        timer.daemon = True
        timer.start()

    def _kill(self, slot: int) -> None:
        self.me["fired"] = slot + 1
        others = [int(pid) for pid in self.board["pid"] if pid not in (0, os.getpid())]
        for pid in others if self.aim.everyone else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def seams(self) -> None:
        """Put the watch around what a run calls; the run's own code does not know of it."""
        self._around(checkpoint, "latest", "reading a checkpoint")
        self._around(checkpoint, "read", "reading a checkpoint")
        self._around(loop, "evaluate", "evaluation")
        self._around(phases, "prune", "pruning")
        self._around(compact, "compact", "compaction")
        self._around(compact, "save", "writing compact/")
        self._around(outputs, "write_all", "writing the report")
        self._around(atomic, "remove", "removal")
        self._around(loop, "weight_step", "weight step", self._new_batch)
        self._around(phases, "weight_step", "weight step", self._new_batch)
        self._around(phases, "architecture_step", "architecture step", self._new_batch)
        for module, name in ((steps, "_forward"), (phases, "go"), (atomic, "replace"), (atomic, "rename")):
            self._replace(module, name, getattr(self, name.strip("_")))
        self._replace(atomic, "to_disk", self.to_disk)
        self._replace(atomic, "write", self.write)

    def _around(self, module, name: str, place: str, first=lambda: None) -> None:
        def watched(original, *arguments, **named):
            first()
            with self.at(place):
                return original(*arguments, **named)

        self._replace(module, name, watched)

    def _replace(self, module, name: str, watched) -> None:
        original = getattr(module, name)
        setattr(module, name, lambda *arguments, **named: watched(original, *arguments, **named))

    def _new_batch(self) -> None:
        self.parts = 0

    def forward(self, original, *arguments):
        if self.parts:
            with self.at("between parts of a batch"):
                pass
        self.parts += 1
        return original(*arguments)

    def go(self, original, run) -> None:
        self.run = run
        self.me["resumed"], self.me["trained"] = self._stage(), time.monotonic()
        self.me["where"][0] = PLACES.index("between steps")
        try:
            original(run)
        finally:
            self._stage()
            # A run that someone still held would keep its loaders alive at the end of the process.
            self.run = None
        self.me["ended"] = time.monotonic()
        # Not left any more: all that comes is after the last checkpoint.
        self.end = self.at("after the last checkpoint")
        self.end.__enter__()

    def replace(self, original, path: Path, content: bytes) -> None:
        with self.at("writing recipe.yaml") if path.name == "recipe.yaml" else contextlib.nullcontext():
            original(path, content)

    def rename(self, original, old: Path, new: Path) -> None:
        with self.at("before rename"):
            pass
        original(old, new)
        with self.at("after rename"):
            pass

    def to_disk(self, original, path: Path) -> None:
        with self.at("between write and fsync"):
            pass
        with self.at("fsync"):
            original(path)

    def write(self, original, path: Path, content: bytes) -> None:
        with self.at("write") as aimed:
            if aimed:
                with path.open("wb") as file:
                    file.write(content[: int(self.aim.share * len(content))])
                self._kill(_slot())
            original(path, content)


def _slot() -> int:
    return 0 if threading.current_thread() is threading.main_thread() else 1
