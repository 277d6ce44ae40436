"""Fixtures that several rooms' tests share."""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import forks
import gpus
import psutil
import pytest
from faulty import FEW, samples, write_tar
from filelock import FileLock
from ranks import Ranks
from runs import SHORT, arguments, family

from data_tools import make_shards

ROOT = Path(__file__).parent.parent

# Images of 8x8 pixels, small networks, and depthwise convolutions in float64, are many tiny operations, for which several threads
# only wait for one another. Set before anything has imported torch; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
gpus.hide()
# Of the many processes that tests start, the first compiles the package, and the others read its bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_xdist_auto_num_workers() -> int:
    """One more than this process has cores, since one worker mostly waits for SLURM: with another, all tests took a tenth more of
    the processors' time. Beyond 8 cores a worker's start takes longer than what is left to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) + 1


# Seconds of each group of tests, as `pytest --record-durations` found them.
DURATIONS = Path(__file__).parent / "durations.json"


def group_of(item: pytest.Item) -> str:
    """Tests of a group run one after the other in one worker: those of a backend, which share its ranks, and those of a file."""
    if mark := item.get_closest_marker("xdist_group"):
        return mark.args[0]
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if backend and (room := item.path.parent.name) in ("distributed", "gpu"):
        return f"gpu {backend}" if room == "gpu" else backend
    return item.path.relative_to(DURATIONS.parent).as_posix()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """A worker takes one group after the other. The longest come first: one taken last would be waited for by all."""
    # As a wrapper, before xdist's own hook, which comes before every other and reads the groups.
    known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (-known.get(groups[item], 0), groups[item]))
    return (yield)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each group to tests/durations.json")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--record-durations"):
        return
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                group = report.nodeid.rpartition("@")[2]
                seconds[group] = seconds.get(group, 0) + report.duration
    found = {group: round(spent) for group, spent in sorted(seconds.items(), key=lambda pair: -pair[1]) if spent >= 1}
    DURATIONS.write_text(json.dumps(found, indent=1) + "\n")


def freeze() -> None:
    """Leave what there is out of later collections. A run collects garbage before each of its phases, and would look through all
    that pytest and a hundred modules hold: a second each time, and a quarter of the processor time of all tests. What is garbage
    now, such as a stream whose loaders still run, would be frozen too and stay for ever."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    freeze()


def pytest_sessionfinish() -> None:
    # Or modules that keep count complain, at the end of the process, of what was left of them.
    gc.unfreeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """once(name, make): a path that make(path) fills, the first time that a test of any worker asks for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "once"
    folder.mkdir(exist_ok=True)

    def made(name: str, make) -> Path:
        path, done = folder / name, folder / f"{name}.done"
        with FileLock(folder / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return made


@pytest.fixture(scope="session")
def digits(once):
    """Folder with the shards of the demo, to be looked at only."""

    def make(folder: Path) -> None:
        folder.mkdir()
        make_shards.digits(folder)

    return once("digits", make)


@pytest.fixture(scope="session")
def forks_server():
    """Starts processes that need not import torch; see forks.py."""
    found = forks.Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def ranks(forks_server):
    """Processes under `accelerate launch` that take one job after the other; see ranks.py."""
    found = Ranks(lambda: {**os.environ, **forks_server.environment()})
    yield found
    found.close()


class TrainCommand:
    """`python -m dnal_dist.train` in a process of its own, or under `accelerate launch` with several."""

    def __init__(self, server: forks.Server):
        self.server = server

    def start(self, *arguments: str, processes: int = 1, forked: bool = False, **environment: str) -> forks.Fork:
        """Started in a session of its own, so that a test can signal all of it without signalling itself. The process that is
        started is a fork; those that a launcher starts are forks too if `forked`, or else import all by themselves."""
        words = ["dnal_dist.train", *arguments]
        if processes > 1:
            words = [*(forks.command("-m")[1:] if forked else ["-m"]), *words]
            words = ["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", processes, *words]
            words = ["accelerate.commands.launch", *words]
        more = self.server.environment() if forked else {}
        return self.server.start(["-m", *words], {**os.environ, **more, **environment}, ROOT)

    def __call__(self, *arguments: str, processes: int = 1, timeout: float = 300, **environment: str):
        """The CompletedProcess of these arguments. Its processes are forks, which have torch already."""
        process = self.start(*arguments, processes=processes, forked=True, **{"PYTHONFAULTHANDLER": "1", **environment})
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Each tells where it stands as it dies.
            for one in reversed(family(process)):
                with contextlib.suppress(psutil.Error):
                    one.send_signal(signal.SIGABRT)
            out, err = process.communicate(timeout=30)
            pytest.fail(f"not over after {timeout:g} s: {out[-2000:]}{err[-20000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def train_command(forks_server) -> TrainCommand:
    return TrainCommand(forks_server)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def train_here():
    """`python -m dnal_dist.train` with these arguments in the test's own process, which spares the seconds of importing torch.

    A short run spends half its time on drawing its report, so that it is only written for `report=True`.
    """
    import torch

    from dnal_dist import train
    from dnal_dist.report import outputs

    assert torch.get_num_threads() == 1, "torch was imported before OMP_NUM_THREADS was set"

    def run(*arguments: str, report: bool = False) -> Ended:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        code, out, err = 0, io.StringIO(), io.StringIO()
        freeze()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["train", *map(str, arguments)])
            if not report:
                patch.setattr(outputs, "write_all", lambda *_, **__: None)
            patch.chdir(ROOT)
            try:
                train.main()
            except SystemExit as ended:
                code = ended.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(train_here, digits, tmp_path_factory):
    """A finished short run with its report, to be looked at only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train_here(*arguments(digits, run, *SHORT), report=True).code == 0
    return run


@pytest.fixture
def short(finished, tmp_path):
    """A finished short run, to be done with as one likes."""
    return shutil.copytree(finished, tmp_path / "short")


@pytest.fixture
def folder(tmp_path):
    """A folder with shards of 16 samples each, train-0.tar and val-0.tar, without an index."""
    write_tar(tmp_path / "train-0.tar", samples())
    write_tar(tmp_path / "val-0.tar", samples())
    return tmp_path


@pytest.fixture
def train(train_here, folder):
    """The command, on the shards in `folder`, into the run folder `folder`/run."""

    def run(*changes: str, recipe: str | Path = "recipes/digits.yaml", report: bool = False):
        shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
        return train_here(recipe, *shards, *FEW, *changes, report=report)

    return run


@pytest.fixture
def case_of(digits, tmp_path):
    """A case of the demo on its shards, with changes to the recipe and facts of the launch."""
    # As late as torch in all tests.
    from dnal_dist import recipe
    from dnal_dist.doctor.case import Case

    made = []

    def make(*changes: str, **facts):
        shards = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path}/none/run"]
        made.append(Case(recipe.load("recipes/digits.yaml", [*shards, "tracking.tracker=none", *changes]), **facts))
        return made[-1]

    yield make
    for case in made:
        case.close()
