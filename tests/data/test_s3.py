"""Files of moto's S3 server, and of a server with faults that is taken for one."""

import logging

import pytest
from remote_files import BODY, S3_ERROR, SECRET, copied, s3_at, words_of

from dnal_dist.data import remote
from dnal_dist.data.remote import RemoteError


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
