"""Files of a server on the loopback, processes that read them through a cache, and what errors of reading say."""

import hashlib
import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import FileServer

from dnal_dist.data import remote

SIZE = 100_000
SHARDS = {f"{number}.tar": random.Random(number).randbytes(SIZE) for number in range(6)}
BODY = random.Random(0).randbytes(300_000)
SECRET = "wJalrXUtnFEMI-not-for-eyes"
S3_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


def shard(server: FileServer, number: int) -> tuple[str, int, str]:
    body = SHARDS[f"{number}.tar"]
    return f"{server.url}/{number}.tar", len(body), hashlib.sha256(body).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.is_file())


def until(condition: Callable[[], bool]) -> None:
    """The test's own limit ends a wait in vain."""
    while not condition():
        time.sleep(0.01)


STARTED: list[subprocess.Popen] = []
"""What `start` has started, for a fixture to end."""


def start(server: FileServer, folder: Path, program: str, **more) -> subprocess.Popen:
    """A process that runs `program` with `cache` and `shards`; more: names that it sees too."""
    given = {"shards": [shard(server, number) for number in range(len(SHARDS))], "folder": str(folder), "limit": 10**9, **more}
    head = f"""
import hashlib, json, os, random, sys, time
from pathlib import Path
from dnal_dist.data.prefetch import Prefetcher, Need
from dnal_dist.data.cache import Cache
globals().update(json.loads({json.dumps(given)!r}))
cache = Cache(Path(folder), limit)
def digest(descriptor):
    with open(descriptor, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen([sys.executable, "-c", head + program], text=True, start_new_session=True, **pipes))
    return STARTED[-1]


def ended_well(process: subprocess.Popen) -> str:
    out, err = process.communicate()
    assert process.returncode == 0 and not err, err
    return out


def copied(tmp_path, url: str, size: int) -> bytes:
    path = tmp_path / "copy"
    path.write_bytes(bytes(size))
    remote.fetch(url, size, path)
    return path.read_bytes()


def s3_at(server: FileServer, monkeypatch) -> None:
    """The HTTP server with its faults as an S3 endpoint: reading an object is the same there."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")
    for name, value in (("ACCESS_KEY_ID", "AKIAEXAMPLE"), ("SECRET_ACCESS_KEY", SECRET), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", server.url)
    # fsspec reads its environment once, when it is imported.
    from fsspec.config import conf, set_conf_env

    monkeypatch.setitem(conf, "s3", {})
    set_conf_env(conf)
    server.files = {"shards/a.tar": BODY}


def words_of(error: BaseException) -> str:
    """Everything that an exception and those chained to it can show."""
    texts, seen = [], []
    while error is not None and error not in seen:
        seen.append(error)
        texts += [*traceback.format_exception(error, chain=True), repr(error), str(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
