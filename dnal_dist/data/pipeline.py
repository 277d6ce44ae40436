"""The webdataset pipeline of one rank: samples in the global order, decoded, in batches.

    DataPipeline(SamplesInOrder, map(Decoder), batches)     in each loader process
    WebLoader(DataPipeline)                                  which takes a batch from each of them in turn

Only the first stage is unlike any other webdataset pipeline: which sample comes next is a function of seed and epoch, and samples
are read by their number. Nothing goes through webdataset's own openers and decoders, which can run programs.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import get_worker_info

from dnal_dist import recipe
from dnal_dist.common.errors import InputError, reason
from dnal_dist.data import nvjpeg, receipts
from dnal_dist.data.decoding import Header
from dnal_dist.data.downloads import prefetcher
from dnal_dist.data.images import Geometry, Transform
from dnal_dist.data.kept import Kept, KeptImage, kept_for
from dnal_dist.data.loader import loader_of, settled, shared
from dnal_dist.data.nvjpeg import Encoded
from dnal_dist.data.order import GlobalOrder, Place
from dnal_dist.data.policy import Policy, policy_for
from dnal_dist.data.prefetch import Prefetcher
from dnal_dist.data.remote import RemoteError
from dnal_dist.data.samples import Fault
from dnal_dist.data.shards import Origin, Shards
from dnal_dist.recipe import Data


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
    with_alpha: int = 0
    """Images with an alpha channel, which lie on the recipe's background."""


class Item(NamedTuple):
    """A sample on its way into a batch."""

    place: Place
    fault: Fault | None = None
    """Why it cannot be used; the rest is then missing."""
    origin: Origin | None = None
    label: int = 0
    image: bytes | np.ndarray = b""
    """Encoded, or uint8 (H, W, 3)."""
    kept: Header | None = None
    """Of an image that is kept: `image` is what it is in every epoch."""
    geometry: Geometry | None = None
    alpha: bool = False


class SamplesInOrder:
    """The first stage: samples in the global order, from batch `start` of the run on, which may be set between two passes. Those
    that are kept are not read again."""

    def __init__(self, shards: Shards, order: GlobalOrder, ahead: Prefetcher | None, kept: Kept):
        self.shards, self.order, self.ahead, self.kept = shards, order, ahead, kept
        # In memory that loader processes share: they outlive a pass.
        self.start = multiprocessing.RawValue("q", 0)

    def __call__(self) -> Iterator[Item]:
        """Raises InputError for a shard that cannot be read."""
        worker, batch = get_worker_info(), -1
        for place in self.order.places(self.start.value, *((worker.id, worker.num_workers) if worker else ())):
            if self.ahead is not None and place.batch != batch:
                batch = place.batch
                self.ahead.at(batch)
            if (known := self.kept.get(place.index)) is not None:
                origin = self.shards.origin(place.index, place.position, known.key)
                yield Item(place, None, origin, known.label, known.pixels, known.header)
                continue
            try:
                sample, origin = self.shards.take(place.index, place.position)
            except Fault as fault:
                yield Item(place, fault)
            except RemoteError as error:
                raise InputError(str(error)) from None
            except OSError as error:
                shard = error.filename or self.shards.where(place.index)[0]
                raise InputError(f"{shard}: shard cannot be read any more ({error.strerror}); check the file") from None
            else:
                yield Item(place, None, origin, sample.label, sample.image)


class Decoder:
    """The stage from encoded to decoded images, which `kept` keeps; on_device: plain JPEGs are left to the device."""

    def __init__(self, transform: Transform, on_device: bool, kept: Kept, policy: Policy | None = None):
        self.transform, self.on_device, self.kept, self.policy = transform, on_device, kept, policy

    def __call__(self, item: Item) -> Item:
        if item.fault is not None:
            return item
        try:
            header = item.kept or self.transform.header(item.image)
            geometry = self.transform.plan(header, item.place.epoch, item.place.draw)
            if self.on_device and nvjpeg.takes(header, item.image):
                return item._replace(geometry=geometry)
            pixels = self._pixels(item, header, geometry)
            if self.policy is not None:
                pixels = self.policy(pixels, item.place.epoch, item.place.draw)
            return item._replace(image=pixels, geometry=geometry, alpha=header.alpha)
        except Exception as error:  # ImageError, and whatever else an image may do to a decoder
            return Item(item.place, item.origin.fault(reason(error)))

    def _pixels(self, item: Item, header: Header, geometry: Geometry) -> np.ndarray:
        fixed = item.image
        if item.kept is None:
            if not self.kept.limit or (fixed := self.transform.fixed(item.image, header, geometry)) is None:
                return self.transform.render(item.image, header, geometry)
            self.kept.put(item.place.index, KeptImage(item.origin.key, item.label, header, fixed))
        return self.transform.vary(fixed, geometry)


class Batches:
    """The stage from images to batches; with train, a batch of which no image is left is an InputError."""

    def __init__(self, size: int, train: bool, on_device: bool):
        self.size, self.train, self.on_device = size, train, on_device

    def __call__(self, items: Iterable[Item]) -> Iterator[Batch]:
        gathered: list[Item] = []
        for item in items:
            gathered.append(item)
            # Not with the next item, as in webdataset's own stage: a batch does not wait for what comes behind it.
            if item.place.last:
                yield self.batch(gathered)
                gathered = []

    def batch(self, items: list[Item]) -> Batch:
        good, bad = [item for item in items if item.fault is None], [item.fault for item in items if item.fault is not None]
        if self.train and not good:
            # BatchNorm's statistics of no image at all would be no numbers.
            raise InputError(f"{bad[0]}: no image of a batch of {len(items)} can be used; mend the shards")
        return Batch(
            self.stacked([item.image for item in good if not isinstance(item.image, bytes)]),
            torch.tensor([item.label for item in good], dtype=torch.long),
            torch.tensor([item.geometry.flip for item in good], dtype=torch.bool),
            [item.origin.key for item in good],
            bad,
            receipts.tally(item.origin for item in good),
            self._encoded(good) if self.on_device else None,
            sum(item.alpha for item in good),
        )

    def stacked(self, images: list[np.ndarray]) -> Tensor:
        """uint8 (n, 3, H, W), in channels_last memory."""
        stack = torch.empty(len(images), self.size, self.size, 3, dtype=torch.uint8)
        if images and get_worker_info() is not None:
            stack = shared(stack)
        for row, image in zip(stack.numpy(), images, strict=True):
            row[...] = image
        return stack.permute(0, 3, 1, 2)

    def _encoded(self, good: list[Item]) -> Encoded:
        rows = [row for row, item in enumerate(good) if isinstance(item.image, bytes)]
        chosen = [good[row] for row in rows]
        return nvjpeg.pack([i.image for i in chosen], rows, [i.geometry for i in chosen], [i.origin for i in chosen])


class Stream:
    """The batches that one rank of `world_size` gets from `shards`.

    `batches(start)` of a training stream goes on without end from iteration `start` of the run; of a validation stream it is one
    pass in which every sample is seen once by exactly one rank. pin: batches in page-locked memory, for a GPU. stages: further
    stages of the pipeline in the loader processes, from a Batch to a Batch. Raises InputError where the data is at fault.
    """

    def __init__(
        self,
        shards: Shards,
        data: Data,
        seed: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        stages: Sequence[Callable[[Iterable[Batch]], Iterable[Batch]]] = (),
    ):
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
        order, on_device = GlobalOrder(shards, data, seed, train, rank, world_size), train and data.decode == "cuda"
        workers, note = settled(data.workers)
        self.notes = [*shards.notes, *([note] if note else [])]
        """What is right but worth knowing, one line each."""
        self.with_alpha, self.warned_of_alpha = 0, False
        """Images with an alpha channel among those given so far."""
        self.ahead, transform = prefetcher(shards, order, workers), Transform(data, seed, train)
        kept = Kept() if on_device else kept_for(shards.samples, shards.bytes, data, transform.kind == "resized_crop")
        self.first_stage = SamplesInOrder(shards, order, self.ahead, kept)
        self.pipeline = webdataset.DataPipeline(
            self.first_stage,
            webdataset.map(Decoder(transform, on_device, kept, policy_for(data, seed) if train else None)),
            Batches(data.image_size, train, on_device),
            *stages,
        )
        self.loader = loader_of(self.pipeline, workers, seed, pin)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        self.first_stage.start.value = start
        for batch in self.loader:
            self.with_alpha += batch.with_alpha
            yield batch


def stream(
    shards: str,
    image_size: int,
    global_batch: int,
    *,
    train: bool = True,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_classes: int | None = None,
    stages: Sequence[Callable[[Iterable[Batch]], Iterable[Batch]]] = (),
    **data,
) -> webdataset.WebLoader:
    """Batches of `shards` (paths or patterns as in a recipe) without a recipe: a webdataset pipeline, to which stages may be
    appended by `.map`, `.select`, `.slice` and `.compose`. data: any other key of a recipe's section data, such as workers=4 or
    augmentation={"kind": "resized_crop"}. The rest is as in Stream. Raises InputError."""
    try:
        settings = Data(train=shards, val=shards, image_size=image_size, global_batch=global_batch, **data)
    except ValidationError as error:
        raise InputError(recipe.faults(error, Data)) from None
    found = Shards(shards, "shards", num_classes, settings)
    made = Stream(found, settings, seed, train, rank, world_size, stages=stages)
    made.first_stage.start.value = start
    return made.loader
