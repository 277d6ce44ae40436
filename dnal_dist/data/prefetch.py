"""Remote shards fetched before they are needed, in the background of the process that reads them."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from dnal_dist.data.cache import Cache


class Need(NamedTuple):
    """A shard, and the position at which it is first read; positions count what the reader counts, batches for example."""

    position: int
    url: str
    size: int
    sha256: str


class Prefetcher:
    """Keeps the shards that come next in `cache`.

    plan: given a position, the shards needed from there on, in the order of their positions, with or without end; it is asked again
    only if the position goes back. limit_bytes: of the shards whose position is still to come, at most so many are fetched, but
    always one; over all processes that share the cache this should be no more than half its limit, or one drives out what another
    has fetched. downloads: shards under way at once.

    A shard that another process is downloading is left to it. Errors are not reported here: who reads the shard meets them. Threads
    begin with the first `at` of each process and end with it; nothing waits for them.
    """

    def __init__(self, cache: Cache, plan: Callable[[int], Iterator[Need]], limit_bytes: int, downloads: int = 2):
        self.cache, self.plan, self.limit_bytes, self.downloads = cache, plan, limit_bytes, downloads
        self._pid = None

    def at(self, position: int) -> None:
        """The reader is at `position` now. Returns at once."""
        if self._pid != os.getpid():
            # Threads, and a lock that one of them may have held, do not come along through a fork.
            self._begin(position)
        with self._moved:
            if position < self._position:
                self._restart(position)
            self._position = position
            while self._held and self._held[0][0] < position:
                self._bytes -= self._held.popleft()[1]
            self._moved.notify_all()

    def close(self) -> None:
        """Fetch nothing more; what is under way ends by itself."""
        if self._pid == os.getpid():
            with self._moved:
                self._closed = True
                self._moved.notify_all()

    def _begin(self, position: int) -> None:
        self._pid, self._moved, self._closed = os.getpid(), threading.Condition(), False
        self._restart(position)
        for _ in range(self.downloads):
            threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def _restart(self, position: int) -> None:
        self._position, self._coming, self._next = position, self.plan(position), None
        self._held: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def _work(self) -> None:
        while (need := self._take()) is not None:
            with suppress(OSError):
                self.cache.try_get(*need[1:])

    def _take(self) -> Need | None:
        """The next shard to fetch, as soon as there is one within the limit; None once closed."""
        with self._moved:
            while not self._closed:
                if self._next is None:
                    self._next = next(self._coming, None)
                need = self._next
                if need is not None and need.position < self._position:
                    self._next = None
                elif need is not None and (not self._held or self._bytes + need.size <= self.limit_bytes):
                    self._held.append((need.position, need.size))
                    self._bytes += need.size
                    self._next = None
                    return need
                else:
                    self._moved.wait()
            return None
