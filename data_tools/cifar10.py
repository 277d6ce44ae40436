"""CIFAR-10, from either of its official archives."""

import contextlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from data_tools import cifar10_batches
from data_tools.images import pixel_sample
from data_tools.record import Record, digest
from data_tools.writing import Split, shards_for, write

FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
RECORDS = 10_000
PIXELS = 3 * 32 * 32
# A file of the version for Python holds the names of its images too.
MOST_BYTES = 40 << 20
TAKE = "take cifar-10-binary.tar.gz or cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"

Batch = tuple[np.ndarray, np.ndarray]
"""uint8 (RECORDS, 3072), an image's red, green and blue plane after one another, and labels uint8 (RECORDS,)."""


def cifar10(source: Path, folder: Path, shard_samples: int = 5000, workers: int = 1, overwrite: bool = False) -> dict[str, int]:
    """CIFAR-10: 50 000 training and 10 000 validation images, 32x32 RGB, 10 classes, as PNG; from its "binary version" or its
    version for Python (https://www.cs.toronto.edu/~kriz/cifar.html), archive or folder. Nothing is unpacked to disk, and the
    version for Python is read without unpickling it. Returns the number of samples of each split."""
    with _files(source) as (names, read):
        binary = "data_batch_1.bin" in names or "batches.meta.txt" in names
        _refuse_missing(source, names, binary)
        classes = _binary_classes(source, read) if binary else _python_classes(source, read)
        batch = _binary_batch if binary else _python_batch
        found = {split: [batch(source, file, read) for file in files] for split, files in FILES.items()}
    content = digest(array.tobytes() for batches in found.values() for batch in batches for array in batch)
    record = Record(folder, {"kind": "cifar10", "shard_samples": shard_samples, "source": content}, overwrite)
    splits = {}
    for split, batches in found.items():
        references = [one for pixels, labels in batches for one in zip(_upright(pixels), labels.tolist(), strict=True)]
        splits[split] = Split(references, pixel_sample, shards_for(len(references), shard_samples))
    return write(record, splits, classes, workers)


def _upright(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _binary_classes(source: Path, read: Callable[[str], bytes]) -> list[str]:
    return _ten(source, "batches.meta.txt", read("batches.meta.txt").decode("ascii", "replace").split())


def _python_classes(source: Path, read: Callable[[str], bytes]) -> list[str]:
    names = _understood(source, "batches.meta", read).get("label_names")
    return _ten(source, "batches.meta", names if isinstance(names, list) else [])


def _ten(source: Path, file: str, names: list[str]) -> list[str]:
    if len(names) != 10 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: {file} names {len(names)} classes, expected CIFAR-10's 10; take the original files")
    return names


def _binary_batch(source: Path, file: str, read: Callable[[str], bytes]) -> Batch:
    data, expected = read(f"{file}.bin"), RECORDS * (1 + PIXELS)
    if len(data) != expected:
        than = "less" if len(data) < expected else "more"
        raise ValueError(f"{source}: {file}.bin holds {than} than {RECORDS} records of {1 + PIXELS} bytes; download it anew")
    # A record is its label and then its pixels.
    records = np.frombuffer(data, np.uint8).reshape(RECORDS, 1 + PIXELS)
    return records[:, 1:], _checked(source, f"{file}.bin", records[:, 0])


def _python_batch(source: Path, file: str, read: Callable[[str], bytes]) -> Batch:
    batch = _understood(source, file, read)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (RECORDS, PIXELS):
        found = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{source}: {file} holds images as {found}, expected an array ({RECORDS}, {PIXELS}); download it anew")
    if not isinstance(labels, list) or len(labels) != RECORDS or not all(type(one) is int for one in labels):
        raise ValueError(f"{source}: {file} holds no {RECORDS} labels; download it anew")
    return pixels, _checked(source, file, np.array(labels))


def _checked(source: Path, file: str, labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() > 9:
        wrong = labels.max() if labels.max() > 9 else labels.min()
        raise ValueError(f"{source}: {file} holds a label of {wrong}, expected 0 to 9; download it anew")
    return labels.astype(np.uint8)


def _understood(source: Path, file: str, read: Callable[[str], bytes]) -> dict:
    try:
        return cifar10_batches.read(read(file))
    except ValueError as error:
        raise ValueError(f"{source}: {file}: {error}; {TAKE}") from None


def _refuse_missing(source: Path, names: Iterable[str], binary: bool) -> None:
    suffix = ".bin" if binary else ""
    wanted = ["batches.meta.txt" if binary else "batches.meta", *(f"{name}{suffix}" for files in FILES.values() for name in files)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{source}: holds no {missing[0]}; {TAKE}")


@contextlib.contextmanager
def _files(source: Path) -> Iterator[tuple[set[str], Callable[[str], bytes]]]:
    """The names of the files in the archive or folder, and a function that reads one by its name, up to MOST_BYTES. Of an archive
    nothing is written to disk, so the names of its members can do no harm."""
    if source.is_dir():
        inner = next((source / name for name in FOLDERS if (source / name).is_dir()), source)
        found = {path.name: path for path in inner.iterdir() if path.is_file()}

        def read(name: str) -> bytes:
            with found[name].open("rb") as file:
                return file.read(MOST_BYTES)

        yield set(found), read
        return
    with contextlib.ExitStack() as stack:
        with _damage_named(source):
            tar = stack.enter_context(tarfile.open(source))
            members = {PurePosixPath(member.name).name: member for member in tar if member.isreg()}
            # Its checksum, which tells damage within a file, lies behind all of it.
            while tar.fileobj.read(1 << 20):
                pass

        def read(name: str) -> bytes:
            with _damage_named(source):
                return tar.extractfile(members[name]).read(MOST_BYTES)

        yield set(members), read


@contextlib.contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file; {TAKE}") from None
    except Exception as error:  # of many kinds, where a header means harm
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise ValueError(f"{source}: not a whole tar archive ({why}); {TAKE}") from None
