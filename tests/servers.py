"""An HTTP server with ranges and with faults that a test switches on, and moto's S3 server."""

import re
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dnal_dist.data import remote


class FileServer:
    """Serves `files` (path without its first slash: bytes) on the loopback from a thread of its own.

    requests: every (path, Range header or None), in order; sent: bytes of bodies, by path. The rest are the faults.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.latency = 0.0  # seconds before an answer begins
        self.stalls = 0  # so many requests wait for `released` first
        self.released = threading.Event()
        self.statuses: list[int] = []  # answers to the next requests, 302 leads to `location`
        self.error_body = b"no"
        self.location = ""
        self.cut_after: int | None = None  # bytes after which the connection is dropped ...
        self.cuts = 0  # ... by so many requests
        self.short = 0  # so many requests get a part of what they ask for, said to be all
        self.trickle = 0.0  # seconds between sixteenths of a body
        self.ranges = True
        self._lock = threading.Lock()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with suppress(ConnectionError):
                    server._answer(self)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_):
                """A client that gives up or is killed is what the tests are about."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, wanted = handler.path.lstrip("/"), handler.headers["Range"]
        with self._lock:
            self.requests.append((path, wanted))
            self.headers.append(dict(handler.headers))
            status = self.statuses.pop(0) if self.statuses else None
            stall, self.stalls = self.stalls > 0, max(0, self.stalls - 1)
            cut, self.cuts = self.cuts > 0, max(0, self.cuts - 1)
            short, self.short = self.short > 0, max(0, self.short - 1)
        time.sleep(self.latency)
        if stall:
            self.released.wait()
        path = path.partition("?")[0]
        if status or path not in self.files:
            self._head(handler, status or 404, len(self.error_body), ("Location", self.location))
            handler.wfile.write(self.error_body)
            return
        body, found = self.files[path], re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if found and self.ranges:
            begin, end = int(found[1]), min(int(found[2] or len(body) - 1) + 1, len(body))
            if begin >= len(body):
                self._head(handler, 416, 0)
                return
            part = body[begin : end - 1 if short else end]
            self._head(handler, 206, len(part), ("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(body)}"))
        else:
            part = body
            self._head(handler, 200, len(part))
        self._send(handler, path, part[: self.cut_after] if cut else part)
        if cut and len(part) > self.cut_after:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _head(self, handler: BaseHTTPRequestHandler, status: int, length: int, *more: tuple[str, str]) -> None:
        handler.send_response(status)
        for name, value in (("Content-Length", str(length)), ("ETag", '"1"'), *more):
            handler.send_header(name, value)
        handler.end_headers()

    def _send(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        step = max(1, len(body) // 16) if self.trickle else max(1, len(body))
        for at in range(0, len(body), step):
            if at and self.trickle:
                time.sleep(self.trickle)
            part = body[at : at + step]
            # First, or who asked has it all before it is counted.
            with self._lock:
                self.sent[path] += len(part)
            handler.wfile.write(part)


@contextmanager
def s3_server(monkeypatch, secret: str = "secret"):
    """A boto3 client of an S3 server on the loopback, to which the environment leads. Skips the test where moto is missing."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed: pip install -e '.[dev]'")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
    yield boto3.client("s3")
    running.stop()


def without_proxies(monkeypatch) -> None:
    """The loopback is reached directly, whatever this machine's environment says."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    remote.file_system.cache_clear()
    remote.ranged.clear()
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.005)
