"""One attempt at a run: start its processes, kill them as planned, stop the others as a launcher does, and list leftovers."""

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from dnal_dist.chaos import instrument
from dnal_dist.chaos.instrument import Aim

# Seconds that torchrun gives the other processes to stop after one has died, before it kills them.
GRACE = 15.0
# Seconds between two polls of the started processes, and of their descendants.
POLL_EVERY, POLL_FAMILY_EVERY = 0.05, 0.5
# Seconds that the loaders of a killed process may take to notice.
NOTICE = 20.0
SHARED = Path("/dev/shm")
# Folders with error files, which torch's launcher leaves whenever one of its processes has failed.
KEPT = "torchelastic_"
# A training process's folders for temporary files; after a kill, the next start of the run removes them.
REMOVED_NEXT = "dnal_dist-"
_BECOME_SUBREAPER = 36


@dataclass(frozen=True)
class ByClock:
    """A kill `seconds` after the start, of `everyone` or of `rank` alone."""

    rank: int
    seconds: float
    everyone: bool


@dataclass(frozen=True)
class Train:
    """The command under test. config: for `accelerate launch`; None: the ranks are started directly, on DDP."""

    recipe: str
    overrides: tuple[str, ...]
    config: Path | None


@dataclass
class Ended:
    """The end of an attempt."""

    began: float
    """On the machine's monotonic clock, as the times on the board."""
    killed: bool = False
    """Whether the planned kill happened."""
    forced: int = 0
    """Processes that had to be killed since they did not stop within GRACE."""
    timed_out: bool = False
    stop_seconds: float = 0.0
    """From the first death to the last."""
    seconds: float = 0.0
    board: np.ndarray | None = None
    """See instrument.new_board."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the started processes, negative for signals."""
    left: dict[str, str] = field(default_factory=dict)
    """Leftovers of each kind: processes, shared memory, temporary files."""
    lines: list[str] = field(default_factory=list)
    """The last lines of the output."""


def become_reaper() -> None:
    """Become the parent of orphaned descendants, so that they are seen. Linux only; elsewhere orphans are not seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)


def attempt(train: Train, output: Path, work: Path, ranks: int, kill: Aim | ByClock | None, limit: float) -> Ended:
    """Run `train` into `output` with `ranks` processes and carry out `kill`. work: a new folder for the attempt's own files. limit:
    seconds after which the attempt counts as stuck."""
    temporary, orders, log = temporary_of(output), work / "orders.json", work / "log.txt"
    temporary.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    board = instrument.new_board(work / "board", ranks)
    instrument.write_orders(orders, work / "board", kill if isinstance(kill, Aim) else None)
    before, ended = _shared(), Ended(time.monotonic())
    port, family = _free_port(), set()
    started = _start(train, [*train.overrides, f"output={output}"], orders, ranks, port, temporary, log)
    _watch(ended, started, board, kill, limit, family)
    ended.seconds = time.monotonic() - ended.began
    allowed = (KEPT, REMOVED_NEXT) if ended.killed or ended.forced or ended.timed_out else (KEPT,)
    ended.left = {
        "processes": _processes_left(family),
        "shared memory": _shared_left(before, {*family, port}),
        "temporary files": ", ".join(path.name for path in sorted(temporary.iterdir()) if not path.name.startswith(allowed)),
    }
    ended.lines = log.read_text(errors="replace").splitlines()[-12:]
    ended.codes, ended.board = [_code(one) for one in started], np.array(board)
    return ended


def temporary_of(output: Path) -> Path:
    """The folder for temporary files, TMPDIR, of all starts of the run in `output`."""
    return output.with_name(f"tmp-{output.name}")


def isolated(what: Callable, *arguments) -> int:
    """Exit code of calling `what` in a process of its own: this one forks, so it must never compute."""
    process = multiprocessing.get_context("fork").Process(target=what, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _start(train: Train, overrides: list[str], orders: Path, ranks: int, port: int, temporary: Path, log: Path) -> list:
    arguments = [train.recipe, *overrides]
    environment = {"TMPDIR": str(temporary)}
    if train.config is not None:
        launch = ["accelerate.commands.launch", "--config_file", str(train.config), "--num_processes", str(ranks)]
        launch += ["--main_process_port", str(port)]
        return [_spawn([*launch, "-m", "dnal_dist.chaos", "--instrument", str(orders), *arguments], environment, log)]
    environments = [environment]
    if ranks > 1:
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [environment | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(ranks)]
    if threading.active_count() > 1 or not hasattr(os, "fork"):
        return [_spawn(["dnal_dist.chaos", "--instrument", str(orders), *arguments], one, log) for one in environments]
    # A fork saves importing torch. It is as good as a new process as long as nothing was computed before it.
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


def _watch(ended: Ended, started: list, board: np.ndarray, kill: Aim | ByClock | None, limit: float, family: set[int]) -> None:
    """Wait for all to end; kill by the clock, and stop the others when one has died. family: receives the ids of all processes
    seen."""
    died, pending, stopping, polled = None, isinstance(kill, ByClock), False, 0.0
    while alive := [one for one in started if _code(one) is None]:
        now = time.monotonic()
        if now - polled > POLL_FAMILY_EVERY:
            family |= {child.pid for child in psutil.Process().children(recursive=True)}
            polled = now
        if pending and now - ended.began >= kill.seconds and (pids := _pids(started, board, kill)):
            ended.killed, pending = _kill(pids), False
        if died is None and (len(alive) < len(started) or ended.killed):
            died = now
        if len(alive) < len(started) and not stopping and any(_code(one) for one in started):
            stopping = True
            for one in alive:
                one.terminate()
        ended.timed_out = now - ended.began > limit
        if ended.timed_out:
            _kill([one.pid for one in alive])
        elif stopping and died is not None and now - died > GRACE:
            ended.forced += len(alive)
            _kill([one.pid for one in alive])
            for one in alive:
                one.wait() if isinstance(one, subprocess.Popen) else one.join()
        time.sleep(min(POLL_EVERY, max(0.0005, kill.seconds - now + ended.began)) if pending else POLL_EVERY)
    if ended.killed and not isinstance(started[0], subprocess.Popen):
        # It may have ended by itself between the poll and the kill.
        ended.killed = any(_code(one) == -signal.SIGKILL for one in (started if kill.everyone else [started[kill.rank]]))
    ended.killed = ended.killed or bool(board["fired"].any())
    ended.stop_seconds = 0.0 if died is None else time.monotonic() - died


def _pids(started: list, board: np.ndarray, kill: ByClock) -> list[int]:
    """Ids of the processes to kill; under a launcher they are known once each has written to the board."""
    pids = [int(pid) for pid in board["pid"]] if isinstance(started[0], subprocess.Popen) else [one.pid for one in started]
    return [] if 0 in pids else pids if kill.everyone else [pids[kill.rank]]


def _kill(pids: list[int]) -> bool:
    """Send SIGKILL; whether any of the processes was there."""
    found = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            found = True
    return found


def _processes_left(family: set[int]) -> str:
    """Descendants of this process that still run after NOTICE seconds; they are killed. family: receives their ids."""
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
        time.sleep(POLL_EVERY)
    left = []
    for child in alive:
        with contextlib.suppress(psutil.Error):
            left.append(f"{child.pid} ({' '.join(child.cmdline())[:80]})")
            child.kill()
            child.wait(5)
    return ", ".join(left)


def kill_family() -> None:
    """Kill all descendants of this process and wait for their end, NOTICE seconds at most."""
    deadline = time.monotonic() + NOTICE
    # A killed one may have started another since the poll.
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=1)


def _shared() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def _shared_left(before: set[str], numbers: set[int]) -> str:
    """New names in /dev/shm that contain one of `numbers`, as torch's and DeepSpeed's do. Other programs' names contain others."""
    new = sorted(_shared() - before)
    return ", ".join(name for name in new if numbers & set(map(int, re.findall(r"\d{1,18}", name))))
