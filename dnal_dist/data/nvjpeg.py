"""JPEGs decoded, cut and resized on an NVIDIA GPU, by nvJPEG through torchvision (`data.decode: cuda`).

Loader processes only read headers and settle each image's geometry; encoded JPEGs travel to the device's process. What nvJPEG
cannot take (PNG, CMYK and RGB JPEGs, files without their end) is decoded by the loader processes as ever, and what it refuses is
decoded on the CPU then. Validation always decodes on the CPU, since its bits count.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dnal_dist.common.errors import InputError
from dnal_dist.data import receipts
from dnal_dist.data.images import Geometry, Header, ImageError, read_header, render
from dnal_dist.data.shards import Origin


class Encoded(NamedTuple):
    """The JPEGs of a batch that wait for the device."""

    data: Tensor
    """Their bytes one after the other, uint8."""
    sizes: list[int]
    places: list[int]
    """Where in the batch each belongs, ascending."""
    geometries: list[Geometry]
    origins: list[Origin]
    """Of what may turn out to be no image."""


class Waiting:
    """JPEGs that a loader process gathers for the device."""

    def __init__(self):
        self.jpegs, self.places, self.geometries, self.origins = [], [], [], []

    def add(self, jpeg: bytes, place: int, geometry: Geometry, origin: Origin) -> None:
        self.jpegs.append(jpeg)
        self.places.append(place)
        self.geometries.append(geometry)
        self.origins.append(origin)

    def encoded(self) -> Encoded:
        data = torch.frombuffer(bytearray(b"".join(self.jpegs)) or bytearray(1), dtype=torch.uint8)
        return Encoded(data, [len(jpeg) for jpeg in self.jpegs], self.places, self.geometries, self.origins)


def takes(header: Header, encoded: bytes) -> bool:
    """Whether nvJPEG is asked. Without its end a JPEG is half an image, which nvJPEG need not say."""
    return header.colours in ("YCbCr", "Gray") and encoded.rstrip(b"\0").endswith(b"\xff\xd9")


def require(device: torch.device) -> None:
    """Raise InputError unless JPEGs can be decoded on `device`: otherwise all of them would fall back to the CPU one by one."""
    if device.type != "cuda":
        raise InputError(f"key 'data.decode': cuda needs an NVIDIA GPU, and this run computes on the {device.type}; set it to cpu")
    try:
        _decode([torch.frombuffer(bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))), dtype=torch.uint8)], device)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"key 'data.decode': this torchvision cannot decode JPEGs by nvJPEG ({reason}); set it to cpu") from None


def finish(batch, size: int, device: torch.device):
    """`batch` of a stream with its images complete on `device`, uint8 (n, 3, size, size); what is no image is left out and told.

    Raises InputError if no image is left.
    """
    encoded, count = batch.encoded, len(batch.labels)
    jpegs = list(encoded.data[: sum(encoded.sizes)].split(encoded.sizes)) if encoded.sizes else []
    images = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    waiting, bad, lost = set(encoded.places), [], {}
    if done := [place for place in range(count) if place not in waiting]:
        images[torch.tensor(done, device=device)] = batch.images.to(device, non_blocking=True)
    for i, image in enumerate(_decoded(jpegs, device)):
        geometry, place = encoded.geometries[i], encoded.places[i]
        try:
            if image is not None and tuple(image.shape[1:]) == tuple(geometry.own):
                images[place] = cut(image, geometry, size)
            else:
                images[place] = _on_the_cpu(jpegs[i].numpy().tobytes(), geometry, size).to(device)
        except ImageError as error:
            bad.append(encoded.origins[i].fault(str(error)))
            lost[place] = encoded.origins[i]
    if len(lost) == count:
        raise InputError(f"{bad[0]}: no image of a batch of {count} can be used; mend the shards", local=True)
    return _without(batch._replace(images=images, bad=batch.bad + bad, encoded=None), lost)


def cut(image: Tensor, geometry: Geometry, size: int) -> Tensor:
    """uint8 (3, height, width) at full scale -> uint8 (3, size, size), on the image's device."""
    if tuple(geometry.whole) != tuple(geometry.own):
        image = TF.resize(image, list(geometry.whole), antialias=True)
    top, left, height, width = geometry.part
    image = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    down, right = geometry.shift
    # Beyond the edges a crop is black.
    return image if not down and not right else TF.crop(image, down, right, size, size)


def _decoded(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Each uint8 (3, height, width) on `device`, or None if it is refused."""
    if not jpegs:
        return []
    try:
        return _decode(jpegs, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # One refusal is all that is told of the whole list.
        return [_decoded([jpeg], device)[0] for jpeg in jpegs] if len(jpegs) > 1 else [None]


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    return decode_jpeg(jpegs, ImageReadMode.RGB, device)


def _on_the_cpu(jpeg: bytes, geometry: Geometry, size: int) -> Tensor:
    out = np.empty((size, size, 3), np.uint8)
    render(jpeg, read_header(jpeg), geometry, out)
    return torch.from_numpy(out).permute(2, 0, 1)


def _without(batch, lost: dict[int, Origin]):
    if not lost:
        return batch
    kept = [place for place in range(len(batch.labels)) if place not in lost]
    where = torch.tensor(kept)
    images = batch.images[where.to(batch.images.device)]
    keys = [batch.keys[place] for place in kept]
    tally = receipts.without(batch.tally, lost.values())
    return batch._replace(images=images, labels=batch.labels[where], flips=batch.flips[where], keys=keys, tally=tally)
