"""Images as encoders and the stock transforms make them."""

import io

import numpy as np
from PIL import Image

from dnal_dist.recipe import Augmentation, Data


def settings(kind: str = "none", image_size: int = 24, **changes) -> Data:
    augmentation = Augmentation(kind=kind, **changes.pop("augmentation", {}))
    return Data(train="t", val="v", image_size=image_size, augmentation=augmentation, global_batch=1, **changes)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth with some edges and noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    noisy[height // 3 : height // 2, width // 4 : width // 2] //= 2
    return noisy.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **{"quality": 90} | options if kind == "JPEG" else options)
    return file.getvalue()


def stock(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")
