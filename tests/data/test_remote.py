"""Remote files from a real HTTP server with faults, on the loopback: in pieces, with retries."""

import hashlib
import json
import os
import subprocess
import sys

import fsspec.config
import pytest
from remote_files import BODY, copied

from dnal_dist.data import http, remote
from dnal_dist.data.remote import RemoteError


def test_http_cannot_be_listed(server):
    with pytest.raises(ValueError, match="cannot list"):
        remote.glob(f"{server.url}/*.tar")


# HTTP: whole files, parts, faults
def test_whole_and_part(server):
    url = f"{server.url}/a.tar"
    assert remote.read(url) == BODY
    assert remote.read(url, 1000, 2024) == BODY[1000:2024]
    assert server.requests == [("a.tar", None), ("a.tar", "bytes=1000-2023")]
    assert not remote.retries


def test_a_file_comes_in_parallel_pieces(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY
    assert len(server.requests) == 5 and server.sent["a.tar"] == len(BODY)


def test_a_server_without_ranges_sends_the_whole_file_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    server.ranges = False
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY
    assert len(server.requests) == 1
    assert remote.read(f"{server.url}/a.tar", 5, 10) == BODY[5:10]


def test_a_server_that_stops_serving_ranges_is_read_right(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    server.files["b.tar"] = BODY[::-1]
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY
    server.ranges = False
    assert copied(tmp_path, f"{server.url}/b.tar", len(BODY)) == BODY[::-1]


@pytest.mark.parametrize("status", [503, 500, 502, 429, 408])
def test_transient_errors_are_retried(server, status):
    server.statuses = [status] * (remote.TRIES - 1)
    assert remote.read(f"{server.url}/a.tar") == BODY
    assert remote.retries == {f"{server.url}/a.tar": remote.TRIES - 1}


def test_retries_are_limited(server):
    server.statuses = [503] * 100
    with pytest.raises(RemoteError, match=r"a\.tar: .*HTTP 503 Service Unavailable.*given up after 8 tries"):
        remote.read(f"{server.url}/a.tar", 0, 10)
    assert len(server.requests) == 8


@pytest.mark.parametrize(
    "status, text", [(404, "404 Not Found"), (403, "403 Forbidden.*netrc"), (401, "401 .*netrc"), (410, "410 Gone")]
)
def test_permanent_errors_are_not_retried(server, status, text):
    server.statuses = [status]
    with pytest.raises(RemoteError, match=text):
        remote.read(f"{server.url}/a.tar")
    assert len(server.requests) == 1 and not remote.retries


def test_a_dropped_connection_repeats_only_its_own_bytes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    server.cut_after, server.cuts = 50_000, 3
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY
    assert sum(remote.retries.values()) == 3
    assert server.sent["a.tar"] <= len(BODY) + 3 * 50_000


def test_a_server_that_drops_every_long_answer_is_read_in_smaller_pieces(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SMALLEST_PIECE", 1 << 10)
    server.cut_after, server.cuts = 20_000, 10**9
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY


def test_a_short_body_without_an_error_is_retried(server, tmp_path):
    server.short = 2
    assert copied(tmp_path, f"{server.url}/a.tar", len(BODY)) == BODY
    assert sum(remote.retries.values()) == 2


def test_a_stalled_answer_is_retried(server, monkeypatch):
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)
    server.stalls = 2
    assert remote.read(f"{server.url}/a.tar", 0, 1000) == BODY[:1000]
    assert sum(remote.retries.values()) >= 2


def test_a_slow_answer_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(http, "READ_TIMEOUT", 2.0)
    server.trickle = 0.15
    assert remote.read(f"{server.url}/a.tar") == BODY
    assert len(server.requests) == 1


def test_a_missing_server_is_named(server, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    server.__exit__()
    with pytest.raises(RemoteError, match=r"Connection refused.*given up after 2 tries"):
        remote.read(f"{server.url}/a.tar")
    with pytest.raises(RemoteError, match="no such host"):
        remote.read("http://nowhere.invalid/a.tar")


def test_a_part_beyond_the_end_is_not_retried(server):
    with pytest.raises(RemoteError, match="HTTP 416"):
        remote.read(f"{server.url}/a.tar", len(BODY), len(BODY) + 10)
    assert len(server.requests) == 1


# gs
def test_gs_lists_and_reads_from_a_stand_in(server, monkeypatch):
    """Google's own server is never asked: the paths here are those of its JSON interface."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e '.[gs]'")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    item = {"name": "set/a.tar", "bucket": "shards", "size": str(len(BODY))}
    listing = json.dumps({"items": [item]}).encode()
    server.files = {"storage/v1/b/shards/o": listing, "download/storage/v1/b/shards/o/set%2Fa.tar": BODY}
    assert remote.glob("gs://shards/set/*.tar") == ["gs://shards/set/a.tar"]
    server.statuses = [503]
    assert remote.read("gs://shards/set/a.tar", 3, 2000) == BODY[3:2000]
    with pytest.raises(RemoteError, match=r"gs://shards/none\.tar: .*404"):
        remote.read("gs://shards/none.tar", 0, 10)


# Forks
def test_a_forked_process_reads_with_connections_of_its_own(server):
    url = f"{server.url}/a.tar"
    program = f"""
import hashlib, os
from dnal_dist.data import http, remote
before = remote.read({url!r})
child = os.fork()
if not child:
    os._exit(0 if remote.read({url!r}) == before else 1)
assert os.waitpid(child, 0)[1] == 0
assert remote.read({url!r}, 5, 10) == before[5:10]
print(hashlib.sha256(before).hexdigest())
"""
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=300)
    assert ended.stdout.strip() == hashlib.sha256(BODY).hexdigest(), ended.stderr
    assert not ended.stderr
