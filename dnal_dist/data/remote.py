"""Files over https, s3 and gs, through fsspec: read whole or in parts, with retries.

Error messages hold the URL, which `check` has let through, a status and the kind of fault, never a library's own text: that may
hold a password, a signed URL or a header.
"""

# Why no library does this. obstore 0.12, tried against the tests of this module, hangs in a forked process once its parent has read
# (data loaders fork), puts a server's answer into its errors, and refuses servers without ranges and short bodies; by its
# documentation it does not read netrc. fsspec's caches, by theirs, have no size limit, no digest and no lock between processes.

import asyncio
import functools
import importlib.util
import os
import random
import re
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.asyn

from dnal_dist.common.errors import CREDENTIALS as ENVIRONMENT
from dnal_dist.common.errors import InputError

SCHEMES = ("http", "https", "s3", "gs")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}

# Failures in a row before a read is given up, and the seconds between tries, which double: three quarters of a minute in all.
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 16.0
# Seconds: for a connection to be made, and without a byte from it.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
# Bytes of one request, and parallel requests for one file. A dropped request is repeated in smaller pieces, so that the bytes
# between two drops are kept.
PIECE, SMALLEST_PIECE, IN_FLIGHT = 8 << 20, 64 << 10, 4


retries: Counter[str] = Counter()
"""Retries of this process, by URL."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.,{}-]+)(:\d+)?")
_TRANSIENT_CODES = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "ThrottlingException"}
# By name, since the libraries that define them (aiohttp, botocore, fsspec) may be absent.
_CUT = {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError", "ConnectionResetError", "ServerDisconnectedError"}
_CUT |= {"TimeoutError", "FSTimeoutError", "EOFError"}
_TRANSIENT = _CUT | {"ClientConnectionError", "HTTPClientError", "ConnectionError"}
_TEXTS = {"EOFError": "the body ends too soon", "gaierror": "no such host is known"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "PermissionError", "GoogleAuthError", "RefreshError"}
_PERMANENT = {
    "HTTP 404 Not Found": {"FileNotFoundError"},
    f"no credentials, or none that are accepted; {ENVIRONMENT}": _NO_CREDENTIALS,
    "the server's certificate does not verify": {"ClientConnectorCertificateError", "SSLCertVerificationError"},
}

_ranged: set[str] = set()

# The thread of fsspec's event loop does not survive a fork, and some of its releases do not handle that.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class RemoteError(OSError):
    """A remote file cannot be read, or its copy cannot be kept. The message is one line without any credential."""


class _Fault(NamedTuple):
    text: str
    transient: bool = False
    cut: bool = False


def check(url: str, key: str) -> bool:
    """True if `url` is a remote file or pattern, False if it is a local path.

    Raises InputError, naming the recipe key `key`, for another scheme, a URL with credentials or a query string, and a scheme whose
    library is not installed.
    """
    if fault := _refusal(url):
        raise InputError(f"key '{key}': {fault}")
    return "://" in url


def _refusal(url: str) -> str | None:
    """Why this URL is refused, without repeating it, since it may hold a password; None if it is not."""
    scheme, found, rest = url.partition("://")
    if not found and not url.startswith("pipe:") and "::" not in url:
        return None
    if scheme not in SCHEMES:
        name = f"{scheme!r}" if re.fullmatch(r"[\w+.-]{1,20}", scheme) else "this kind of address"
        allowed = ", ".join(f"{one}://" for one in SCHEMES)
        return f"shards are read from local paths, {allowed}, not from {name}; copy them to one of these"
    host, _, path = rest.partition("/")
    if "@" in host:
        return f"a {scheme}:// URL with a user or password in it; remove them: {ENVIRONMENT}"
    # In an object's name ? is also a wildcard.
    if re.search(r"\?.*=" if scheme in EXTRAS else r"[?#]", rest):
        return f"a {scheme}:// URL with a query string, where secrets travel; remove it: {ENVIRONMENT}"
    if not _HOST.fullmatch(host) or not path or "::" in path or not path.isprintable():
        return f"a {scheme}:// URL, expected {scheme}://{'BUCKET' if scheme in EXTRAS else 'HOST'}/PATH; correct it"
    if (library := EXTRAS.get(scheme)) and importlib.util.find_spec(library) is None:
        return f"{scheme}:// is read through {library}, which is not installed; pip install 'dnal-dist[{scheme}]'"
    return None


def can_list(url: str) -> bool:
    """Whether `glob` can list files there; an HTTP server cannot."""
    return url.partition("://")[0] in EXTRAS


def glob(url: str) -> list[str]:
    """The URLs that match the pattern `url`, sorted; a URL without wildcards matches itself if it exists.

    Raises ValueError for http and https, which cannot list files, and RemoteError if listing fails.
    """
    scheme = url.partition("://")[0]
    if not can_list(url):
        raise ValueError(f"{scheme}:// cannot list files; name them all, with braces such as {{000..007}}")
    system = _system(url)
    system.invalidate_cache()
    found = _wait_for(system, _retried(url, lambda: system._glob(url)))
    return sorted(f"{scheme}://{path}" for path in found)


def read(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes from `begin` up to, not including, `end`.

    Raises RemoteError: at once for a permanent error, else after TRIES failures in a row.
    """
    system = _system(url)
    if begin is None:
        return _wait_for(system, _retried(url, lambda: system._cat_file(url)))
    first, body = _wait_for(system, _part(system, url, begin, end))
    return body[begin - first : end - first]


def fetch(url: str, size: int, path: Path) -> None:
    """Write the file of `size` bytes at `url` over the existing file `path`. Raises RemoteError, or the OSError of writing."""
    system = _system(url)
    _wait_for(system, _fill(system, url, size, path))


def _system(url: str) -> Any:
    """The fsspec file system of this process, since event loop and connections do not survive a fork."""
    if fault := _refusal(url):
        raise RemoteError(fault)
    return _make_system(url.partition("://")[0].replace("https", "http"), os.getpid())


@functools.cache
def _make_system(scheme: str, _pid: int) -> Any:
    options: dict[str, Any] = {}
    if scheme == "gs":
        # The class behind gs:// in newer releases of gcsfs uses gRPC, which does not survive a fork.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(skip_instance_cache=True)
    if scheme == "http":
        import aiohttp

        # Not compressed: ranges would count compressed bytes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    else:
        timeouts = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT}
        options["config_kwargs"] = timeouts | {"retries": {"total_max_attempts": 1}}
    system = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    # Its own retries would multiply with ours.
    system.retries = 1
    return system


def _wait_for(system: Any, work: Awaitable) -> Any:
    """Run `work` on the file system's event loop. If this thread is interrupted, the work is cancelled."""
    future = asyncio.run_coroutine_threadsafe(work, system.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _fill(system: Any, url: str, size: int, path: Path) -> None:
    host, failed, pieces = url[: url.index("/", url.index("://") + 3)], None, deque(range(0, size, PIECE))
    with path.open("r+b") as file:

        async def fetch_piece() -> None:
            begin = pieces.popleft()
            end = min(begin + PIECE, size)
            first, body = await _part(system, url, begin, end)
            file.seek(first)
            file.write(body)
            if len(body) > end - begin:
                pieces.clear()
            elif end - begin < size:
                _ranged.add(host)

        async def fetch_pieces() -> None:
            while pieces:
                await fetch_piece()

        # A server without ranges sends the whole file each time, so the first request to a host goes alone.
        if pieces and host not in _ranged:
            await fetch_piece()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(IN_FLIGHT, len(pieces))):
                    group.create_task(fetch_pieces())
        except ExceptionGroup as faults:
            failed = faults.exceptions[0]
    if failed:
        raise failed


async def _part(system: Any, url: str, begin: int, end: int) -> tuple[int, bytes]:
    """`begin` and the bytes from there to `end`; or 0 and the whole file, from a server without ranges."""
    parts, at, step = [], begin, end - begin

    async def request() -> bytes:
        wanted = min(step, end - at)
        body = await system._cat_file(url, start=at, end=at + wanted)
        if len(body) < wanted:
            raise EOFError
        return body

    def shrink() -> None:
        nonlocal step
        step = max(step // 4, min(step, SMALLEST_PIECE))

    while at < end:
        body = await _retried(url, request, shrink)
        if len(body) > min(step, end - at):
            return 0, body
        parts.append(body)
        at += len(body)
    return begin, parts[0] if len(parts) == 1 else b"".join(parts)


async def _retried(url: str, request: Callable[[], Awaitable], shrink: Callable[[], None] | None = None) -> Any:
    """The result of `request`. `shrink` is called before the retry of a request that was cut off. Raises RemoteError."""
    for failures in range(1, TRIES + 1):
        try:
            return await request()
        except Exception as error:
            fault = _classify(error)
        # Outside of the `except`, so that the library's exception with its text is not chained to ours.
        if not fault.transient:
            break
        if failures < TRIES:
            retries[url] += 1
            if fault.cut and shrink:
                shrink()
            await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))
    given_up = f"; given up after {TRIES} tries, try again later" if fault.transient else ""
    raise RemoteError(f"{url}: cannot be read ({fault.text}){given_up}")


def _classify(error: BaseException) -> _Fault:
    """The fault behind an exception of fsspec or of the libraries below it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if answers := [found for one in chain if (found := _answer(one))]:
        status, code = answers[-1]
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        text = " ".join(filter(None, (f"HTTP {status}", phrase, code)))
        transient = status in (408, 425, 429) or (status >= 500 and status not in (501, 505)) or code in _TRANSIENT_CODES
        return _Fault(text + (f"; {ENVIRONMENT}" if status in (401, 403) else ""), transient)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if permanent := next((text for text, kinds in _PERMANENT.items() if names & kinds), None):
        return _Fault(permanent)
    number = next((one.errno for one in reversed(chain) if isinstance(one, OSError) and isinstance(one.errno, int)), None)
    text = type(chain[-1]).__name__ + (f": {os.strerror(number)}" if number else "")
    text = next((text for name, text in _TEXTS.items() if name in names), text)
    return _Fault(text, transient=bool(names & _TRANSIENT), cut=bool(names & _CUT))


def _answer(error: BaseException) -> tuple[int, str] | None:
    """Status and error code of the server's answer behind an exception of botocore, aiohttp or gcsfs; None for other exceptions."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status, code = response.get("ResponseMetadata", {}).get("HTTPStatusCode"), str(response.get("Error", {}).get("Code", ""))
    else:
        names, code = {kind.__name__ for kind in type(error).__mro__}, ""
        # Other exceptions of these libraries have a status that no server sent.
        status = error.status if "ClientResponseError" in names else error.code if "HttpError" in names else None
    return (status, code if re.fullmatch(r"[A-Za-z]{1,60}", code) else "") if isinstance(status, int) else None
