"""Loader processes: how many, under which limits, and how their faults reach the process that trains."""

import itertools
import os
import resource
import subprocess
import sys
import tempfile

import pytest
from faulty import png, write_tar

from dnal_dist.common.errors import InputError
from dnal_dist.data import loader
from dnal_dist.data.files import ShardFiles
from dnal_dist.data.pipeline import stream

FEW = {"image_size": 8, "global_batch": 4}


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        write_tar(
            tmp_path / f"s-{number}.tar", {f"{i}.{kind}": one for i in range(8) for kind, one in (("png", png()), ("cls", b"1"))}
        )
    return f"{tmp_path}/s-*.tar"


@pytest.fixture
def run(forks_server, shards, tmp_path):
    """A program in a fork: its exit code, output and errors."""

    def ended(program: str, **environment: str) -> tuple[int, str, str]:
        # The server may know its own folder for temporary files already.
        head = f"import tempfile\ntempfile.tempdir = None\nshards, few = {shards!r}, {FEW!r}\n"
        (tmp_path / "program.py").write_text(head + "from dnal_dist.data.pipeline import stream\n" + program)
        process = forks_server.start([tmp_path / "program.py"], {**os.environ, **environment}, tmp_path)
        out, err = process.communicate(200)
        return process.returncode, out, err

    return ended


def test_loaders_are_no_more_than_cores_and_open_files_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    assert loader.settled(64) == (4, "") and loader.settled(2) == (2, "") and loader.settled(0) == (0, "")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    few, note = loader.settled(8)
    assert few == 0 and "0 of 8 loaders, since a process may open 64 files" in note
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert loader.settled(64) == (4, "")


def test_shards_are_closed_where_no_more_files_may_be_open(tmp_path):
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    files = ShardFiles(lambda shard: os.open(tmp_path / str(shard), os.O_RDONLY))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, before[1]))
        assert [files.read(shard, 0, 1)[0] for shard in (*range(40), *range(40))] == [*range(40)] * 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        files.close()


def test_a_long_tmpdir_does_not_keep_loaders_from_their_work(run, tmp_path):
    long = tmp_path / ("t" * 100)
    long.mkdir()
    assert run("print(len(list(stream(shards, **few, workers=1).slice(4))))", TMPDIR=str(long)) == (0, "4\n", "")


def test_a_folder_for_sockets_is_short_or_refused(monkeypatch):
    assert loader.socket_folder() == tempfile.gettempdir() or len(loader.socket_folder()) <= loader.LONGEST_FOLDER
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 100)
    assert loader.socket_folder() == "/tmp"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"TMPDIR=/t+: its path has more than 64 bytes.*; set TMPDIR to a shorter one"):
        loader.socket_folder()


def test_a_batch_that_cannot_be_handed_over_ends_its_loader(run):
    """The feeder of a queue drops what it cannot send, and would be waited for without end."""
    program = """
import webdataset
def unsendable(batch):
    return batch._replace(keys=[lambda: None])
list(stream(shards, **few, workers=1, stages=[webdataset.map(unsendable)]).slice(2))
"""
    code, _, err = run(program)
    assert code == 1 and "DataLoader worker" in err
    assert "warning: key 'data.workers': a loader process cannot hand over a batch (" in err


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(24, "Too many open files"), "may open no more files"),
        (
            RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
            "shared memory is full; enlarge /dev/shm",
        ),
    ],
)
def test_a_loaders_missing_resource_is_one_line(error, message):
    class Tensor:
        def share_memory_(self):
            raise error

    with pytest.raises(InputError, match=f"^key 'data.workers': .*{message}"):
        loader.shared(Tensor())


def test_loaders_that_are_ended_with_their_process_raise_nothing_there(shards):
    """Torch raises an error in the main process, wherever it is, when a loader dies."""
    program = f"""
import atexit, sys, time
atexit.register(time.sleep, 1)
from dnal_dist.data.pipeline import stream
batches = iter(stream({shards!r}, **{FEW!r}, workers=1))
next(batches)
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_wrong_keys_of_a_stream_are_one_line(shards):
    with pytest.raises(InputError, match=r"key 'image_size': .*; unknown key 'wokers' \(did you mean 'workers'\?\)") as error:
        stream(shards, 0, 4, wokers=2)
    assert "\n" not in str(error.value)
    assert len(list(itertools.islice(stream(shards, **FEW, augmentation={"kind": "pad_crop"}), 2))) == 2
