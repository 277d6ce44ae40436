"""The one global order of samples: a function of seed and epoch, which ranks and workers only divide."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from dnal_dist.data.shards import Shards


class Place(NamedTuple):
    """A sample's place in a run: `batch` counts from the run's start, `position` is the place in the epoch's order, `index` the
    sample's number in the shards."""

    batch: int
    epoch: int
    position: int
    index: int


def order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the sample numbers 0 ... samples - 1 in an epoch: a uniform shuffle, a function of its arguments alone."""
    return np.argsort(_bits(samples, seed, epoch), kind="stable")


def order_with_locality(counts: np.ndarray, seed: int, epoch: int, together: int) -> np.ndarray:
    """The order of all samples of shards that hold `counts` each: shards come in a shuffled order, and each sample somewhere within
    the stretch that its shard and those around it make up, `together` shards in all. About as many are in use at any time.

    As good as a uniform shuffle where the samples were shuffled before they were put into shards.
    """
    bits = _bits(len(counts) + int(counts.sum()), seed, epoch)
    turn = np.argsort(bits[: len(counts)], kind="stable")
    ends = np.empty(len(counts))
    ends[turn] = np.cumsum(counts[turn])
    middle, half = ends - counts / 2, together * counts.mean() / 2
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half, counts.sum())
    low, high = np.repeat(low, counts), np.repeat(high, counts)
    return np.argsort(low + (high - low) * (bits[len(counts) :] / 2.0**64), kind="stable")


def _bits(number: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises that raw bits stay the same from version to version; it does not promise that for `permutation`.
    return np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(number)


class Slices(Sampler):
    """Which samples each batch of one rank holds. Training: without end, from batch `start` of the run on. Else: one pass."""

    def __init__(self, shards: Shards, data, seed: int, train: bool, rank: int = 0, world_size: int = 1):
        self.counts, self.samples, self.shard_of = shards.counts, shards.samples, shards.shard_of
        self.seed, self.train = seed, train
        self.global_batch, self.together = data.global_batch, data.shuffle_shards
        self.local, self.rank, self.start = data.global_batch // world_size, rank, 0
        self.per_epoch = self.samples // self.global_batch

    def __iter__(self) -> Iterator[list[Place]]:
        if not self.train:
            yield from self._pass(0, np.arange(self.samples), range(-(-self.samples // self.global_batch)))
            return
        epoch, batch = divmod(self.start, self.per_epoch)
        while True:
            yield from self._pass(epoch, self.order(epoch), range(batch, self.per_epoch))
            epoch, batch = epoch + 1, 0

    def first_uses(self, start: int) -> Iterator[tuple[int, int]]:
        """From batch `start` of the run on, (batch, shard) for every shard of an epoch in the order of their first uses in it; of a
        validation, of one pass."""
        epoch, batch = divmod(start, self.per_epoch) if self.train else (0, 0)
        while True:
            order = self.order(epoch) if self.train else np.arange(self.samples)
            shards, first = np.unique(self.shard_of(order[batch * self.global_batch :]), return_index=True)
            for place in np.argsort(first):
                yield epoch * self.per_epoch + batch + int(first[place]) // self.global_batch, int(shards[place])
            if not self.train:
                return
            epoch, batch = epoch + 1, 0

    def order(self, epoch: int) -> np.ndarray:
        """The sample numbers in the order of an epoch of training."""
        if self.together is None or self.together >= len(self.counts):
            return order(self.samples, self.seed, epoch)
        return order_with_locality(self.counts, self.seed, epoch, self.together)

    def _pass(self, epoch: int, indices: np.ndarray, batches: range) -> Iterator[list[Place]]:
        for batch in batches:
            first = batch * self.global_batch
            mine = range(first + self.rank * self.local, min(first + (self.rank + 1) * self.local, self.samples))
            if mine:
                chosen = indices[mine.start : mine.stop].tolist()
                number = epoch * self.per_epoch + batch
                yield [Place(number, epoch, position, index) for position, index in zip(mine, chosen, strict=True)]
