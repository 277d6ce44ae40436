"""Training on machines with long paths, few cores, few open files, or odd shards: it works, or is refused in one line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from faulty import FEW, records, samples, write_tar

ROOT = Path(__file__).parents[2]


def trained(folder: Path, *changes: str, before=None, **environment: str) -> subprocess.CompletedProcess:
    """`python -m dnal_dist.train` on the shards in `folder` in a process of its own, in which `before()` is called first."""
    shards = (f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar", f"output={folder}/run")
    command = [sys.executable, "-m", "dnal_dist.train", "recipes/digits.yaml", *shards, *FEW, *changes]
    settings = {"cwd": ROOT, "env": {**os.environ, **environment}, "capture_output": True, "text": True, "timeout": 200}
    return subprocess.run(command, preexec_fn=before, **settings)


def test_a_long_tmpdir_and_more_loaders_than_cores_are_settled_without_a_word(folder):
    """Sockets have names of at most 107 bytes, and torch warns of loaders that are more than the cores."""
    long = folder / ("t" * 71)
    long.mkdir()
    one_core = {min(os.sched_getaffinity(0))}
    ended = trained(folder, "data.workers=3", before=lambda: os.sched_setaffinity(0, one_core), TMPDIR=str(long))
    assert (ended.returncode, ended.stderr) == (0, "") and records(folder, "end")
    assert not [one for one in records(folder, "warning") if "workers" in one["message"]]
    assert not list(long.iterdir())


def test_few_open_files_and_many_shards_train_with_a_warning(folder):
    for number in range(100):
        write_tar(folder / f"train-{number:02}.tar", samples(1))
    ended = trained(folder, "data.workers=2", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert ended.returncode == 0 and records(folder, "end"), ended.stderr
    messages = [one["message"] for one in records(folder, "warning")]
    assert "key 'data.workers': 0 of 2 loaders, since a process may open 64 files at a time; raise ulimit -n" in messages


def test_too_few_open_files_are_named(folder):
    """Whether the run still trains depends on what Python and torch hold open."""
    ended = trained(folder, "data.workers=2", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)))
    assert ended.returncode in (0, 2) and "Traceback" not in ended.stderr, ended.stderr
    assert "ulimit -n" in ended.stdout + ended.stderr
