"""From an encoded image to a square of a batch: header, geometry, decode, crop and resize; uint8 throughout.

The geometry follows from the header alone, before a pixel is decoded: an image of too many pixels is refused then, and a JPEG that
will shrink by 2, 4 or 8 anyway is decoded at that scale, for a fraction of the time. Mirroring is only decided here: `normalise`
does it on the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dnal_dist.data.decoding import SMALLEST_REDUCED, WHITE, Header, check_size, decode, read_header


class Geometry(NamedTuple):
    """The way of one image: resized to `whole`, cut to `part`, that resized to a square of the image size, then shifted."""

    own: tuple[int, int]
    """The image's height and width."""
    whole: tuple[int, int]
    """The same if it is not resized as a whole."""
    part: tuple[int, int, int, int]
    """Top, left, height and width, within `whole`."""
    shift: tuple[int, int] = (0, 0)
    """Rows and columns by which the square moves up and left; black comes in."""
    flip: bool = False
    """To be mirrored left and right, on the device."""
    exact: bool = False
    """Every bit as Pillow and torchvision make it: at full scale, resized by Pillow."""


class Transform:
    """Encoded images to squares of `data.image_size`, uint8. Random changes depend on seed, epoch and index alone.

    Validation, and training without augmentation, give bit for bit what Pillow's decoder gives with torchvision's Resize and
    CenterCrop on Pillow's images.
    """

    def __init__(self, data, seed: int, train: bool):
        self.data, self.seed, self.train, self.size = data, seed, train, data.image_size
        self.kind = data.augmentation.kind if train else "none"

    def __call__(self, encoded: bytes, epoch: int, index: int) -> tuple[np.ndarray, bool]:
        """The image, uint8 (image_size, image_size, 3), and whether it is to be mirrored.

        Raises ImageError for what is no image, is cut short, or has more pixels than data.max_pixels.
        """
        header = self.header(encoded)
        geometry = self.plan(header, epoch, index)
        return self.render(encoded, header, geometry), geometry.flip

    def header(self, encoded: bytes) -> Header:
        return read_header(encoded, self.data.exif)

    def render(self, encoded: bytes, header: Header, geometry: Geometry) -> np.ndarray:
        return render(encoded, header, geometry, self.size, self.data.background)

    def fixed(self, encoded: bytes, header: Header, geometry: Geometry) -> np.ndarray | None:
        """What the image is in every epoch, uint8 (height, width, 3), from which `vary` makes that of one; None where how it is
        decoded depends on the part that is taken. Raises ImageError."""
        reduction = reduction_of(header, geometry._replace(part=(0, 0, *geometry.whole)), self.size)
        if geometry.whole == geometry.own and reduction > 1:
            return None
        whole = _resized(decode(encoded, header, reduction, self.data.background), geometry, reduction)
        return whole if self.kind == "resized_crop" else _part(whole, geometry, self.size)

    def vary(self, fixed: np.ndarray, geometry: Geometry) -> np.ndarray:
        """`render` from what `fixed` gave."""
        return _shifted(_part(fixed, geometry, self.size) if self.kind == "resized_crop" else fixed, *geometry.shift)

    def plan(self, header: Header, epoch: int, index: int) -> Geometry:
        """The geometry of an image with this header. Raises ImageError if it takes more than data.max_pixels pixels."""
        own, size, data, augmentation = (header.height, header.width), self.size, self.data, self.data.augmentation
        check_size(own, data.max_pixels)
        whole, shift, rng = own, (0, 0), None
        if self.train:
            # default_rng of these numbers, which takes twice as long to say so.
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, index))))
        shorter = {"none": data.resize or size, "pad_crop": size, "resized_crop": augmentation.resize}[self.kind]
        if shorter:
            whole = _with_shorter_side(own, shorter)
            # A line of one pixel by a thousand would grow to a thousand times its size.
            check_size(whole, data.max_pixels, f"resized from {own[1]} x {own[0]} to ")
        part = _centre(whole, size)
        if self.kind == "pad_crop":
            down, right = (int(rng.integers(0, 2 * augmentation.padding, endpoint=True)) for _ in range(2))
            shift = (down - augmentation.padding, right - augmentation.padding)
        elif self.kind == "resized_crop":
            part = _random_part(*whole, augmentation.scale, rng)
        flip = bool(self.train and augmentation.flip and rng.random() < 0.5)
        return Geometry(own, whole, part, shift, flip, exact=self.kind == "none")


def render(encoded: bytes, header: Header, geometry: Geometry, size: int, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Decode as much of an image as `geometry` needs; uint8 (size, size, 3). Raises ImageError."""
    reduction = reduction_of(header, geometry, size)
    return _shifted(_cut(decode(encoded, header, reduction, background), geometry, reduction, size), *geometry.shift)


def reduction_of(header: Header, geometry: Geometry, size: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves at least as many pixels as the first resizing gives.

    It is 1 where bits count, and for the smallest images.
    """
    own, whole = geometry.own, geometry.whole
    if geometry.exact or not header.plain or min(own) < SMALLEST_REDUCED:
        return 1
    (height, width), least = (own, whole) if whole != own else (geometry.part[2:], (size, size))
    return next(f for f in (8, 4, 2, 1) if f == 1 or (height >= f * least[0] and width >= f * least[1]))


def _cut(pixels: np.ndarray, geometry: Geometry, reduction: int, size: int) -> np.ndarray:
    """uint8 (height, width, 3), at a scale of 1 / reduction -> uint8 (size, size, 3)."""
    if geometry.whole == geometry.own and reduction > 1:
        top, left, height, width = geometry.part
        # Edges may lie within a reduced pixel, which torch cannot say.
        box = (left / reduction, top / reduction, (left + width) / reduction, (top + height) / reduction)
        return _resize_as_pillow(pixels, size, size, box)
    return _part(_resized(pixels, geometry, reduction), geometry, size)


def _resized(pixels: np.ndarray, geometry: Geometry, reduction: int) -> np.ndarray:
    """The image, at a scale of 1 / reduction, resized to geometry.whole."""
    own, whole = geometry.own, geometry.whole
    if whole == own:
        return pixels
    if geometry.exact or reduction > 1:
        return _resize_as_pillow(pixels, *whole, (0, 0, own[1] / reduction, own[0] / reduction))
    return _resize(pixels, *whole)


def _part(pixels: np.ndarray, geometry: Geometry, size: int) -> np.ndarray:
    """geometry.part of the image at geometry.whole, as a square of `size`."""
    top, left, height, width = geometry.part
    pixels = pixels[top : top + height, left : left + width]
    return pixels if pixels.shape[:2] == (size, size) else _resize(pixels, size, size)


def normalise(
    images: Tensor,
    mean,
    std,
    flips: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """uint8 (N, 3, H, W) -> (images / 255 - mean) / std in `memory_format`, on the images' own device, those mirrored whose `flips`
    (N,) is true."""
    # While it is a quarter of its size.
    images = images.contiguous(memory_format=memory_format)
    if flips is not None:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    # On a GPU without waiting for the copy of the images, which is queued before.
    mean, std = ((255 * torch.tensor(v)).view(3, 1, 1).to(images.device, non_blocking=True) for v in (mean, std))
    # In float32 whatever the result's type: 255 times a mean is no number of bfloat16.
    return images.to(torch.float32).sub_(mean).div_(std).to(dtype)


def _with_shorter_side(shape: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Height and width of `shape`, resized so that the shorter is `shorter`; rounded as torchvision's Resize does."""
    height, width = shape
    longer = int(shorter * max(shape) / min(shape))
    return (shorter, longer) if height <= width else (longer, shorter)


def _centre(shape: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the middle, rounded as torchvision's CenterCrop does."""
    return round((shape[0] - size) / 2), round((shape[1] - size) / 2), size, size


def _random_part(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """top, left, height, width of a random part: area in `scale`, aspect 3/4 to 4/3; the middle if ten tries do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(0, height - h, endpoint=True)), int(rng.integers(0, width - w, endpoint=True)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with antialiasing, uint8 (h, w, 3) -> uint8 (height, width, 3), three times as fast as Pillow."""
    # `view`, since NumPy's new axis has a stride of 0, by which torch does not see that the memory is channels_last.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).view(1, *pixels.shape).permute(0, 3, 1, 2)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def _resize_as_pillow(pixels: np.ndarray, height: int, width: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """The same, bit for bit as torchvision does it with Pillow's images. box: the part to take, left, upper, right, lower."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box))


def _shifted(square: np.ndarray, down: int, right: int) -> np.ndarray:
    """uint8 (size, size, 3) from row `down` and column `right` of `square` on; what lies outside is black."""
    if not down and not right:
        return square
    size, out = len(square), np.zeros_like(square)
    if max(abs(down), abs(right)) < size:
        rows, columns = (slice(max(0, by), min(size, size + by)) for by in (down, right))
        to_rows, to_columns = (slice(max(0, -by), min(size, size - by)) for by in (down, right))
        out[to_rows, to_columns] = square[rows, columns]
    return out
