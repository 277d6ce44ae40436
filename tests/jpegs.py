"""JPEGs as smooth as photographs, and a shard of all kinds of them."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def drawn(rng: np.random.Generator, height: int, width: int, mode: str = "RGB", smooth: int = 16) -> Image.Image:
    """Blobs of a few colours: as smooth as photographs are."""
    grid = rng.integers(0, 256, (max(2, height // smooth), max(2, width // smooth), 3), np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 90} | options)
    return file.getvalue()


def shard(folder: Path) -> Path:
    """`folder` with a shard of 24 JPEGs of many shapes; among them one that is grey, CMYK or RGB, two that EXIF turns, a PNG, and
    number 9 cut short."""
    path, rng = folder / "train-000000.tar", np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(24):
            height, width = rng.integers(40, 200, 2).tolist()
            exif = Image.Exif()
            exif[0x0112] = {10: 6, 11: 3}.get(i, 1)
            image = drawn(rng, height, width, {3: "L", 5: "CMYK"}.get(i, "RGB"))
            encoded = jpeg(image, "PNG") if i == 7 else jpeg(image, exif=exif, **{"keep_rgb": True} if i == 8 else {})
            tar.write({"__key__": f"{i:02d}", "jpg": encoded[: len(encoded) // 2 if i == 9 else None], "cls": str(i % 10).encode()})
    index = {"shards": [{"file": path.name, "samples": 24, "bytes": path.stat().st_size}], "classes": []}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
