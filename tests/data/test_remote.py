"""Remote files from a real HTTP server with faults and from moto's S3 server, both on the loopback."""

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import traceback

import fsspec.config
import pytest
from servers import FileServer, s3_server, without_proxies

from dnal_dist.common.errors import InputError
from dnal_dist.data import http, remote
from dnal_dist.data.remote import RemoteError

BODY = random.Random(0).randbytes(300_000)
SECRET = "wJalrXUtnFEMI-not-for-eyes"


@pytest.fixture(autouse=True)
def quick_and_fresh(monkeypatch):
    """File systems take their settings from the environment when they are made; the loopback is reached without a proxy."""
    without_proxies(monkeypatch)
    remote.retries.clear()


@pytest.fixture
def server():
    with FileServer() as server:
        server.files = {"a.tar": BODY}
        yield server


@pytest.fixture
def s3(monkeypatch):
    """The url of an S3 endpoint and its client, with shards in a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")
    with s3_server(monkeypatch, SECRET) as client:
        client.create_bucket(Bucket="shards")
        for number in range(3):
            client.put_object(Bucket="shards", Key=f"set/train-{number:06d}.tar", Body=BODY[number:])
        client.put_object(Bucket="shards", Key="set/index.json", Body=b"{}")
        yield client


def copied(tmp_path, url: str, size: int) -> bytes:
    path = tmp_path / "copy"
    path.write_bytes(bytes(size))
    remote.fetch(url, size, path)
    return path.read_bytes()


# Accepted and refused URLs


def test_remote_and_local_are_distinguished():
    assert remote.check("https://example.org/shards/train-{000..007}.tar", "data.train")
    assert remote.check("http://[::1]:8000/a.tar", "data.train")
    assert not remote.check("data/train-*.tar", "data.train")
    assert not remote.check("/data/a@b/train?.tar", "data.train")
    if remote.importlib.util.find_spec("s3fs"):
        assert remote.check("s3://bucket/train-00000?.tar", "data.train")


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@example.org/a.tar",
        f"https://{SECRET}@example.org/a.tar",
        f"s3://AKIA:{SECRET}@bucket/a.tar",
        f"https://example.org/a.tar?X-Amz-Signature={SECRET}",
        f"https://user:{SECRET[:5]}/{SECRET[5:]}@example.org/a.tar",
        f"s3://bucket/a.tar?versionId={SECRET}",
        f"https://example.org/a.tar#{SECRET}",
        f"simplecache::https://example.org/{SECRET}",
        f"https://example.org/a.zip::{SECRET}",
        f"pipe:curl {SECRET}",
        f"ftp://{SECRET}/a.tar",
        f"file:///{SECRET}",
        "https://",
        "https://example.org",
        "https://example.org/a\x1b[2J.tar",
    ],
)
def test_other_addresses_are_refused_without_repeating_them(url):
    with pytest.raises(InputError, match=r"^key 'data\.val': ") as refused:
        remote.check(url, "data.val")
    assert SECRET not in str(refused.value) and SECRET[5:] not in str(refused.value)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)
    if "::" not in url and "://" in url:
        with pytest.raises(RemoteError) as refused:
            remote.read(url)
        assert SECRET[5:] not in str(refused.value)


def test_a_refusal_names_the_place_for_credentials():
    with pytest.raises(InputError, match=r"environment, ~/\.aws, a netrc file or GOOGLE_APPLICATION_CREDENTIALS.*AWS_ENDPOINT_URL"):
        remote.check(f"s3://key:{SECRET}@bucket/a.tar", "data.train")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_missing_library_is_named(scheme, monkeypatch):
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"key 'data.train': .*pip install 'dnal-dist\[{scheme}\]'"):
        remote.check(f"{scheme}://bucket/a.tar", "data.train")


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


# S3


def test_s3_lists_reads_and_copies(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    names = [f"s3://shards/set/train-{number:06d}.tar" for number in range(3)]
    assert remote.glob("s3://shards/set/train-*.tar") == names
    assert remote.glob("s3://shards/set/train-00000[12].tar") == names[1:]
    assert remote.glob(names[1]) == names[1:2]
    assert remote.glob("s3://shards/other/*.tar") == []
    assert remote.read("s3://shards/set/index.json") == b"{}"
    assert remote.read(names[1], 10, 20) == BODY[11:21]
    assert copied(tmp_path, names[2], len(BODY) - 2) == BODY[2:]
    assert not remote.retries
    s3.put_object(Bucket="shards", Key="set/train-000003.tar", Body=b"")
    assert len(remote.glob("s3://shards/set/train-*.tar")) == 4


def test_missing_objects_of_s3_are_not_retried(s3):
    with pytest.raises(RemoteError, match=r"s3://shards/no\.tar: .*404 Not Found"):
        remote.read("s3://shards/no.tar")
    with pytest.raises(RemoteError, match=r"s3://nobody/a\.tar: .*404 Not Found NoSuchBucket"):
        remote.read("s3://nobody/a.tar", 0, 10)
    assert not remote.retries


def test_missing_credentials_of_s3_name_their_place(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match=r"no credentials.*~/\.aws"):
        remote.read("s3://shards/set/index.json", 0, 2)
    assert not remote.retries


S3_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


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


@pytest.mark.parametrize("status, code", [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout")])
def test_transient_errors_of_s3_are_retried(server, status, code, monkeypatch):
    s3_at(server, monkeypatch)
    server.statuses, server.error_body = [status] * 3, S3_ERROR.format(code, "later").encode()
    assert remote.read("s3://shards/a.tar", 3, 2000) == BODY[3:2000]
    assert sum(remote.retries.values()) == 3 and len(server.requests) == 4


def test_dropped_connections_of_s3_are_retried(server, tmp_path, monkeypatch):
    s3_at(server, monkeypatch)
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    server.cut_after, server.cuts, server.short = 30_000, 3, 0
    assert copied(tmp_path, "s3://shards/a.tar", len(BODY)) == BODY
    assert sum(remote.retries.values()) == 3


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


# Secrets


def words_of(error: BaseException) -> str:
    """Everything that an exception and those chained to it can show."""
    texts, seen = [], []
    while error is not None and error not in seen:
        seen.append(error)
        texts += [*traceback.format_exception(error, chain=True), repr(error), str(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.mark.parametrize("statuses", [[302, 403], [302, 503] * 8])
def test_a_signed_url_of_a_redirect_is_not_shown(server, statuses, capfd, caplog):
    caplog.set_level(logging.INFO)
    server.statuses, server.location = statuses, f"{server.url}/signed?X-Amz-Signature={SECRET}"
    server.error_body = f"bad signature {SECRET}".encode()
    with pytest.raises(RemoteError) as failed:
        remote.read(f"{server.url}/a.tar", 0, 10)
    assert any(SECRET in path for path, _ in server.requests)
    shown = capfd.readouterr()
    assert SECRET not in words_of(failed.value) + caplog.text + shown.out + shown.err
    assert SECRET not in str(remote.retries)


def test_a_password_from_netrc_is_used_and_not_shown(server, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.INFO)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.statuses = [503, 401]
    with pytest.raises(RemoteError, match="401") as failed:
        remote.read(f"{server.url}/a.tar")
    sent = server.headers[-1]["Authorization"]
    assert sent.startswith("Basic ")
    shown = capfd.readouterr()
    everything = words_of(failed.value) + caplog.text + shown.out + shown.err
    assert SECRET not in everything and sent.split()[1] not in everything


def test_s3_keys_are_not_shown(server, monkeypatch, capfd, caplog):
    caplog.set_level(logging.INFO)
    s3_at(server, monkeypatch)
    server.statuses = [503, 403]
    server.error_body = S3_ERROR.format("SignatureDoesNotMatch", f"AKIAEXAMPLE {SECRET}").encode()
    with pytest.raises(RemoteError, match="403 Forbidden SignatureDoesNotMatch") as failed:
        remote.read("s3://shards/a.tar", 0, 10)
    signature = server.headers[-1]["Authorization"].rpartition("Signature=")[2]
    shown = capfd.readouterr()
    everything = words_of(failed.value) + caplog.text + shown.out + shown.err
    assert len(signature) == 64 and signature not in everything
    assert SECRET not in everything and "AKIAEXAMPLE" not in everything


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
