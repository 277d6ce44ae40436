"""Fixtures that several rooms' tests share."""

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from faulty import FEW, samples, write_tar

from data_tools import make_shards

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with the shards of the demo."""
    folder = tmp_path_factory.mktemp("digits")
    make_shards.digits(folder)
    return folder


@pytest.fixture
def one_thread():
    """Small networks, and depthwise convolutions in float64, are many tiny operations, for which several threads only wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TrainCommand:
    """`python -m dnal_dist.train` in a process of its own, or under `accelerate launch` with several."""

    def start(self, *arguments: str, processes: int = 1, **environment: str) -> subprocess.Popen:
        """Started in a session of its own, so that a test can signal all of it without signalling itself."""
        launcher = []
        if processes > 1:
            launcher = ["accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml"]
            launcher += ["--num_processes", str(processes), "-m"]
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "dnal_dist.train", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str, processes: int = 1, timeout: float = 120, **environment: str):
        """The CompletedProcess of these arguments."""
        process = self.start(*arguments, processes=processes, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def train_command() -> TrainCommand:
    return TrainCommand()


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def train_here():
    """`python -m dnal_dist.train` with these arguments in the test's own process, which spares the seconds of importing torch."""
    import torch

    from dnal_dist import train

    set_num_threads = torch.set_num_threads

    def run(*arguments: str) -> Ended:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        threads, code, out, err = torch.get_num_threads(), 0, io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["train", *map(str, arguments)])
            patch.chdir(ROOT)
            # Pictures of 8x8 pixels give several threads nothing to do but to wait for one another.
            patch.setattr(torch, "set_num_threads", lambda _: set_num_threads(1))
            try:
                train.main()
            except SystemExit as ended:
                code = ended.code
            finally:
                set_num_threads(threads)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def folder(tmp_path):
    """A folder with shards of 16 samples each, train-0.tar and val-0.tar, without an index."""
    write_tar(tmp_path / "train-0.tar", samples())
    write_tar(tmp_path / "val-0.tar", samples())
    return tmp_path


@pytest.fixture
def train(train_here, folder):
    """The command, on the shards in `folder`, into the run folder `folder`/run."""

    def run(*changes: str, recipe: str | Path = "recipes/digits.yaml"):
        shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
        return train_here(recipe, *shards, *FEW, *changes)

    return run
