"""Training on machines with long paths, few cores, few open files, or odd shards: it works, or is refused in one line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import FEW, records, samples, write_tar

ROOT = Path(__file__).parents[2]


def words(folder: Path, *changes: str) -> list[str]:
    """Of the command, on the shards in `folder`."""
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    return ["recipes/digits.yaml", *shards, *FEW, *changes]


@pytest.fixture
def forked(forks_server, folder):
    """The command in a fork, in which `before` is executed first."""

    def run(*changes: str, before: str, **environment: str) -> subprocess.CompletedProcess:
        program = folder / "program.py"
        program.write_text(f"{before}\nfrom dnal_dist import train\ntrain.main()\n")
        process = forks_server.start([program, *words(folder, *changes)], {**os.environ, **environment}, ROOT)
        out, err = process.communicate(200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def test_a_long_tmpdir_and_more_loaders_than_cores_are_settled_without_a_word(folder, forked):
    """Sockets have names of at most 107 bytes, and torch warns of loaders that are more than the cores."""
    long = folder / ("t" * 71)
    long.mkdir()
    # The server of the forks may know its own folder for temporary files already.
    before = "import os, tempfile\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\ntempfile.tempdir = None"
    ended = forked("data.workers=3", before=before, TMPDIR=str(long))
    assert (ended.returncode, ended.stderr) == (0, "") and records(folder, "end")
    assert not [one for one in records(folder, "warning") if "workers" in one["message"]]
    assert not list(long.iterdir())


def test_few_open_files_and_many_shards_train_with_a_warning(folder, forked):
    for number in range(100):
        write_tar(folder / f"train-{number:02}.tar", samples(1))
    before = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    ended = forked("data.workers=2", before=before)
    assert ended.returncode == 0 and records(folder, "end"), ended.stderr
    messages = [one["message"] for one in records(folder, "warning")]
    assert "key 'data.workers': 0 of 2 loaders, since a process may open 64 files at a time; raise ulimit -n" in messages


def test_too_few_open_files_are_named(folder):
    """Whether the run still trains depends on what Python and torch hold open, which they import here."""
    command = [sys.executable, "-m", "dnal_dist.train", *words(folder, "data.workers=2")]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))  # noqa: E731
    ended = subprocess.run(command, preexec_fn=few, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode in (0, 2) and "Traceback" not in ended.stderr, ended.stderr
    assert "ulimit -n" in ended.stdout + ended.stderr
