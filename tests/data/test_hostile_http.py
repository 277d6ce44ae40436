"""Web servers and buckets that send too much, too slowly, compressed, or elsewhere: bounded, and named in one line."""

import random
import re
import time

import fsspec.config
import pytest
from servers import FileServer, without_proxies

from dnal_dist.data import http, remote
from dnal_dist.data.remote import RemoteError

MOST = 1 << 20


class HostileServer(FileServer):
    """Answers every request by `answer(handler)`."""

    def _answer(self, handler) -> None:
        self.requests.append((handler.path, handler.headers["Range"]))
        handler.close_connection = True
        self.answer(handler)


@pytest.fixture
def server(monkeypatch):
    without_proxies(monkeypatch)
    monkeypatch.setattr(remote, "TRIES", 2)
    http.redirects.clear()
    with HostileServer() as server:
        yield server


def endless(status: int, *headers: tuple[str, str]):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        for handler.server.sent in range(1, 10_000):
            handler.wfile.write(bytes(1 << 16))

    return answer


@pytest.fixture(params=["http", "s3", "gs"])
def folder(request, server, monkeypatch):
    """URL of a folder there, by each of the schemes."""
    if request.param == "http":
        return server.url
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    return f"{request.param}://bucket"


@pytest.mark.parametrize("status", [200, 206])
def test_an_endless_body_is_read_to_the_wanted_byte_only(server, folder, status, tmp_path):
    server.answer = endless(status)
    assert remote.read(f"{folder}/a.tar", 100, 5000) == bytes(4900)
    path = tmp_path / "copy"
    path.write_bytes(b"x" * MOST)
    remote.fetch(f"{folder}/a.tar", MOST, path)
    assert path.read_bytes() == bytes(MOST)
    time.sleep(0.1)
    # What lies in buffers on its way is all that was sent too much.
    assert server._http.sent << 16 < 32 * MOST


@pytest.mark.parametrize("status", [200, 206])
def test_a_whole_file_is_bounded(server, folder, status):
    server.answer = endless(status)
    with pytest.raises(RemoteError, match="more than 1 MB, the most that is taken"):
        remote.read(f"{folder}/index.json", most=MOST)


@pytest.mark.parametrize("status", [403, 503])
def test_the_body_of_an_error_is_not_read(server, status):
    server.answer = endless(status)
    with pytest.raises(RemoteError, match=f"HTTP {status}"):
        remote.read(f"{server.url}/index.json", most=MOST)


def test_a_body_that_trickles_is_given_up(server, folder, monkeypatch):
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    server.answer = answer
    with pytest.raises(RemoteError, match=r"too slow\); given up after 2 tries"):
        remote.read(f"{folder}/index.json")
    assert len(server.requests) == 2


@pytest.mark.parametrize("encoding, message", [("gzip", r"\(gzip\)"), ("x\tsecret", r"\(in some way\)")])
def test_a_compressed_body_is_refused(server, encoding, message):
    server.answer = endless(200, ("Content-Encoding", encoding))
    with pytest.raises(RemoteError, match=rf"the server compresses the body {message}, though it was asked not to"):
        remote.read(f"{server.url}/index.json")


def test_redirects_are_limited(server):
    server.answer = endless(302, ("Location", "/again"))
    with pytest.raises(RemoteError, match=r"a\.tar: cannot be read \(more than 5 redirects\)$"):
        remote.read(f"{server.url}/a.tar", 0, 10)
    assert len(server.requests) == 6


def test_the_host_of_a_redirect_is_reported(server):
    with FileServer() as other:
        other.files = {"b.tar": b"0123456789"}
        server.answer = endless(302, ("Location", f"{other.url}/b.tar?signature=secret"))
        assert remote.read(f"{server.url}/a.tar", 2, 4) == b"23"
        assert http.redirects == {f"{server.url}/a.tar": "redirected to http://127.0.0.1"}
        other.statuses = [403]
        with pytest.raises(RemoteError, match=r"403 .*; redirected to http://127\.0\.0\.1\)$") as failed:
            remote.read(f"{server.url}/a.tar", 2, 4)
        assert "secret" not in str(failed.value)


def test_a_proxy_that_is_not_there_is_named_by_its_variable(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    remote.file_system.cache_clear()
    monkeypatch.setattr(remote, "TRIES", 8)
    with pytest.raises(RemoteError, match=r"proxy that the environment's http_proxy names; .*given up after 4 tries") as failed:
        remote.read("http://shards.example/a.tar", 0, 10)
    assert "secret" not in str(failed.value)
    remote.file_system.cache_clear()


def test_random_answers_give_bytes_or_one_line(server):
    """Statuses, headers and bodies drawn by a seed."""
    draw = random.Random(7)

    def answer(handler):
        begin = draw.choice((0, 3, 10**6, -1))
        headers = {
            "Content-Length": draw.choice((None, "10", "0", "-5", "99999999999", "ten", "7, 8")),
            "Content-Range": draw.choice((None, f"bytes {begin}-{begin + 9}/100", "bytes */*", "lines 1-2/3")),
            "Content-Encoding": draw.choice((None, None, None, "identity", "gzip")),
            "Location": draw.choice((None, "/", "http://[::1", "file:///etc/passwd", "//", "http://127.0.0.1:1/")),
            "Transfer-Encoding": draw.choice((None, None, "chunked")),
        }
        handler.wfile.write(b"HTTP/1.1 %d x\r\n" % draw.choice((200, 206, 206, 206, 204, 301, 302, 304, 400, 416, 500, 999)))
        for name, value in headers.items():
            if value is not None:
                handler.wfile.write(f"{name}: {value}\r\n".encode())
        handler.wfile.write(
            draw.choice((b"\r\n", b"", b"\r\n\r\n")) + draw.choice((b"0123456789", b"", b"5\r\nabcde\r\n0\r\n\r\n"))
        )

    server.answer = answer
    outcomes = set()
    for number in range(120):
        try:
            outcomes.add(type(remote.read(f"{server.url}/a{number}", *((0, 10) if number % 2 else ()), most=MOST)))
        except RemoteError as error:
            outcomes.add(RemoteError)
            assert str(error).isprintable() and not re.search("passwd|Traceback", str(error))
    assert outcomes == {bytes, RemoteError}
