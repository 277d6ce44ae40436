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
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass

import fsspec.asyn

from dnal_dist.common.errors import CREDENTIALS, InputError
from dnal_dist.data import buckets
from dnal_dist.data.http import http, redirects
from dnal_dist.data.remote_faults import classify

SCHEMES = ("http", "https", "s3", "gs")
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}

# Failures in a row before a read is given up, and the seconds between tries, which double: three quarters of a minute in all.
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 16.0
# Failures of a host that has never been reached: a mistyped one, or a proxy that is not there.
FIRST_TRIES = 4
# Bytes of an index, which is read whole: offsets of some 25 million samples.
MOST_WHOLE = 1 << 28
# Bytes of one request, and parallel requests for one file. A dropped request is repeated in smaller pieces, so that the bytes
# between two drops are kept.
PIECE, SMALLEST_PIECE, IN_FLIGHT = 8 << 20, 64 << 10, 4

retries: Counter[str] = Counter()
"""Retries of this process, by URL."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.,{}-]+)(:\d+)?")
ranged: set[str] = set()
"""Hosts that have served a part of a file to this process."""
_reached: set[str] = set()

# The thread of fsspec's event loop does not survive a fork, and some of its releases do not handle that.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


class RemoteError(OSError):
    """A remote file cannot be read, or its copy cannot be kept. The message is one line without any credential."""


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
        return f"a {scheme}:// URL with a user or password in it; remove them: {CREDENTIALS}"
    # In an object's name ? is also a wildcard.
    if re.search(r"\?.*=" if scheme in EXTRAS else r"[?#]", rest):
        return f"a {scheme}:// URL with a query string, where secrets travel; remove it: {CREDENTIALS}"
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


def read(url: str, begin: int | None = None, end: int | None = None, most: int = MOST_WHOLE) -> bytes:
    """The whole file, of `most` bytes at most, or its bytes from `begin` up to, not including, `end`.

    Raises RemoteError: at once for a permanent error, else after TRIES failures in a row.
    """
    system = _system(url)
    if begin is None:
        return _wait_for(system, _retried(url, lambda: system._cat_file(url, most=most)))
    first, body = _wait_for(system, _part(system, url, begin, end, end))
    return body[begin - first : end - first]


def fetch(url: str, size: int, path: Path) -> None:
    """Write the file of `size` bytes at `url` over the existing file `path`. Raises RemoteError, or the OSError of writing."""
    system = _system(url)
    _wait_for(system, _fill(system, url, size, path))


def _system(url: str) -> Any:
    """The fsspec file system of this process, since event loop and connections do not survive a fork."""
    if fault := _refusal(url):
        raise RemoteError(fault)
    return file_system(url.partition("://")[0].replace("https", "http"), os.getpid())


@functools.cache
def file_system(scheme: str, _pid: int) -> Any:
    return {"http": http, "s3": buckets.s3, "gs": buckets.gs}[scheme](skip_instance_cache=True)


def _wait_for(system: Any, work: Awaitable) -> Any:
    """Run `work` on the file system's event loop. If this thread is interrupted, the work is cancelled."""
    future = asyncio.run_coroutine_threadsafe(work, system.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _fill(system: Any, url: str, size: int, path: Path) -> None:
    host, failed, pieces = _host(url), None, deque(range(0, size, PIECE))
    with path.open("r+b") as file:

        async def fetch_piece() -> None:
            begin = pieces.popleft()
            end = min(begin + PIECE, size)
            first, body = await _part(system, url, begin, end, size)
            file.seek(first)
            file.write(body)
            if len(body) > end - begin:
                pieces.clear()
            elif end - begin < size:
                ranged.add(host)

        async def fetch_pieces() -> None:
            while pieces:
                await fetch_piece()

        # A server without ranges sends the whole file each time, so the first request to a host goes alone.
        if pieces and host not in ranged:
            await fetch_piece()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(IN_FLIGHT, len(pieces))):
                    group.create_task(fetch_pieces())
        except ExceptionGroup as faults:
            failed = faults.exceptions[0]
    if failed:
        raise failed


def _host(url: str) -> str:
    return url[: url.index("/", url.index("://") + 3)]


async def _part(system: Any, url: str, begin: int, end: int, most: int) -> tuple[int, bytes]:
    """`begin` and the bytes from there to `end`; or 0 and the first `most` bytes, from a server without ranges."""
    parts, at, step = [], begin, end - begin

    async def request() -> bytes:
        wanted = min(step, end - at)
        body = await system._cat_file(url, at, at + wanted, most=most)
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
            found = await request()
            _reached.add(_host(url))
            return found
        except Exception as error:
            fault = classify(error)
        # Outside of the `except`, so that the library's exception with its text is not chained to ours.
        if not fault.transient or (fault.unreached and _host(url) not in _reached and failures >= FIRST_TRIES):
            break
        if failures < TRIES:
            retries[url] += 1
            if fault.cut and shrink:
                shrink()
            await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))
    given_up = f"; given up after {failures} tries, try again later" if fault.transient else ""
    told = f"; {redirects[url]}" if url in redirects else ""
    raise RemoteError(f"{url}: cannot be read ({fault.text}{_proxy(url) if fault.unreached else ''}{told}){given_up}")


def _proxy(url: str) -> str:
    """The variable that sends requests for `url` through a proxy, whose address may hold a password; "" if there is none."""
    scheme, _, rest = url.partition("://")
    if scheme not in getproxies_environment() or proxy_bypass(rest.partition("/")[0]):
        return ""
    return f" through the proxy that the environment's {scheme}_proxy names; correct or unset it, or add the host to no_proxy"
