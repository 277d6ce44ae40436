"""Which remote shards are fetched, in which order and how far before they are read: a prefetcher that follows the global order."""

import functools
import math
from collections.abc import Iterator

from dnal_dist.common.errors import InputError
from dnal_dist.data.files import OPEN_SHARDS
from dnal_dist.data.order import GlobalOrder
from dnal_dist.data.prefetch import Need, Prefetcher
from dnal_dist.data.shards import Shards


def prefetcher(shards: Shards, order: GlobalOrder, workers: int) -> Prefetcher | None:
    """What fetches the remote ones of `shards` in each of `workers` loader processes; None if there are none.

    Raises InputError if those that are in use at a time do not fit into the cache.
    """
    if shards.cache is None:
        return None
    limit, sizes = shards.cache.limit_bytes, sorted((shard.size for shard in shards.remote.values()), reverse=True)
    together = order.together if order.train else 1
    # Shards come and go at chance, so that there are now more of them and now fewer.
    in_use = min(len(sizes), math.ceil(1.3 * together) + 2) if together else len(sizes)
    if (wanted := sum(sizes[:in_use])) > limit:
        raise InputError(
            f"key 'data.cache_gb': {limit / 1e9:.3g} GB, but {in_use} shards of '{shards.key}' may be in use at a time, "
            f"{wanted / 1e9:.3g} GB; raise it, or lower key 'data.shuffle_shards'"
        )
    fits = shards.remote_bytes <= limit
    if not fits:
        # The space of a copy that made room for others comes free when it is closed.
        shards.files.most = min(OPEN_SHARDS, in_use)
    # Of a set that does not fit as a whole, what is coming must not drive out what is in use.
    room = limit if fits else max((limit - wanted) // 2, 1)
    return Prefetcher(shards.cache, functools.partial(_needs, shards, order, fits), room, max(1, 4 // max(1, workers)))


def _needs(shards: Shards, order: GlobalOrder, once: bool, batch: int) -> Iterator[Need]:
    """Remote shards in the order in which they are needed from `batch` on; `once`: none of them again."""
    left = set(shards.remote) & order.shards()
    for position, shard in order.first_uses(batch):
        if shard in left:
            yield Need(position, *shards.remote[shard])
            if once:
                left.discard(shard)
        if not left:
            return
