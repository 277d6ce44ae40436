"""The stream of batches that one rank trains on."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnal_dist.common.errors import InputError
from dnal_dist.data import nvjpeg, receipts
from dnal_dist.data.images import Geometry, ImageError, Stack, Transform, read_header, render
from dnal_dist.data.nvjpeg import Encoded
from dnal_dist.data.order import Place, Slices
from dnal_dist.data.prefetch import Prefetcher
from dnal_dist.data.remote import RemoteError
from dnal_dist.data.shards import Origin, Shards
from dnal_dist.data.tar import Fault


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


class Images(Dataset):
    """Decoded images by their place. A list of places gives a Batch, or the InputError that stops the run, as a value: an
    exception would arrive from a loader process as a page of traceback."""

    def __init__(self, shards: Shards, data, seed: int, train: bool, ahead: Prefetcher | None = None):
        self.shards, self.train, self.size, self.transform = shards, train, data.image_size, Transform(data, seed, train)
        self.ahead, self.on_device = ahead, train and data.decode == "cuda"

    def __getitems__(self, wanted: list[Place]) -> Batch | InputError:
        stack, waiting, labels, flips, origins, bad = Stack(len(wanted), self.size), nvjpeg.Waiting(), [], [], [], []
        if self.ahead is not None:
            self.ahead.at(wanted[0].batch)
        for place in wanted:
            try:
                sample, origin = self.shards.take(place.index, place.position)
                geometry = self._image(sample.image, place, origin, stack, waiting, len(labels))
            except Fault as fault:
                bad.append(fault)
                continue
            except OSError as error:
                return InputError(_unreadable(error, self.shards.where(place.index)[0]))
            labels.append(sample.label)
            flips.append(geometry.flip)
            origins.append(origin)
        if self.train and not labels:
            # BatchNorm's statistics of no image at all would be no numbers.
            return InputError(f"{bad[0]}: no image of a batch of {len(wanted)} can be used; mend the shards")
        label, flip = torch.tensor(labels, dtype=torch.long), torch.tensor(flips, dtype=torch.bool)
        keys, tally = [origin.key for origin in origins], receipts.tally(origins)
        return Batch(stack.images, label, flip, keys, bad, tally, waiting.encoded() if self.on_device else None)

    def _image(self, encoded: bytes, place: Place, origin: Origin, stack: Stack, waiting: nvjpeg.Waiting, row: int) -> Geometry:
        """Decode an image onto `stack`, or leave it for the device to put it into the batch's `row`."""
        try:
            header = read_header(encoded)
            geometry = self.transform.plan(header, place.epoch, place.index)
            if self.on_device and nvjpeg.takes(header, encoded):
                waiting.add(encoded, row, geometry, origin)
            else:
                render(encoded, header, geometry, stack.next)
                stack.keep()
        except ImageError as error:
            raise origin.fault(str(error)) from None
        return geometry


def _unreadable(error: OSError, shard: str) -> str:
    if isinstance(error, RemoteError):
        return str(error)
    return f"{error.filename or shard}: shard cannot be read any more ({error.strerror}); check the file"


class Stream:
    """The batches that one rank of `world_size` gets from `shards`.

    `batches(start)` of a training stream goes on without end from iteration `start` of the run; of a validation stream it is one
    pass in which every sample is seen once by exactly one rank. pin: batches in page-locked memory, for a GPU. Raises InputError
    where the data is at fault.
    """

    def __init__(self, shards: Shards, data, seed: int, train: bool, rank: int = 0, world_size: int = 1, pin: bool = False):
        if data.global_batch % world_size:
            raise InputError(
                f"key 'data.global_batch': {data.global_batch} images cannot be divided evenly among {world_size} processes; "
                f"the nearest that can is {max(1, round(data.global_batch / world_size)) * world_size}"
            )
        self.shards, self.samples = shards, shards.samples
        self.steps_per_epoch, self.dropped = divmod(self.samples, data.global_batch)
        if train and not self.steps_per_epoch:
            raise InputError(
                f"key 'data.global_batch': a step takes {data.global_batch} images, but '{shards.key}' holds {self.samples}; "
                f"lower it or add shards"
            )
        self._slices = Slices(shards, data, seed, train, rank, world_size)
        together = data.shuffle_shards if train else 1
        self._ahead = shards.ahead(self._slices.first_uses, together, downloads=max(1, 4 // max(1, data.workers)))
        self._loader = DataLoader(
            Images(shards, data, seed, train, self._ahead),
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
