"""The one global order of samples: a function of seed and epoch, which ranks and workers only divide."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dnal_dist.data.shards import Shards


class Place(NamedTuple):
    """A sample's place in a run: `batch` counts from the run's start, `position` is the place in the epoch's order, `index` the
    sample's number in the shards, `draw` what its random changes depend on beside seed and epoch. last: it ends its rank's part of
    the batch."""

    batch: int
    epoch: int
    position: int
    index: int
    draw: int
    last: bool = False


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


def order_by_class(labels: np.ndarray, shares: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many sample numbers as there are labels, of which each class has its share, shuffled. Within a class each sample comes as
    often as any other, or once more. labels (n,), those below 0 are never drawn; shares (classes,), which sum to 1."""
    bits = _bits(2 * len(labels), seed, epoch)
    shuffled = np.argsort(bits[: len(labels)], kind="stable")
    shuffled = shuffled[labels[shuffled] >= 0]
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held = np.split(by_class, np.cumsum(np.bincount(labels[shuffled], minlength=len(shares)))[:-1])
    drawn = np.concatenate([np.resize(one, count) for one, count in zip(held, _wanted(shares, len(labels)), strict=True)])
    return drawn[np.argsort(bits[len(labels) :], kind="stable")]


def _wanted(shares: np.ndarray, samples: int) -> np.ndarray:
    """How often an epoch of so many samples has each class."""
    return np.diff(np.round(np.cumsum(shares) * samples), prepend=0).astype(int)


def _bits(number: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises that raw bits stay the same from version to version; it does not promise that for `permutation`.
    return np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(number)


class GlobalOrder:
    """The samples of each batch of one rank. Training: without end. Validation: one pass in the order of the shards."""

    def __init__(self, shards: Shards, data, seed: int, train: bool, rank: int = 0, world_size: int = 1):
        self.counts, self.samples, self.shard_of = shards.counts, shards.samples, shards.shard_of
        self.seed, self.train = seed, train
        self.global_batch, self.together = data.global_batch, data.shuffle_shards
        self.local, self.rank = data.global_batch // world_size, rank
        self.per_epoch, self.repeats = self.samples // self.global_batch, data.augmentation.repeats if train else 1
        self.labels, self.shares = None, None
        if train and data.sampling != "uniform":
            self.labels, self.shares = shards.by_class(data.sampling)

    @property
    def is_plain(self) -> bool:
        """Whether an epoch has each sample once."""
        return self.labels is None and self.repeats == 1

    def places(self, start: int = 0, worker: int = 0, workers: int = 1) -> Iterator[Place]:
        """Places of the rank's samples from batch `start` of a training run on, in the batches that are worker number `worker`'s:
        the first for worker 0, the second for worker 1 and so on, which a loader takes from them in turn."""
        if not self.train:
            whole = np.arange(self.samples)
            for batch in range(worker, -(-self.samples // self.global_batch), workers):
                yield from self._places(batch, 0, batch, whole)
            return
        known = -1
        for batch in itertools.count(start + worker, workers):
            epoch, number = divmod(batch, self.per_epoch)
            if epoch != known:
                known, indices = epoch, self.epoch(epoch)
            yield from self._places(batch, epoch, number, indices)

    def _places(self, batch: int, epoch: int, number: int, indices: np.ndarray) -> Iterator[Place]:
        """This rank's part of batch `number` of an epoch, which is empty where too few samples are left for all ranks."""
        first = number * self.global_batch + self.rank * self.local
        end = min(first + self.local, self.samples)
        for position, index in enumerate(indices[first:end].tolist(), first):
            yield Place(batch, epoch, position, index, index if self.is_plain else position, position == end - 1)

    def first_uses(self, start: int) -> Iterator[tuple[int, int]]:
        """From batch `start` of the run on, (batch, shard) for every shard of an epoch in the order of their first uses in it; of a
        validation, of one pass."""
        epoch, batch = divmod(start, self.per_epoch) if self.train else (0, 0)
        while True:
            order = self.epoch(epoch) if self.train else np.arange(self.samples)
            shards, first = np.unique(self.shard_of(order[batch * self.global_batch :]), return_index=True)
            for place in np.argsort(first):
                yield epoch * self.per_epoch + batch + int(first[place]) // self.global_batch, int(shards[place])
            if not self.train:
                return
            epoch, batch = epoch + 1, 0

    def shards(self) -> set[int]:
        """Those that some epoch has samples of."""
        if self.labels is None:
            return set(range(len(self.counts)))
        drawn = (self.labels >= 0) & (_wanted(self.shares, self.samples)[self.labels] > 0)
        return set(np.unique(self.shard_of(np.flatnonzero(drawn))).tolist())

    def epoch(self, epoch: int) -> np.ndarray:
        """The sample numbers in the order of an epoch of training. With repeats, so many epochs share what one would have without,
        and a batch has its images one after the other, then all of them again, so that neighbours differ."""
        epoch, part = divmod(epoch, self.repeats)
        whole = self._without_repeats(epoch)
        if self.repeats == 1:
            return whole
        different = self.global_batch // self.repeats
        batches = whole[part * self.per_epoch * different :][: self.per_epoch * different].reshape(-1, different)
        return np.tile(batches, self.repeats).ravel()

    def _without_repeats(self, epoch: int) -> np.ndarray:
        if self.labels is not None:
            return order_by_class(self.labels, self.shares, self.seed, epoch)
        if self.together is None or self.together >= len(self.counts):
            return order(self.samples, self.seed, epoch)
        return order_with_locality(self.counts, self.seed, epoch, self.together)
