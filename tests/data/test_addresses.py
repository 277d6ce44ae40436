"""Which addresses are read, which are refused, and that none shows a secret."""

import logging

import pytest
from remote_files import SECRET, words_of

from dnal_dist.common.errors import InputError
from dnal_dist.data import remote
from dnal_dist.data.remote import RemoteError


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
