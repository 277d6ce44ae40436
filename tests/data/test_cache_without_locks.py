"""The cache of shards on a file system without locks."""

import hashlib
import json
import random
import subprocess
import sys

import pytest
from servers import FileServer, without_proxies

from dnal_dist.data.cache import Cache

SHARDS = {f"{number}.tar": random.Random(number).randbytes(50_000) for number in range(4)}
PROGRAM = """
import fcntl, hashlib, json, os, sys
from pathlib import Path
def refuse(*_):
    raise OSError(int(sys.argv[1]), "No locks")
fcntl.flock = refuse
from dnal_dist.data.cache import Cache
cache = Cache(Path(sys.argv[2]), 10**9)
for url, size, digest in json.loads(sys.argv[3]):
    with open(cache.open(url, size, digest), "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == digest
print(cache.note)
"""


@pytest.mark.parametrize("number", [37, 95, 524])
def test_processes_share_the_copies_with_a_warning(tmp_path, monkeypatch, number):
    without_proxies(monkeypatch)
    with FileServer() as server:
        server.files, server.latency = dict(SHARDS), 0.05
        wanted = [(f"{server.url}/{name}", len(body), hashlib.sha256(body).hexdigest()) for name, body in SHARDS.items()]
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(number), str(tmp_path / "copies"), json.dumps(wanted)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for process in started:
            out, err = process.communicate(timeout=100)
            assert (process.returncode, err) == (0, "")
            assert "copies: its file system has no locks (No locks), so files stand for them" in out
        assert sorted(path for path, _ in server.requests) == sorted(SHARDS)
        assert not [*(tmp_path / "copies" / "locks").glob("*.held")]


def test_no_warning_comes_where_there_are_locks(tmp_path):
    assert Cache(tmp_path, 10).note == ""
