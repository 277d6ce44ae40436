"""Files over https, s3 and gs, through fsspec: read whole or in parts, with retries.

Messages here are made of a URL that `check` has let through, a status and the kind of a fault, never of a library's own text: that
may hold a password, a signed URL or a header.
"""

import asyncio
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

from dnal_dist.common.errors import InputError

SCHEMES = ("http", "https", "s3", "gs")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}

# Tries in a row that may fail before it is given up, and the seconds between them, which double: three quarters of a minute in all.
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 16.0
# Seconds: for a connection to come about, and without a single byte from it.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
# Bytes of one request for a part of a file, and how many requests of a file are under way at once. A request whose connection was
# dropped is made anew in smaller pieces, so that what comes between two drops is kept.
PIECE, SMALLEST_PIECE, IN_FLIGHT = 8 << 20, 64 << 10, 4

ENVIRONMENT = (
    "credentials come from the environment, ~/.aws, a netrc file or GOOGLE_APPLICATION_CREDENTIALS; an S3 endpoint from "
    "AWS_ENDPOINT_URL, and FSSPEC_S3_ANON=true goes without credentials"
)

retries: Counter[str] = Counter()
"""How often this process has tried again, by URL."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.,{}-]+)(:\d+)?")
_TRANSIENT_CODES = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "ThrottlingException"}
# By name, since the libraries that define them may be absent: aiohttp's, botocore's, fsspec's and Python's own.
_CUT = {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError", "ConnectionResetError", "ServerDisconnectedError"}
_CUT |= {"TimeoutError", "FSTimeoutError", "_CutShort"}
_TRANSIENT = _CUT | {"ClientConnectionError", "HTTPClientError", "ConnectionError"}

_systems: dict[tuple[int, str], Any] = {}
_ranged: set[str] = set()

# The thread of fsspec's event loop does not come along through a fork, and not all of its releases know.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class RemoteError(OSError):
    """A remote file that cannot be had, or the folder of copies cannot hold. The message is one line without any credential."""


class _CutShort(Exception):
    """A body that ended before its time without a word about it."""


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
    """Why this URL is not read, in words that do not repeat it, since it may hold a password."""
    scheme, found, rest = url.partition("://")
    if not found and not url.startswith("pipe:") and "::" not in url:
        return None
    if scheme not in SCHEMES:
        name = f"{scheme!r}" if re.fullmatch(r"[\w+.-]{1,20}", scheme) else "this kind of address"
        return (
            f"shards are read from local paths, {', '.join(s + '://' for s in SCHEMES)}, not from {name}; copy them to one of these"
        )
    host, _, path = rest.partition("/")
    if "@" in host:
        return f"a {scheme}:// URL with a user or password in it; remove them: {ENVIRONMENT}"
    # In the name of an object, ? is also a wildcard.
    if re.search(r"\?.*=" if scheme in EXTRAS else r"[?#]", rest):
        return f"a {scheme}:// URL with a query string, where secrets travel; remove it: {ENVIRONMENT}"
    if not _HOST.fullmatch(host) or not path or "::" in path or not path.isprintable():
        return f"a {scheme}:// URL that does not read {scheme}://{'BUCKET' if scheme in EXTRAS else 'HOST'}/PATH; correct it"
    if (library := EXTRAS.get(scheme)) and importlib.util.find_spec(library) is None:
        return f"{scheme}:// is read through {library}, which is not installed; pip install 'dnal-dist[{scheme}]'"
    return None


def can_list(url: str) -> bool:
    """Whether `glob` can list files there: not on the web."""
    return url.partition("://")[0] in EXTRAS


def glob(url: str) -> list[str]:
    """The URLs that match the pattern `url`, sorted; [url] itself if it is no pattern and exists.

    Raises ValueError for http and https, which cannot list files, and RemoteError if the listing cannot be had.
    """
    scheme = url.partition("://")[0]
    if not can_list(url):
        raise ValueError(f"{scheme}:// cannot list files; name them all, with braces such as {{000..007}}")
    system = _system(url)
    system.invalidate_cache()
    found = _wait_for(system, _patiently(url, lambda: system._glob(url)))
    return sorted(f"{scheme}://{path}" for path in found)


def read(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes from `begin` up to, not including, `end`.

    Raises RemoteError: at once where asking again is no help, else after TRIES tries in a row.
    """
    system = _system(url)
    if begin is None:
        return _wait_for(system, _patiently(url, lambda: system._cat_file(url)))
    first, body = _wait_for(system, _part(system, url, begin, end))
    return body[begin - first : end - first]


def fetch(url: str, size: int, path: Path) -> None:
    """Write the file of `size` bytes at `url` over the existing file `path`. Raises RemoteError, or the OSError of writing."""
    system = _system(url)
    _wait_for(system, _fill(system, url, size, path))


def _system(url: str) -> Any:
    """The fsspec file system of this process: its event loop and its connections do not outlive a fork."""
    if fault := _refusal(url):
        raise RemoteError(fault)
    assert "://" in url, "a local path"
    scheme = url.partition("://")[0].replace("https", "http")
    key = os.getpid(), scheme
    if key not in _systems:
        # Threads that meet here make one each, and the first is kept: a lock might be held by no one in a forked process.
        _systems.setdefault(key, _make_system(scheme))
    return _systems[key]


def _make_system(scheme: str) -> Any:
    options: dict[str, Any] = {}
    if scheme == "http":
        import aiohttp

        # No compression on the way: its bytes are others than those that a range counts.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    elif scheme == "s3":
        own = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = own
    if scheme == "gs":
        # The class of that name in newer releases of gcsfs asks for the kind of a bucket by gRPC, which does not survive a fork.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(skip_instance_cache=True)
    system = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    # Tries of its own would multiply with ours.
    system.retries = 1
    return system


def _wait_for(system: Any, work: Awaitable) -> Any:
    """Have the file system's event loop do `work`. If this thread is interrupted, the work ends too."""
    future = asyncio.run_coroutine_threadsafe(work, system.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _fill(system: Any, url: str, size: int, path: Path) -> None:
    host, failed, pieces = url[: url.index("/", url.index("://") + 3)], None, deque(range(0, size, PIECE))
    with path.open("r+b") as file:

        async def take() -> None:
            begin = pieces.popleft()
            end = min(begin + PIECE, size)
            begin_of_body, body = await _part(system, url, begin, end)
            file.seek(begin_of_body)
            file.write(body)
            if len(body) > end - begin:
                pieces.clear()
            elif end - begin < size:
                _ranged.add(host)

        async def take_all() -> None:
            while pieces:
                await take()

        # A server that knows no ranges sends the whole file each time: its first answer tells.
        if pieces and host not in _ranged:
            await take()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(IN_FLIGHT, len(pieces))):
                    group.create_task(take_all())
        except ExceptionGroup as faults:
            failed = faults.exceptions[0]
    if failed:
        raise failed


async def _part(system: Any, url: str, begin: int, end: int) -> tuple[int, bytes]:
    """The bytes from `begin` to `end` and `begin`; or the whole file and 0, from a server that answers with that."""
    parts, at, step, failures = [], begin, end - begin, 0
    while at < end:
        stop = min(at + step, end)
        try:
            body = await system._cat_file(url, start=at, end=stop)
            if len(body) < stop - at:
                raise _CutShort
        except Exception as error:
            fault = _judge(error)
        else:
            if len(body) > stop - at:
                return 0, body
            parts.append(body)
            at, failures = stop, 0
            continue
        failures += 1
        if fault.cut:
            step = max(step // 4, min(step, SMALLEST_PIECE))
        await _pause(url, fault, failures)
    return begin, parts[0] if len(parts) == 1 else b"".join(parts)


async def _patiently(url: str, attempt: Callable[[], Awaitable]) -> Any:
    for failures in range(1, TRIES + 1):
        try:
            return await attempt()
        except Exception as error:
            fault = _judge(error)
        await _pause(url, fault, failures)
    raise AssertionError("the last pause raises")


async def _pause(url: str, fault: _Fault, failures: int) -> None:
    """Wait before the next try. Raises RemoteError if there is to be none.

    It is called outside of any `except`, so that a library's exception with its text is not dragged along.
    """
    if not fault.transient:
        raise RemoteError(f"{url}: cannot be read ({fault.text})")
    if failures == TRIES:
        raise RemoteError(f"{url}: cannot be read ({fault.text}); given up after {TRIES} tries, try again later")
    retries[url] += 1
    await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))


def _judge(error: BaseException) -> _Fault:
    """What an exception of fsspec or the libraries below it comes to."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    answers = [found for one in chain if (found := _answer(one))]
    if answers:
        status, code = answers[-1]
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        text = " ".join(filter(None, (f"HTTP {status}", phrase, code)))
        transient = status in (408, 425, 429) or (status >= 500 and status not in (501, 505)) or code in _TRANSIENT_CODES
        return _Fault(text + (f"; {ENVIRONMENT}" if status in (401, 403) else ""), transient)
    if "FileNotFoundError" in names:
        return _Fault("HTTP 404 Not Found")
    if names & {"NoCredentialsError", "PartialCredentialsError", "PermissionError", "GoogleAuthError", "RefreshError"}:
        return _Fault(f"no credentials, or none that open it; {ENVIRONMENT}")
    if names & {"ClientConnectorCertificateError", "SSLCertVerificationError"}:
        return _Fault("the server's certificate does not verify")
    number = next((one.errno for one in reversed(chain) if isinstance(one, OSError) and isinstance(one.errno, int)), None)
    if "_CutShort" in names:
        text = "the body ends too soon"
    elif "gaierror" in names:
        text = "no such host is known"
    else:
        text = type(chain[-1]).__name__ + (f": {os.strerror(number)}" if number else "")
    return _Fault(text, transient=bool(names & _TRANSIENT), cut=bool(names & _CUT))


def _answer(error: BaseException) -> tuple[int, str] | None:
    """Status and error code of a server's answer that an exception stands for, if it does: botocore's, aiohttp's, gcsfs's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code", ""))
        code = code if re.fullmatch(r"[A-Za-z]{1,60}", code) else ""
        return (status, code) if isinstance(status, int) else None
    names = {kind.__name__ for kind in type(error).__mro__}
    # Their other exceptions have a status of their own making.
    status = error.status if "ClientResponseError" in names else error.code if "HttpError" in names else None
    if isinstance(status, int):
        return status, ""
    return None
