"""Drawn images of any size and number, to try everything at the scale of ImageNet without ImageNet."""

import functools
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_tools.record import Record
from data_tools.writing import Sample, Split, shards_for, write

SPLITS = ("train", "val")
# (fraction, width, height) of images, where a typical longer side is 1, about as in ImageNet. The rest have any smaller size.
SIZES = ((0.50, 1.0, 0.75), (0.20, 1.0, 0.667), (0.15, 0.75, 1.0), (0.05, 0.667, 1.0), (0.03, 2.0, 1.5))
QUALITY = 90


def synthetic(
    folder: Path,
    classes: int = 100,
    train: int = 50_000,
    val: int = 5_000,
    size: int = 500,
    seed: int = 0,
    shard_samples: int = 5000,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, int]:
    """Drawn JPEGs with the sizes of ImageNet's images. A class sets colours, the shape of a blob and two textures; a sample sets
    position, size, angle, light and noise. An image depends only on --seed, split and number; classes have equal counts (+-1).
    Returns the number of samples of each split."""
    for name, value, least in (("classes", classes, 1), ("train", train, classes), ("val", val, 1), ("size", size, 32)):
        if value < least:
            raise ValueError(f"--{name}: expected {least} or more, found {value}")
    options = {"kind": "synthetic", "classes": classes, "train": train, "val": val, "size": size, "seed": seed}
    record = Record(folder, {**options, "shard_samples": shard_samples}, overwrite)
    splits = {
        name: Split(range(count), Draw(seed, name, classes, size), shards_for(count, shard_samples))
        for name, count in zip(SPLITS, (train, val), strict=True)
    }
    digits = len(str(classes - 1))
    return write(record, splits, [f"class {number:0{digits}d}" for number in range(classes)], workers)


class Draw(NamedTuple):
    seed: int
    split: str
    classes: int
    size: int

    def __call__(self, number: int, _: int) -> Sample:
        label = number % self.classes
        rng = np.random.default_rng([self.seed, 1 + SPLITS.index(self.split), number])
        pixels = image(family(self.seed, label), rng, self.size)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=QUALITY)
        return f"{number:08d}", encoded.getvalue(), "jpg", label


class Family(NamedTuple):
    """Properties that the images of a class share."""

    ground: np.ndarray
    """Colour (3,), 0 to 255, as is the blob's."""
    blob: np.ndarray
    lobes: int
    depth: float
    """Depth of the notches between the lobes, as a fraction of the radius."""
    stripes: float
    """Waves across the blob; `ground_stripes`: across the image."""
    ground_stripes: float
    ground_angle: float


@functools.lru_cache(maxsize=4096)
def family(seed: int, label: int) -> Family:
    rng = np.random.default_rng([seed, 0, label])
    ground, blob = rng.uniform(40, 200, 3), rng.uniform(20, 235, 3)
    return Family(
        ground,
        blob,
        int(rng.integers(2, 9)),
        rng.uniform(0.1, 0.5),
        rng.uniform(1, 8),
        rng.uniform(2, 20),
        rng.uniform(0, np.pi),
    )


def image(family: Family, rng: np.random.Generator, size: int) -> np.ndarray:
    """One image of the family, uint8 (height, width, 3), with a typical longer side of `size` pixels."""
    width, height = _size(rng, size)
    # Shapes are drawn at half the size, four times as fast. Noise, on which JPEG spends its bytes, has the full size.
    h, w = (height + 1) // 2, (width + 1) // 2
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None] * np.float32(height / max(width, height))
    x = np.linspace(-1, 1, w, dtype=np.float32)[None, :] * np.float32(width / max(width, height))
    mask, stripes = _blob(family, rng, x, y)
    angle = family.ground_angle + rng.normal(0, 0.1)
    wave = np.sin(np.float32(np.pi * family.ground_stripes) * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6.28))
    light = 1 + np.float32(rng.uniform(-0.25, 0.25)) * x + np.float32(rng.uniform(-0.25, 0.25)) * y
    light *= np.float32(rng.uniform(0.7, 1.2))
    ground = (family.ground + rng.normal(0, 15, 3)).astype(np.float32)
    blob = (family.blob + rng.normal(0, 15, 3)).astype(np.float32)
    pixels = np.empty((h, w, 3), np.uint8)
    for channel in range(3):
        below = ground[channel] + 30 * wave
        shade = (below + mask * (blob[channel] + 35 * stripes - below)) * light
        pixels[..., channel] = np.clip(shade, 0, 255)
    return _noisy(np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)), rng)


def _size(rng: np.random.Generator, size: int) -> tuple[int, int]:
    drawn = rng.random()
    for fraction, width, height in SIZES:
        drawn -= fraction
        if drawn < 0:
            return round(size * width), round(size * height)
    width, height = rng.uniform(0.2, 0.9, 2)
    return max(16, round(size * width)), max(16, round(size * height))


def _blob(family: Family, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blob's mask, 0 to 1, and its stripes, -1 to 1, at x (1, w) and y (h, 1); both (h, w)."""
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6)
    x, y = x - np.float32(rng.uniform(-0.35, 0.35)), y - np.float32(rng.uniform(-0.25, 0.25))
    u = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    v = (y * np.cos(angle) - x * np.sin(angle)).astype(np.float32)
    outline = radius * (1 + np.float32(family.depth) * np.cos(family.lobes * np.arctan2(v, u)))
    mask = np.clip((outline - np.hypot(u, v)) * 40, 0, 1)
    return mask, np.sin(np.float32(np.pi * family.stripes / radius) * u)


@functools.cache
def _grain() -> np.ndarray:
    """Noise (1024, 1024, 3) to cut pieces from: drawing it for each image would take longer than all the rest."""
    return np.clip(np.random.default_rng(7).normal(0, 9, (1024, 1024, 3)), -60, 60).astype(np.int16)


def _noisy(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width, _ = pixels.shape
    grain = _grain()
    tiles = -(-(height + 256) // 1024), -(-(width + 256) // 1024)
    if max(tiles) > 1:
        grain = np.tile(grain, (*tiles, 1))
    top, left = rng.integers(0, 256, 2)
    noisy = pixels + grain[top : top + height, left : left + width]
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
