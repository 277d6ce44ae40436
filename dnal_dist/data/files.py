"""Open files of shards, of which there may be more than a process may have open."""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable

OPEN_SHARDS = 64


class ShardFiles:
    """Parts of shards. `open_shard` gives a file descriptor of the shard with a number; the `most` used last stay open, or fewer
    where the system allows no more."""

    def __init__(self, open_shard: Callable[[int], int], most: int = OPEN_SHARDS):
        self.open_shard, self.most = open_shard, most
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, begin: int, size: int) -> bytes:
        """Up to `size` bytes from byte `begin` on, fewer where the shard ends. Raises OSError."""
        if shard not in self.descriptors:
            self._close_down_to(self.most - 1)
            self.descriptors[shard] = self._opened(shard)
        self.descriptors.move_to_end(shard)
        return os.pread(self.descriptors[shard], size, begin)

    def _opened(self, shard: int) -> int:
        while True:
            try:
                return self.open_shard(shard)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.descriptors:
                    raise
            # What else this process opens needs some too.
            self.most = max(1, len(self.descriptors) // 2)
            self._close_down_to(self.most - 1)

    def _close_down_to(self, number: int) -> None:
        while len(self.descriptors) > max(0, number):
            os.close(self.descriptors.popitem(last=False)[1])

    def close(self) -> None:
        self._close_down_to(0)

    def __del__(self):
        if hasattr(self, "descriptors"):
            self.close()

    def __getstate__(self) -> dict:
        # The numbers of this process's open files mean others, or nothing, in another process.
        return self.__dict__ | {"descriptors": OrderedDict()}
