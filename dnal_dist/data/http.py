"""Bodies from a web server, bounded in size and time whatever the server sends.

aiohttp takes a quarter of a second to import, so it is imported when it is used.
"""

import time
from collections.abc import AsyncIterator
from typing import Any

# Seconds: for a connection to be made, and without a byte from it.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
# Bytes a second, in the mean, below which a body counts as stalled.
SLOWEST = 10_000
REDIRECTS = 5
CHUNK = 1 << 18

redirects: dict[str, str] = {}
"""Other hosts that answered for a URL in this process."""


class Refused(Exception):
    """An answer that is not used. The message is one line, without anything that the server chose but a host."""


def http(**options: Any) -> Any:
    """fsspec's file system, whose bodies end where they are wanted to."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    class BoundedHTTP(HTTPFileSystem):
        async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, most: int = 0) -> bytes:
            """As `bounded` takes it. Raises Refused and aiohttp's errors."""
            ranged = {} if start is None else {"headers": {"Range": f"bytes={start}-{end - 1}"}}
            session = await self.set_session()
            try:
                async with session.get(self.encode_url(url), max_redirects=REDIRECTS + 1, **ranged) as answer:
                    self._check(answer, url)
                    return await bounded(answer.content.iter_chunked(CHUNK), answer.status, start, end, most)
            except aiohttp.TooManyRedirects:
                raise Refused(f"more than {REDIRECTS} redirects") from None

        def _check(self, answer: aiohttp.ClientResponse, url: str) -> None:
            if answer.history:
                before, to = answer.history[0].url, answer.url
                if before.scheme == "https" and to.scheme != "https":
                    raise Refused("redirected from https:// to an address that is not encrypted")
                if (before.host, before.port) != (to.host, to.port):
                    redirects[url] = f"redirected to {to.scheme}://{to.host}"
            self._raise_not_found_for_status(answer, url)
            if (encoding := answer.headers.get("Content-Encoding", "identity").lower()) != "identity":
                kind = encoding if encoding in ("gzip", "deflate", "br", "zstd") else "in some way"
                raise Refused(f"the server compresses the body ({kind}), though it was asked not to")

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    # Not compressed: ranges would count compressed bytes, and few of them may become many.
    client = {"timeout": timeout, "trust_env": True, "auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
    return BoundedHTTP(client_kwargs=client, **options)


async def bounded(chunks: AsyncIterator[bytes], status: int, start: int | None, end: int | None, most: int) -> bytes:
    """The body of an answer with this status: bytes `start` to `end` of a file, or the first `most` of it from a server without
    ranges; without `start` all of it. What comes behind them is not read.

    Raises TimeoutError for a body that trickles, Refused for a whole file of more than `most` bytes.
    """
    wanted = most + 1 if start is None else end - start if status == 206 else most
    begun, parts, got = time.monotonic(), [], 0
    async for part in chunks:
        parts.append(part)
        got += len(part)
        if got >= wanted:
            break
        if time.monotonic() - begun > READ_TIMEOUT + got / SLOWEST:
            raise TimeoutError
    if start is None and got > most:
        raise Refused(f"more than {most / 1e6:,.0f} MB, the most that is taken for such a file")
    return b"".join(parts)[:wanted]
