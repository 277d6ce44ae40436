"""Remote shards fetched before they are needed, in the background of the process that reads them."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from dnal_dist.data.cache import Cache


class Need(NamedTuple):
    """A shard, and the position at which it is first read. The reader sets the unit of positions, for example batches."""

    position: int
    url: str
    size: int
    sha256: str


class Prefetcher:
    """Keeps the next shards in `cache`.

    plan: the shards needed from a position on, in the order of their positions, finite or not; it is called again only if the
    position goes back. limit_bytes: the most that is fetched for positions still to come, but always one shard; over all processes
    that share the cache, at most half of its limit, or they evict each other's shards. downloads: shards fetched in parallel.

    A shard that another process is downloading is skipped. Errors are not reported here: the reader of the shard meets them. The
    threads start with the first `at` of each process and end with the process, which does not wait for them.
    """

    def __init__(self, cache: Cache, plan: Callable[[int], Iterator[Need]], limit_bytes: int, downloads: int = 2):
        self.cache, self.plan, self.limit_bytes, self.downloads = cache, plan, limit_bytes, downloads
        self._pid = None

    def at(self, position: int) -> None:
        """The reader is at `position`. Returns at once."""
        if self._pid != os.getpid():
            # Neither the threads nor a lock that one of them may have held survive a fork.
            self._start(position)
        with self._moved:
            if position < self._position:
                self._restart(position)
            self._position = position
            while self._fetched and self._fetched[0][0] < position:
                self._bytes -= self._fetched.popleft()[1]
            self._moved.notify_all()

    def close(self) -> None:
        """Start no further download; those under way finish."""
        if self._pid == os.getpid():
            with self._moved:
                self._closed = True
                self._moved.notify_all()

    def _start(self, position: int) -> None:
        self._pid, self._moved, self._closed = os.getpid(), threading.Condition(), False
        self._restart(position)
        for _ in range(self.downloads):
            threading.Thread(target=self._work, name="shard prefetch", daemon=True).start()

    def _restart(self, position: int) -> None:
        self._position, self._needs, self._next = position, self.plan(position), None
        self._fetched: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def _work(self) -> None:
        while (need := self._take()) is not None:
            with suppress(OSError):
                self.cache.try_get(*need[1:])

    def _take(self) -> Need | None:
        """The next shard to fetch, as soon as one is within the limit; None once closed."""
        with self._moved:
            while not self._closed:
                if self._next is None:
                    self._next = next(self._needs, None)
                need = self._next
                if need is not None and need.position < self._position:
                    self._next = None
                elif need is not None and (not self._fetched or self._bytes + need.size <= self.limit_bytes):
                    self._fetched.append((need.position, need.size))
                    self._bytes += need.size
                    self._next = None
                    return need
                else:
                    self._moved.wait()
            return None
