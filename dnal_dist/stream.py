"""Shards in, batches out, in one global order that ranks and workers only divide.

The order of samples is a function of seed and epoch. Batch b of an epoch is a slice of that order, and a rank's part of it a slice
of the slice, so any number of ranks and workers sees the same batches and a run can go on from any of them.

python -m dnal_dist.stream --audit RUN      proves from a run's receipts that each epoch had every sample once
"""

import argparse
import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dnal_dist import nvjpeg, receipts
from dnal_dist.ahead import Ahead
from dnal_dist.common.errors import InputError
from dnal_dist.nvjpeg import Encoded
from dnal_dist.pictures import Geometry, PictureError, Stack, Transform, read_header, render
from dnal_dist.remote import RemoteError
from dnal_dist.samples import Fault
from dnal_dist.shards import Origin, Shards


class Batch(NamedTuple):
    """images uint8 (n, 3, H, W), labels int64 (n,), which images are to be mirrored (bool (n,)), the samples' keys, what had to be
    skipped, and the tally for the receipt. encoded: JPEGs that the device is to decode; `images` are then only the others."""

    images: Tensor
    labels: Tensor
    flips: Tensor
    keys: list[str]
    bad: list[Fault]
    tally: tuple[int, int]
    encoded: Encoded | None = None


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


class Pictures(Dataset):
    """Decoded pictures by their place. A list of places gives a Batch, or the InputError that stops the run, as a value: an
    exception would arrive from a loader process as a page of traceback."""

    def __init__(self, shards: Shards, data, seed: int, train: bool, ahead: Ahead | None = None):
        self.shards, self.train, self.size, self.transform = shards, train, data.image_size, Transform(data, seed, train)
        self.ahead, self.on_device = ahead, train and data.decode == "cuda"

    def __getitems__(self, wanted: list[Place]) -> Batch | InputError:
        stack, waiting, labels, flips, origins, bad = Stack(len(wanted), self.size), nvjpeg.Waiting(), [], [], [], []
        if self.ahead is not None:
            self.ahead.at(wanted[0].batch)
        for place in wanted:
            try:
                sample, origin = self.shards.take(place.index, place.position)
                geometry = self._picture(sample.picture, place, origin, stack, waiting, len(labels))
            except Fault as fault:
                bad.append(fault)
                continue
            except OSError as error:
                return InputError(_unreadable(error, self.shards.where(place.index)[0]))
            labels.append(sample.label)
            flips.append(geometry.flip)
            origins.append(origin)
        if self.train and not labels:
            # BatchNorm's statistics of no picture at all would be no numbers.
            return InputError(f"{bad[0]}: no picture of a batch of {len(wanted)} can be used; mend the shards")
        label, flip = torch.tensor(labels, dtype=torch.long), torch.tensor(flips, dtype=torch.bool)
        keys, tally = [origin.key for origin in origins], receipts.tally(origins)
        return Batch(stack.images, label, flip, keys, bad, tally, waiting.encoded() if self.on_device else None)

    def _picture(self, encoded: bytes, place: Place, origin: Origin, stack: Stack, waiting: nvjpeg.Waiting, row: int) -> Geometry:
        """Decode a picture onto `stack`, or leave it for the device to put it into the batch's `row`."""
        try:
            header = read_header(encoded)
            geometry = self.transform.plan(header, place.epoch, place.index)
            if self.on_device and nvjpeg.takes(header, encoded):
                waiting.add(encoded, row, geometry, origin)
            else:
                render(encoded, header, geometry, stack.next)
                stack.keep()
        except PictureError as error:
            raise origin.fault(str(error)) from None
        return geometry


def _unreadable(error: OSError, shard: str) -> str:
    if isinstance(error, RemoteError):
        return str(error)
    return f"{error.filename or shard}: shard cannot be read any more ({error.strerror}); check the file"


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


class Stream:
    """The batches that one rank of `world_size` gets from `shards`.

    `batches(start)` of a training stream goes on without end from iteration `start` of the run; of a validation stream it is one
    pass in which every sample is seen once by exactly one rank. pin: batches in page-locked memory, for a GPU. Raises InputError
    where the data is at fault.
    """

    def __init__(self, shards: Shards, data, seed: int, train: bool, rank: int = 0, world_size: int = 1, pin: bool = False):
        if data.global_batch % world_size:
            raise InputError(
                f"key 'data.global_batch': {data.global_batch} pictures cannot be divided evenly among {world_size} processes; "
                f"the nearest that can is {max(1, round(data.global_batch / world_size)) * world_size}"
            )
        self.shards, self.samples = shards, shards.samples
        self.steps_per_epoch, self.dropped = divmod(self.samples, data.global_batch)
        if train and not self.steps_per_epoch:
            raise InputError(
                f"key 'data.global_batch': a step takes {data.global_batch} pictures, but '{shards.key}' holds {self.samples}; "
                f"lower it or add shards"
            )
        self._slices = Slices(shards, data, seed, train, rank, world_size)
        together = data.shuffle_shards if train else 1
        self._ahead = shards.ahead(self._slices.first_uses, together, downloads=max(1, 4 // max(1, data.workers)))
        self._loader = DataLoader(
            Pictures(shards, data, seed, train, self._ahead),
            batch_sampler=self._slices,
            num_workers=data.workers,
            collate_fn=_as_it_is,
            pin_memory=pin,
            persistent_workers=data.workers > 0,
            worker_init_fn=_begin_loader,
            # What torch's own generator has to say is for networks: a resumed run reads anew, and must not draw from it for that.
            generator=torch.Generator().manual_seed(seed),
        )

    def batches(self, start: int = 0) -> Iterator[Batch]:
        self._slices.start = start
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise InputError(str(batch), local=True)
            yield batch


def _as_it_is(batch):
    return batch


def _begin_loader(_worker: int) -> None:
    torch.set_num_threads(1)
    # They may reach all processes of a terminal or a job; what becomes of a loader is for the process that it loads for to say.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loaders() -> None:
    """Python would ask them to end by SIGTERM and wait for that."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dnal_dist.stream", description="What a run's stream of samples was.")
    parser.add_argument("--audit", metavar="RUN", type=Path, required=True, help="check a run folder's receipts against its shards")
    # What it needs is not needed to train.
    from dnal_dist.audit import audit

    try:
        sys.exit(audit(parser.parse_args().audit))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
