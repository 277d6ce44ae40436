"""Bodies from buckets, s3 and gs, bounded in size and time as those of a web server are.

The file systems of s3fs and gcsfs read what a server sends to its end. Both may be absent, so they are imported when they are used.
"""

import inspect
from typing import Any

from dnal_dist.data.http import CHUNK, CONNECT_TIMEOUT, READ_TIMEOUT, bounded


def s3(**options: Any) -> Any:
    """s3fs's file system, with bounded bodies."""
    from s3fs import S3FileSystem

    class BoundedS3(S3FileSystem):
        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, most: int = 0) -> bytes:
            """As `bounded` takes it. Raises Refused and botocore's errors."""
            bucket, key, _ = self.split_path(path)
            ranged = {} if start is None else {"Range": f"bytes={start}-{end - 1}"}
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **ranged)
            body = answer["Body"]
            try:
                return await bounded(body.iter_chunks(CHUNK), answer["ResponseMetadata"]["HTTPStatusCode"], start, end, most)
            finally:
                if inspect.isawaitable(closed := body.close()):
                    await closed

    timeouts = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT}
    system = BoundedS3(config_kwargs=timeouts | {"retries": {"total_max_attempts": 1}}, **options)
    # Its own retries would multiply with ours.
    system.retries = 1
    return system


def gs(**options: Any) -> Any:
    """gcsfs's file system, with bounded bodies."""
    import aiohttp

    # The class behind gs:// in newer releases of gcsfs uses gRPC, which does not survive a fork.
    from gcsfs.core import GCSFileSystem

    class BoundedGS(GCSFileSystem):
        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, most: int = 0) -> bytes:
            """As `bounded` takes it. Raises Refused and aiohttp's errors."""
            await self._set_session()
            url, ranged = self.url(path), {} if start is None else {"Range": f"bytes={start}-{end - 1}"}
            async with self.session.get(url, params=self._get_params({}), headers=self._get_headers(ranged)) as answer:
                answer.raise_for_status()
                return await bounded(answer.content.iter_chunked(CHUNK), answer.status, start, end, most)

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    return BoundedGS(session_kwargs={"timeout": timeout}, **options)
