"""One attempt at a run: its processes started, killed as asked, stopped as a launcher stops them, and what they leave behind."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from dnal_dist.chaos import instrument
from dnal_dist.chaos.instrument import Aim

# What torchrun gives the others to stop in, when one process has died, before it kills them.
GRACE = 15.0
# How often a launcher looks whether all are alive.
LOOK_EVERY = 0.05
# How often to look who is there.
SEE_EVERY = 0.5
# How long the loaders of a process that was killed may take to notice.
NOTICE = 20.0
SHARED = Path("/dev/shm")
# Folders that torch's launcher leaves, with its error files, whenever a process of its has failed.
KEPT = "torchelastic_"
# Folders that a training process has for temporary files; the next start of the run removes what a killed one left.
REMOVED_NEXT = "dnal_dist-"
_BECOME_SUBREAPER = 36


@dataclass(frozen=True)
class ByClock:
    """A kill so many seconds after the start; of `everyone`, or of `rank` alone."""

    rank: int
    seconds: float
    everyone: bool


@dataclass(frozen=True)
class Train:
    """What is run. config: of `accelerate launch`; None: the ranks are started directly, on DDP."""

    recipe: str
    overrides: tuple[str, ...]
    config: str | None


class Ended(NamedTuple):
    """How an attempt ended."""

    killed: bool
    """Whether the kill that was asked for happened."""
    forced: int
    """Processes that had to be killed since they did not stop within GRACE."""
    timed_out: bool
    stop_seconds: float
    """From the first death to the last."""
    begun: float
    """On the machine's monotonic clock, as the times on the board."""
    seconds: float
    board: np.ndarray
    """See victim.new_board."""
    codes: list[int]
    """Exit codes of what was started, negative for signals."""
    left: dict[str, str]
    """What was left behind, of each kind: processes, shared memory, temporary files."""
    lines: list[str]
    """The last ones of the output."""


class Watched(NamedTuple):
    """The first part of Ended."""

    killed: bool
    forced: int
    timed_out: bool
    stop_seconds: float


def become_reaper() -> None:
    """Have processes that lose their parent become children of this one, so that it sees them. On other systems than Linux, which
    have no such thing, orphans are not seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)


def attempt(train: Train, output: Path, work: Path, ranks: int, kill: Aim | ByClock | None, limit: float) -> Ended:
    """Run `train` into `output` with `ranks` processes, and kill it as `kill` says. work: a folder, to be made, for what belongs to
    the attempt. limit: seconds after which it counts as stuck."""
    temporary, orders, log = temporary_of(output), work / "orders.json", work / "log.txt"
    temporary.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    board = instrument.new_board(work / "board", ranks)
    instrument.write_orders(orders, work / "board", kill if isinstance(kill, Aim) else None)
    before = _shared()
    begun = time.monotonic()
    port, family = _free_port(), set()
    started = _start(train, [*train.overrides, f"output={output}"], orders, ranks, port, temporary, log)
    watched = _watch(started, board, kill, limit, family)
    seconds = time.monotonic() - begun
    allowed = (KEPT, REMOVED_NEXT) if watched.killed or watched.forced or watched.timed_out else (KEPT,)
    left = {
        "processes": _processes_left(family),
        "shared memory": _shared_left(before, {*family, port}),
        "temporary files": ", ".join(path.name for path in sorted(temporary.iterdir()) if not path.name.startswith(allowed)),
    }
    lines = log.read_text(errors="replace").splitlines()[-12:]
    codes = [_code(one) for one in started]
    return Ended(*watched, begun, seconds, np.array(board), codes, left, lines)


def temporary_of(output: Path) -> Path:
    """The folder for temporary files, TMPDIR, of all starts of the run in `output`."""
    return output.with_name(f"tmp-{output.name}")


def isolated(what, *arguments) -> int:
    """The exit code of calling `what` in a process of its own, so that this one, which forks, never computes."""
    process = multiprocessing.get_context("fork").Process(target=what, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _start(train: Train, overrides: list[str], orders: Path, ranks: int, port: int, temporary: Path, log: Path) -> list:
    arguments = [train.recipe, *overrides]
    environment = {"TMPDIR": str(temporary)}
    if train.config is not None:
        launch = ["accelerate.commands.launch", "--config_file", train.config, "--num_processes", str(ranks)]
        launch += ["--main_process_port", str(port)]
        return [_spawn([*launch, "-m", "dnal_dist.chaos", "--victim", str(orders), *arguments], environment, log)]
    environments = [environment]
    if ranks > 1:
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [environment | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(ranks)]
    if threading.active_count() > 1 or not hasattr(os, "fork"):
        return [_spawn(["dnal_dist.chaos", "--victim", str(orders), *arguments], one, log) for one in environments]
    # A fork spares the seconds of importing torch. It is as good as a new process as long as nothing was computed before it.
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_forked, args=(orders, arguments, one, log)) for one in environments]
    for process in started:
        process.start()
    return started


def _spawn(module: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _forked(orders: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    tempfile.tempdir = None
    with log.open("ab") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    instrument.main(orders, arguments)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _code(started) -> int | None:
    return started.poll() if isinstance(started, subprocess.Popen) else started.exitcode


def _watch(started: list, board: np.ndarray, kill: Aim | ByClock | None, limit: float, family: set[int]) -> Watched:
    """Wait for the end of all, killing by the clock and stopping those that are left when one has died. family: takes the numbers
    of all processes that are seen."""
    begun, died, killed, forced, timed_out = time.monotonic(), None, False, 0, False
    pending, asked, seen = isinstance(kill, ByClock), False, 0.0
    while alive := [one for one in started if _code(one) is None]:
        now = time.monotonic()
        if now - seen > SEE_EVERY:
            family |= {child.pid for child in psutil.Process().children(recursive=True)}
            seen = now
        if pending and now - begun >= kill.seconds and (pids := _pids(started, board, kill)):
            killed, pending = _kill(pids), False
        if died is None and (len(alive) < len(started) or killed):
            died = now
        if len(alive) < len(started) and not asked and any(_code(one) for one in started):
            asked = True
            for one in alive:
                one.terminate()
        if timed_out := now - begun > limit:
            _kill([one.pid for one in alive])
        elif asked and died is not None and now - died > GRACE:
            forced += len(alive)
            _kill([one.pid for one in alive])
            for one in alive:
                _wait(one)
        time.sleep(min(LOOK_EVERY, max(0.0005, kill.seconds - now + begun)) if pending else LOOK_EVERY)
    if killed and not isinstance(started[0], subprocess.Popen):
        # It may have come to its end by itself between the look and the kill.
        killed = any(_code(one) == -signal.SIGKILL for one in (started if kill.everyone else [started[kill.rank]]))
    killed = killed or bool(board["fired"].any())
    return Watched(killed, forced, timed_out, 0.0 if died is None else time.monotonic() - died)


def _wait(started) -> None:
    started.wait() if isinstance(started, subprocess.Popen) else started.join()


def _pids(started: list, board: np.ndarray, kill: ByClock) -> list[int]:
    """Of whom is to be killed; under a launcher they are known as soon as they have told."""
    pids = [int(pid) for pid in board["pid"]] if isinstance(started[0], subprocess.Popen) else [one.pid for one in started]
    return [] if 0 in pids else pids if kill.everyone else [pids[kill.rank]]


def _kill(pids: list[int]) -> bool:
    """SIGKILL; whether there was anyone to be killed."""
    found = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            found = True
    return found


def _processes_left(family: set[int]) -> str:
    """What still runs after NOTICE seconds, of all that this process or one of them started; it is killed. family: takes what it
    sees."""
    deadline = time.monotonic() + NOTICE
    while True:
        alive = []
        for child in psutil.Process().children(recursive=True):
            family.add(child.pid)
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)
                else:
                    alive.append(child)
        if not alive or time.monotonic() > deadline:
            break
        time.sleep(LOOK_EVERY)
    told = []
    for child in alive:
        with contextlib.suppress(psutil.Error):
            told.append(f"{child.pid} ({' '.join(child.cmdline())[:80]})")
            child.kill()
            child.wait(5)
    return ", ".join(told)


def kill_family() -> None:
    """Kill all that this process or one of them started, and wait until it is gone, NOTICE seconds at most."""
    deadline = time.monotonic() + NOTICE
    # One that is killed may have started another since the look.
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=1)


def _shared() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def _shared_left(before: set[str], numbers: set[int]) -> str:
    """Names in /dev/shm that are new and tell one of `numbers`, as those do that torch and DeepSpeed give. Those of other programs,
    which come and go meanwhile, tell others."""
    new = sorted(_shared() - before)
    return ", ".join(name for name in new if numbers & set(map(int, re.findall(r"\d{1,18}", name))))
