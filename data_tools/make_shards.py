"""Make webdataset shards (a picture and its class number for each sample) and their index.

python -m data_tools.make_shards digits data/digits
python -m data_tools.make_shards fashion_mnist data/fashion_mnist
python -m data_tools.make_shards cifar10 cifar-10-binary.tar.gz data/cifar10
python -m data_tools.make_shards folder pictures data/imagenet
"""

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import webdataset
from PIL import Image
from rich.console import Console
from rich.progress import track

# What dnal_dist.stream reads; importing it for this would cost seconds.
PICTURES = ("png", "jpg", "jpeg")

FASHION_MNIST = {"train": ("train", 60_000), "val": ("t10k", 10_000)}
FASHION_MNIST_SOURCE = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_MNIST_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

CIFAR10 = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "val": ["test_batch.bin"]}
CIFAR10_RECORDS = 10_000
CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32
TAKE_CIFAR10 = 'take the "binary version", cifar-10-binary.tar.gz, or the folder cifar-10-batches-bin that it unpacks to'

Sample = tuple[str, bytes, str, int]
"""Key, encoded picture, its extension, label."""


class Split(NamedTuple):
    samples: Iterable[Sample]
    """May be made one by one while they are written."""
    count: int
    shards: int


def write(folder: Path, splits: dict[str, Split], classes: Iterable[str]) -> dict[str, int]:
    """Write the shards of all splits, then their index, to `folder`. Returns the number of samples of each split.

    Raises ValueError if `folder` holds shards of the same splits that would not be replaced.
    """
    for name, split in splits.items():
        new = {_shard_name(name, number) for number in range(split.shards)}
        # The pattern that finds the new shards would find the old ones too.
        if old := sorted(path.name for path in folder.glob(f"{name}-*.tar") if path.name not in new):
            raise ValueError(
                f"{folder / old[0]}: a shard that was made otherwise ({len(old)} in all); remove it or take a new folder"
            )
    entries = [entry for name, split in splits.items() for entry in write_shards(folder, name, *split)]
    write_index(folder, entries, classes)
    return {name: split.count for name, split in splits.items()}


def write_shards(folder: Path, split: str, samples: Iterable[Sample], count: int, shards: int) -> list[dict]:
    """Write `samples`, `count` in all, as `shards` files whose counts differ by one at most.

    The same samples give the same bytes. A shard gets its name only when it is complete. Returns their index entries.
    """
    entries, console = [], Console(stderr=True)
    coming = iter(track(samples, f"{split} shards", count, console=console, transient=True, disable=not console.is_terminal))
    for number, part in enumerate(np.array_split(np.arange(count), shards)):
        path = folder / _shard_name(split, number)
        unfinished = path.with_suffix(".tar.unfinished")
        with webdataset.TarWriter(str(unfinished), mtime=0) as tar:
            for _ in part:
                key, picture, extension, label = next(coming)
                tar.write({"__key__": key, extension: picture, "cls": str(label).encode()})
        os.replace(unfinished, path)
        entries.append({"file": path.name, "samples": len(part), "bytes": path.stat().st_size})
    # This also takes the progress bar down.
    assert next(coming, None) is None, f"more samples than {count}"
    return entries


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_index(folder: Path, entries: list[dict], classes: Iterable[str]) -> None:
    unfinished = folder / "index.json.unfinished"
    unfinished.write_text(json.dumps({"shards": entries, "classes": list(classes)}, indent=1) + "\n")
    os.replace(unfinished, folder / "index.json")


def digits(folder: Path) -> dict[str, int]:
    """scikit-learn's 1 797 scanned digits, 8x8 grey, as PNG. Of each class every fifth picture, in the data's own order, is for
    validation. Returns the number of samples of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install 'dnal-dist[demo]'") from None
    source = load_digits()
    splits, seen = {"train": [], "val": []}, [0] * 10
    for number, (picture, label) in enumerate(zip(source.images, source.target.tolist(), strict=True)):
        split = "val" if seen[label] % 5 == 4 else "train"
        # The scans have 17 grey levels, 0 to 16.
        splits[split].append((f"{number:06d}", _png(np.round(picture * 255 / 16).astype(np.uint8)), "png", label))
        seen[label] += 1
    shards = {"train": 4, "val": 2}
    return write(folder, {name: Split(found, len(found), shards[name]) for name, found in splits.items()}, map(str, range(10)))


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (height, width) or (height, width, 3) as PNG, which loses nothing."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def fashion_mnist(folder: Path, source: Path = FASHION_MNIST_SOURCE, shard_samples: int = 5000) -> dict[str, int]:
    """Fashion-MNIST: 60 000 training and 10 000 validation pictures of clothes, 28x28 grey, 10 classes, as PNG; from its four idx
    files (https://github.com/zalandoresearch/fashion-mnist), gzipped or not. Returns the number of samples of each split."""
    splits = {}
    for split, (prefix, count) in FASHION_MNIST.items():
        pictures = _idx(source, f"{prefix}-images-idx3-ubyte", (count, 28, 28))
        labels = _idx(source, f"{prefix}-labels-idx1-ubyte", (count,))
        if labels.max() > 9:
            raise ValueError(
                f"{source}: a label of {labels.max()} for the {split} pictures, expected 0 to 9; take the original files"
            )
        samples = _pixel_samples(zip(pictures, labels.tolist(), strict=True))
        splits[split] = Split(samples, count, math.ceil(count / shard_samples))
    return write(folder, splits, FASHION_MNIST_CLASSES)


def _pixel_samples(pictures: Iterable[tuple[np.ndarray, int]]) -> Iterator[Sample]:
    return ((f"{number:06d}", _png(pixels), "png", label) for number, (pixels, label) in enumerate(pictures))


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
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it anew") from None
    expected = " x ".join(map(str, shape))
    if found != header:
        raise ValueError(f"{path}: begins with {found.hex(' ')}, expected the idx header of {expected} bytes, {header.hex(' ')}")
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{path}: holds {'less' if len(values) < math.prod(shape) else 'more'} than {expected} bytes; copy it anew"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def cifar10(source: Path, folder: Path, shard_samples: int = 5000) -> dict[str, int]:
    """CIFAR-10: 50 000 training and 10 000 validation pictures, 32x32 RGB, 10 classes, as PNG; from its "binary version",
    cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) or the folder that it unpacks to. Nothing is unpacked to
    disk. Returns the number of samples of each split."""
    with _cifar10_files(source) as read:
        names = read("batches.meta.txt").decode("ascii", "replace").split()
        if len(names) != 10:
            raise ValueError(
                f"{source}: batches.meta.txt names {len(names)} classes, expected CIFAR-10's 10; take the original files"
            )
        splits = {}
        for split, files in CIFAR10.items():
            count = len(files) * CIFAR10_RECORDS
            samples = _pixel_samples(_cifar10_records(source, files, read))
            splits[split] = Split(samples, count, math.ceil(count / shard_samples))
        return write(folder, splits, names)


def _cifar10_records(source: Path, files: list[str], read: Callable[[str], bytes]) -> Iterator[tuple[np.ndarray, int]]:
    """Pixels (32, 32, 3) and label of every record. Raises ValueError for a file of another size or a label above 9."""
    for file in files:
        data = read(file)
        if len(data) != CIFAR10_RECORDS * CIFAR10_RECORD_BYTES:
            than = "less" if len(data) < CIFAR10_RECORDS * CIFAR10_RECORD_BYTES else "more"
            raise ValueError(
                f"{source}: {file} holds {than} than {CIFAR10_RECORDS} records of {CIFAR10_RECORD_BYTES} bytes; download it anew"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR10_RECORD_BYTES)
        if records[:, 0].max() > 9:
            raise ValueError(f"{source}: {file} holds a label of {records[:, 0].max()}, expected 0 to 9; download it anew")
        # A record is its label and then the red, green and blue plane.
        pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield from zip(np.ascontiguousarray(pictures), records[:, 0].tolist(), strict=True)


@contextlib.contextmanager
def _cifar10_files(source: Path) -> Iterator[Callable[[str], bytes]]:
    """A function that reads a file of CIFAR-10's binary version by its name, from the archive or the folder, and no more than one
    byte beyond what it should hold. Of an archive nothing is written to disk, so the names of its members can do no harm."""
    most = CIFAR10_RECORDS * CIFAR10_RECORD_BYTES + 1
    if source.is_dir():
        inner = source / "cifar-10-batches-bin"
        found = {path.name: path for path in (inner if inner.is_dir() else source).iterdir()}
        _refuse_other_cifar(source, found)

        def read(name: str) -> bytes:
            with found[name].open("rb") as file:
                return file.read(most)

        yield read
        return
    with contextlib.ExitStack() as stack:
        with _damage_named(source):
            tar = stack.enter_context(tarfile.open(source))
            members = {PurePosixPath(member.name).name: member for member in tar if member.isreg()}
            # Its checksum, which tells damage within a file, lies behind all of it.
            while tar.fileobj.read(1 << 20):
                pass
        _refuse_other_cifar(source, members)

        def read(name: str) -> bytes:
            with _damage_named(source):
                return tar.extractfile(members[name]).read(most)

        yield read


@contextlib.contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{source}: no such file; {TAKE_CIFAR10}") from None
    except Exception as error:  # of many kinds, where a header means harm
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise ValueError(f"{source}: not a whole tar archive ({why}); {TAKE_CIFAR10}") from None


def _refuse_other_cifar(source: Path, found: Iterable[str]) -> None:
    if "data_batch_1" in found or "cifar-10-batches-py" in found:
        # Its files are such that reading them can run any program.
        raise ValueError(f"{source}: this is the version for Python, which is not read for safety; {TAKE_CIFAR10}")
    missing = [name for name in ["batches.meta.txt", *CIFAR10["train"], *CIFAR10["val"]] if name not in found]
    if missing:
        raise ValueError(f"{source}: holds no {missing[0]}; {TAKE_CIFAR10}")


def image_folder(source: Path, folder: Path, shard_samples: int = 5000, seed: int = 0) -> dict[str, int]:
    """Pictures in folders, SOURCE/train/CLASS/* and SOURCE/val/CLASS/* (png, jpg, jpeg), byte for byte as they are. Classes are
    numbered by name. Training pictures are shuffled by --seed, so that a shard holds all classes. Returns the number of samples of
    each split."""
    classes = _class_names(source / "train")
    if unknown := [name for name in _class_names(source / "val") if name not in set(classes)]:
        raise ValueError(f"{source / 'val' / unknown[0]}: no such class among the {len(classes)} of {source / 'train'}; rename it")
    splits = {}
    for split in ("train", "val"):
        pictures = [(path, label) for label, name in enumerate(classes) for path in _pictures(source / split / name)]
        if split == "train":
            if empty := set(range(len(classes))) - {label for _, label in pictures}:
                raise ValueError(
                    f"{source / 'train' / classes[min(empty)]}: no picture ({', '.join(PICTURES)}); add some or remove it"
                )
            random.Random(seed).shuffle(pictures)
        elif not pictures:
            raise ValueError(f"{source / 'val'}: no picture ({', '.join(PICTURES)}); add some")
        splits[split] = Split(_file_samples(pictures), len(pictures), math.ceil(len(pictures) / shard_samples))
    return write(folder, splits, classes)


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; pictures are expected in SOURCE/train/CLASS and SOURCE/val/CLASS")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: holds no folders, expected one for each class; pictures belong into them")
    return names


def _pictures(folder: Path) -> list[Path]:
    """The pictures in `folder` and its own folders, by name; what is hidden is left out: ._NAME.jpg, of a Mac, is no picture."""
    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = (name for name in inner if not name.startswith("."))
        found += (Path(parent) / name for name in names if not name.startswith("."))
    # A pipe or a device by a picture's name would be read for ever.
    return sorted(path for path in found if path.suffix[1:].lower() in PICTURES and path.is_file())


def _file_samples(pictures: list[tuple[Path, int]]) -> Iterator[Sample]:
    for number, (path, label) in enumerate(pictures):
        # A key ends at its first dot; two files may share a name; and a name may be of any bytes.
        name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:80]
        yield f"{number:08d}-{name}", path.read_bytes(), path.suffix[1:].lower(), label


def main() -> None:
    make, options = _arguments()
    folder = options["folder"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = make(**options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped before all shards were made; the same command makes {folder} anew", file=sys.stderr)
        sys.exit(130)
    print(f"{folder}: " + ", ".join(f"{count} samples for {split}" for split, count in counts.items()))


def _arguments() -> tuple[Callable[..., dict[str, int]], dict]:
    """The function that makes the shards, and its arguments."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.make_shards", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    def kind(name: str, make: Callable, text: str, source: str | None = None) -> argparse.ArgumentParser:
        one = kinds.add_parser(name, help=text, description=make.__doc__)
        one.set_defaults(make=make)
        if source:
            one.add_argument("source", type=Path, metavar="SOURCE", help=source)
        one.add_argument("folder", type=Path, metavar="FOLDER", help=f"where the shards go, for example data/{name}")
        return one

    kind("digits", digits, "scikit-learn's 1 797 scanned digits, 8x8 grey")
    fashion = kind("fashion_mnist", fashion_mnist, "70 000 pictures of clothes, 28x28 grey")
    fashion.add_argument("--source", type=Path, default=FASHION_MNIST_SOURCE, help="folder of the four idx files (%(default)s)")
    cifar = kind("cifar10", cifar10, "60 000 pictures, 32x32 RGB", "cifar-10-binary.tar.gz or the folder that it unpacks to")
    own = kind("folder", image_folder, "your own pictures, in a folder for each class", "holds train/CLASS/* and val/CLASS/*")
    own.add_argument("--seed", type=int, default=0, help="of the training pictures' order (%(default)s)")
    for one in (fashion, cifar, own):
        one.add_argument("--shard-samples", type=_count, default=5000, metavar="N", help="most samples of a shard (%(default)s)")
    options = vars(parser.parse_args())
    return options.pop("make"), options


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
