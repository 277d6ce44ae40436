"""Servers of shards on the loopback."""

import os
import signal
from contextlib import suppress

import pytest
from remote_files import BODY, SECRET, SHARDS, STARTED
from servers import FileServer, s3_server, without_proxies

from dnal_dist.data import remote


@pytest.fixture
def direct(monkeypatch):
    """The loopback is reached without a proxy and with short waits; nothing was read before."""
    # Before a file system is made: it takes its settings from the environment then.
    without_proxies(monkeypatch)
    remote.retries.clear()


@pytest.fixture
def server(direct):
    """A server of SHARDS, and of BODY as a.tar. The processes that a test starts end with it."""
    with FileServer() as server:
        server.files = {**SHARDS, "a.tar": BODY}
        yield server
    while STARTED:
        # Each is a group of its own, with the processes it forked.
        with suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


@pytest.fixture
def s3(direct, monkeypatch):
    """The url of an S3 endpoint and its client, with shards in a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")
    with s3_server(monkeypatch, SECRET) as client:
        client.create_bucket(Bucket="shards")
        for number in range(3):
            client.put_object(Bucket="shards", Key=f"set/train-{number:06d}.tar", Body=BODY[number:])
        client.put_object(Bucket="shards", Key="set/index.json", Body=b"{}")
        yield client
