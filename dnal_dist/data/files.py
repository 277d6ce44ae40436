"""Open files of shards, of which there may be more than a process may have open."""

import os
from collections import OrderedDict
from collections.abc import Callable


class ShardFiles:
    """Parts of shards. `open_shard` gives a file descriptor of the shard with a number; the `most` used last stay open."""

    def __init__(self, open_shard: Callable[[int], int], most: int):
        self.open_shard, self.most = open_shard, most
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, begin: int, size: int) -> bytes:
        """Up to `size` bytes from byte `begin` on, fewer where the shard ends. Raises OSError."""
        if shard not in self.descriptors:
            while len(self.descriptors) >= self.most:
                os.close(self.descriptors.popitem(last=False)[1])
            self.descriptors[shard] = self.open_shard(shard)
        self.descriptors.move_to_end(shard)
        return os.pread(self.descriptors[shard], size, begin)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def __del__(self):
        if hasattr(self, "descriptors"):
            self.close()

    def __getstate__(self) -> dict:
        # The numbers of this process's open files mean others, or nothing, in another process.
        return self.__dict__ | {"descriptors": OrderedDict()}
