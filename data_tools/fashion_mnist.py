"""Fashion-MNIST, from its four idx files."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from data_tools.images import write_pixels

FILES = {"train": ("train", 60_000), "val": ("t10k", 10_000)}
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mnist(
    folder: Path, source: Path = SOURCE, shard_samples: int = 5000, workers: int = 1, overwrite: bool = False
) -> dict[str, int]:
    """Fashion-MNIST: 60 000 training and 10 000 validation images of clothes, 28x28 grey, 10 classes, as PNG; from its four idx
    files (https://github.com/zalandoresearch/fashion-mnist), gzipped or not. Returns the number of samples of each split."""
    arrays = {}
    for split, (prefix, count) in FILES.items():
        images = _idx(source, f"{prefix}-images-idx3-ubyte", (count, 28, 28))
        labels = _idx(source, f"{prefix}-labels-idx1-ubyte", (count,))
        if labels.max() > 9:
            raise ValueError(
                f"{source}: a label of {labels.max()} for the {split} images, expected 0 to 9; take the original files"
            )
        arrays[split] = images, labels
    return write_pixels("fashion_mnist", arrays, CLASSES, folder, shard_samples, workers, overwrite)


def _idx(source: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of `shape` in source/name.gz or source/name, in the idx format of MNIST.

    Raises ValueError if the file is missing, damaged or holds anything else.
    """
    path = next((path for path in (source / f"{name}.gz", source / name) if path.exists()), None)
    if path is None:
        raise ValueError(
            f"{source / name}.gz: no such file; Debian's package dataset-fashion-mnist has it, and so has "
            f"https://github.com/zalandoresearch/fashion-mnist; name its folder by --source"
        )
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as 4 bytes, the values.
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            found, values = file.read(len(header)), file.read(math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    expected = " x ".join(map(str, shape))
    if found != header:
        raise ValueError(f"{path}: begins with {found.hex(' ')}, expected the idx header of {expected} bytes, {header.hex(' ')}")
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{path}: holds {'less' if len(values) < math.prod(shape) else 'more'} than {expected} bytes; copy it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
