"""CIFAR-10, from the binary version of its archive."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from data_tools.archive import contents
from data_tools.images import write_pixels

FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}
NAMES = "batches.meta.txt"
FOLDER = "cifar-10-batches-bin"
PYTHON_FOLDER, PYTHON_FILE = "cifar-10-batches-py", "batches.meta"
RECORDS = 10_000
PIXELS = 3 * 32 * 32
MOST_BYTES = 40 << 20
TAKE = "take cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10(source: Path, folder: Path, shard_samples: int = 5000, workers: int = 1, overwrite: bool = False) -> dict[str, int]:
    """CIFAR-10: 50 000 training and 10 000 validation images, 32x32 RGB, 10 classes, as PNG; from the archive
    cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) or its unpacked folder. Nothing is unpacked to disk.
    Returns the number of samples of each split. Raises ValueError for any other archive."""
    content_of = _files(source)
    _refuse_missing(source, content_of)
    classes = content_of[NAMES].decode("ascii", "replace").split()
    if len(classes) != 10:
        raise ValueError(f"{source}: {NAMES} names {len(classes)} classes, expected CIFAR-10's 10; {TAKE}")
    arrays = {}
    for split, files in FILES.items():
        batches = [_batch(source, file, content_of[file]) for file in files]
        arrays[split] = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
    return write_pixels("cifar10", arrays, classes, folder, shard_samples, workers, overwrite)


def _batch(source: Path, file: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (RECORDS, 32, 32, 3), and labels, uint8 (RECORDS,)."""
    expected = RECORDS * (1 + PIXELS)
    if len(data) != expected:
        than = "less" if len(data) < expected else "more"
        raise ValueError(f"{source}: {file} holds {than} than {RECORDS} records of {1 + PIXELS} bytes; download it again")
    # A record is its label and then its planes, red, green and blue.
    records = np.frombuffer(data, np.uint8).reshape(RECORDS, 1 + PIXELS)
    if (highest := records[:, 0].max()) > 9:
        raise ValueError(f"{source}: {file} holds a label of {highest}, expected 0 to 9; download it again")
    return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), records[:, 0]


def _refuse_missing(source: Path, names: Collection[str]) -> None:
    missing = [name for name in (NAMES, *FILES["train"], *FILES["val"]) if name not in names]
    if missing and PYTHON_FILE in names:
        raise ValueError(f"{source}: the Python version of CIFAR-10, whose pickled batches are not read; {TAKE}")
    if missing:
        raise ValueError(f"{source}: holds no {missing[0]}; {TAKE}")


def _files(source: Path) -> dict[str, bytes]:
    """The content of each file that is there, in the archive or its folder, up to MOST_BYTES."""
    wanted = (NAMES, *FILES["train"], *FILES["val"], PYTHON_FILE)
    if not source.is_dir():
        return contents(source, wanted, MOST_BYTES, TAKE)
    inner = next((source / name for name in (FOLDER, PYTHON_FOLDER) if (source / name).is_dir()), source)
    found = {}
    for path in (inner / name for name in wanted):
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = file.read(MOST_BYTES)
    return found
