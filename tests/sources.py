"""Small data sets in the formats of the true ones, for data_tools.make_shards."""

import gzip
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

Truth = dict[str, tuple[np.ndarray, np.ndarray]]
"""Pictures (N, height, width, 3) and labels (N,) of each split."""

FASHION_MNIST = {"train": ("train", 12), "val": ("t10k", 5)}
"""In place of make_shards.FASHION_MNIST."""

CIFAR10_RECORDS = 6
"""In place of make_shards.CIFAR10_RECORDS."""

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def fashion_mnist(folder: Path) -> Truth:
    """Write idx files to the new `folder`, training files gzipped and validation files not. Returns what they hold."""
    folder.mkdir()
    rng, truth = np.random.default_rng(0), {}
    for split, (prefix, count) in FASHION_MNIST.items():
        pictures, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            suffix = ".gz" if split == "train" else ""
            (folder / f"{prefix}-{name}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
        truth[split] = np.repeat(pictures[..., None], 3, axis=3), labels
    return truth


def cifar10(folder: Path) -> Truth:
    """Write CIFAR-10's binary version, of CIFAR10_RECORDS records a file, to the new `folder`. Returns what it holds."""
    folder.mkdir()
    rng, each = np.random.default_rng(1), CIFAR10_RECORDS
    pictures, labels = rng.integers(0, 256, (6 * each, 32, 32, 3), np.uint8), rng.integers(0, 10, 6 * each).astype(np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        part = slice(each * i, each * i + each)
        planes = pictures[part].transpose(0, 3, 1, 2).reshape(each, 3072)
        (folder / name).write_bytes(np.concatenate([labels[part, None], planes], axis=1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    return {"train": (pictures[: 5 * each], labels[: 5 * each]), "val": (pictures[5 * each :], labels[5 * each :])}


def archived(folder: Path, prefix: str = "cifar-10-batches-bin/") -> Path:
    """The files of `folder` as a tar.gz beside it, in another order than they are read in."""
    path = folder.parent / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder.iterdir(), reverse=True):
            tar.add(file, prefix + file.name)
    return path


def imagenet(folder: Path, classes: int = 10) -> None:
    """Write folders of JPEGs of many sizes to `folder`, two a class for training, one for validation. As in ImageNet one is grey,
    one is CMYK, and one is a PNG for all that its name says."""
    rng = np.random.default_rng(2)
    for split, count in (("train", 2), ("val", 1)):
        for c in range(classes):
            name = f"n{1440764 + 7919 * c:08d}"
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(30, 200, 2)
                pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
                mode, kind = {(0, 0): ("L", "JPEG"), (1, 0): ("CMYK", "JPEG"), (2, 0): ("RGB", "PNG")}.get((c, i), ("RGB", "JPEG"))
                pixels.convert(mode).save(folder / split / name / f"{name}_{i}.JPEG", kind)
