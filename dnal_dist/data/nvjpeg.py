"""JPEGs decoded, cut and resized on an NVIDIA GPU, by nvJPEG through torchvision (`data.decode: cuda`).

Loader processes only read headers and plan each image's geometry; encoded JPEGs travel to the device's process. Images that nvJPEG
cannot decode (other kinds, CMYK and RGB JPEGs, files without their end, images that EXIF turns) are decoded by the loader
processes, and those that it refuses on the CPU of the device's process. Validation always decodes on the CPU, since its bits count.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from dnal_dist.common.errors import InputError
from dnal_dist.data import receipts
from dnal_dist.data.decoding import Header, ImageError, read_header
from dnal_dist.data.images import Geometry, render
from dnal_dist.data.shards import Origin


class Encoded(NamedTuple):
    """The JPEGs of a batch that wait for the device."""

    data: Tensor
    """Their bytes one after the other, uint8."""
    sizes: list[int]
    rows: list[int]
    """Where in the batch each belongs, ascending."""
    geometries: list[Geometry]
    origins: list[Origin]
    """For messages about those that turn out to be no image."""


def pack(jpegs: list[bytes], rows: list[int], geometries: list[Geometry], origins: list[Origin]) -> Encoded:
    data = torch.frombuffer(bytearray(b"".join(jpegs)) or bytearray(1), dtype=torch.uint8)
    return Encoded(data, [len(jpeg) for jpeg in jpegs], rows, geometries, origins)


def takes(header: Header, encoded: bytes) -> bool:
    """Whether nvJPEG is to decode it: neither without an end, where half the image may be missing, nor without a scan, which nvJPEG
    does not report."""
    usual = header.colours in ("YCbCr", "Gray") and header.orientation == 1
    return usual and b"\xff\xda" in encoded and encoded.rstrip(b"\0").endswith(b"\xff\xd9")


def require(device: torch.device) -> None:
    """Raise InputError unless JPEGs can be decoded on `device`: otherwise all of them would fall back to the CPU one by one."""
    if device.type != "cuda":
        raise InputError(f"key 'data.decode': cuda needs an NVIDIA GPU, and this run computes on the {device.type}; set it to cpu")
    try:
        decode([torch.frombuffer(bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))), dtype=torch.uint8)], device)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"key 'data.decode': this torchvision cannot decode JPEGs by nvJPEG ({reason}); set it to cpu") from None


def finish(batch, size: int, device: torch.device):
    """`batch` of a stream with its images complete on `device`, uint8 (n, 3, size, size); what is no image joins `bad`.

    Raises InputError if no image is left.
    """
    encoded, count = batch.encoded, len(batch.labels)
    jpegs = list(encoded.data[: sum(encoded.sizes)].split(encoded.sizes)) if encoded.sizes else []
    images = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    waiting, bad, lost = set(encoded.rows), [], {}
    if done := [row for row in range(count) if row not in waiting]:
        images[torch.tensor(done, device=device)] = batch.images.to(device, non_blocking=True)
    for i, image in enumerate(decoded(jpegs, device)):
        geometry, row = encoded.geometries[i], encoded.rows[i]
        try:
            if image is not None and tuple(image.shape[1:]) == tuple(geometry.own):
                images[row] = cut(image, geometry, size)
            else:
                images[row] = _on_the_cpu(jpegs[i].numpy().tobytes(), geometry, size).to(device)
        except ImageError as error:
            bad.append(encoded.origins[i].fault(str(error)))
            lost[row] = encoded.origins[i]
    if len(lost) == count:
        raise InputError(f"{bad[0]}: no image of a batch of {count} can be used; mend the shards", local=True)
    return _without(batch._replace(images=images, bad=batch.bad + bad, encoded=None), lost)


def cut(image: Tensor, geometry: Geometry, size: int) -> Tensor:
    """uint8 (3, height, width) at full scale -> uint8 (3, size, size), on the image's device."""
    import torchvision.transforms.v2.functional as TF

    if tuple(geometry.whole) != tuple(geometry.own):
        image = TF.resize(image, list(geometry.whole), antialias=True)
    top, left, height, width = geometry.part
    image = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    down, right = geometry.shift
    # Beyond the edges a crop is black.
    return image if not down and not right else TF.crop(image, down, right, size, size)


def decoded(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Each uint8 (3, height, width) on `device`, or None if it is refused."""
    if not jpegs:
        return []
    try:
        return decode(jpegs, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # It does not say which JPEG of the list it refuses.
        return [decoded([jpeg], device)[0] for jpeg in jpegs] if len(jpegs) > 1 else [None]


def decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(jpegs, ImageReadMode.RGB, device)


def _on_the_cpu(jpeg: bytes, geometry: Geometry, size: int) -> Tensor:
    return torch.from_numpy(render(jpeg, read_header(jpeg), geometry, size)).permute(2, 0, 1)


def _without(batch, lost: dict[int, Origin]):
    if not lost:
        return batch
    kept = [row for row in range(len(batch.labels)) if row not in lost]
    where = torch.tensor(kept)
    images = batch.images[where.to(batch.images.device)]
    keys = [batch.keys[row] for row in kept]
    tally = receipts.without(batch.tally, lost.values())
    return batch._replace(images=images, labels=batch.labels[where], flips=batch.flips[where], keys=keys, tally=tally)
