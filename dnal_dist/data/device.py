"""Batches onto the device: copied, mirrored and normalised there, on a GPU beside the step that trains.

No batch is taken from the stream before it is asked for, so closing a feed loses none and the position in the stream is the number
of batches that were given. That costs no overlap on a GPU: a training loop asks for the next batch when it has queued a step, not
when the step is done, and the copy goes from page-locked memory over a CUDA stream of its own.
"""

import contextlib
import functools
import time
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from dnal_dist.data import nvjpeg
from dnal_dist.data.images import normalise
from dnal_dist.data.pipeline import Batch

# Labels that torch's cross-entropy leaves out.
IGNORED = -100


class Fed(NamedTuple):
    """A batch on the device."""

    images: Tensor
    """float32 (n, 3, H, W), normalised and mirrored."""
    labels: Tensor
    """int64 (n,); -100 for an image that only fills."""
    batch: Batch
    """What it came from."""
    waited: float
    """Seconds until the stream had it."""


def feed(
    batches: Generator[Batch],
    data,
    device: torch.device,
    fill: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Generator[Fed]:
    """The batches on `device`, as the recipe's part `data` says. Closing it closes `batches`; what they raise passes.

    fill: a batch that lost samples is filled up to so many, with images that it has, labelled to count for nothing. Processes
    then take the same parts of a batch at any time, whatever each of them had to skip.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    with contextlib.closing(batches):
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            waited = time.monotonic() - asked
            move = _moved if side is None else functools.partial(_moved_beside, side=side)
            images, labels, batch = move(batch, data, device, memory_format)
            if 0 < (count := len(labels)) < fill:
                images = images[torch.arange(fill, device=device) % count]
                labels = torch.cat([labels, labels.new_full((fill - count,), IGNORED)])
            yield Fed(images, labels, batch, waited)


def _moved(batch: Batch, data, device: torch.device, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, Batch]:
    if batch.encoded is not None:
        batch = nvjpeg.finish(batch, data.image_size, device)
    images, labels, flips = (part.to(device, non_blocking=True) for part in (batch.images, batch.labels, batch.flips))
    return normalise(images, data.mean, data.std, flips, memory_format=memory_format), labels, batch


def _moved_beside(
    batch: Batch, data, device: torch.device, memory_format: torch.memory_format, side: torch.cuda.Stream
) -> tuple[Tensor, Tensor, Batch]:
    """As `_moved`, on the CUDA stream `side`; what the caller's own stream does from here on comes after it."""
    own = torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        images, labels, batch = _moved(batch, data, device, memory_format)
    own.wait_stream(side)
    for tensor in (images, labels):
        # Made on one stream and used on another: its memory must not be given away before the other is done with it.
        tensor.record_stream(own)
    return images, labels, batch
