"""Make webdataset shards, an image and its class number for each sample, and index.json beside them.

  python -m data_tools.make_shards digits data/digits                              1 797 scanned digits, nothing to fetch
  python -m data_tools.make_shards fashion_mnist data/fashion_mnist                from Debian's package dataset-fashion-mnist
  python -m data_tools.make_shards cifar10 cifar-10-binary.tar.gz data/cifar10     the archive as it is
  python -m data_tools.make_shards imagenet ILSVRC data/imagenet                   a folder with the original tars
  python -m data_tools.make_shards imagenet ILSVRC data/imagenet400 --resize 400   larger images reduced
  python -m data_tools.make_shards folder images data/own                          images/train/CLASS/*, images/val/CLASS/*
  python -m data_tools.make_shards folder images data/own --split 0.1              images/CLASS/*, a tenth for validation
  python -m data_tools.make_shards synthetic data/synthetic --classes 100          drawn images of ImageNet's sizes

The same source and options give the same bytes, with any number of workers. A command that was stopped continues when it is
repeated: complete shards are kept. Images that training could not use are left out and listed in FOLDER/skipped.json. Check the
result with `python -m data_tools.verify FOLDER`.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.cifar10 import cifar10
from data_tools.digits import digits
from data_tools.fashion_mnist import SOURCE as FASHION_MNIST_SOURCE
from data_tools.fashion_mnist import fashion_mnist
from data_tools.folder import image_folder
from data_tools.imagenet import imagenet
from data_tools.images import MAX_BAD
from data_tools.synthetic import synthetic
from dnal_dist.common.cores import cores
from dnal_dist.common.door import argument, door, parser_of, whole
from dnal_dist.common.errors import InputError

MORE = {
    "digits": "They come with scikit-learn. Every fifth image of a class is for validation.",
    "fashion_mnist": "The four idx files, gzipped or not: Debian's package dataset-fashion-mnist has them, and so has "
    "https://github.com/zalandoresearch/fashion-mnist.",
    "cifar10": "SOURCE is from https://www.cs.toronto.edu/~kriz/cifar.html; nothing is unpacked to disk. The Python version of the "
    "archive is refused, since its batches are pickled; the binary version holds the same images.",
    "imagenet": "Nothing is unpacked to disk, and images are stored byte for byte unless --resize is given. Classes are "
    "numbered in the order of their WordNet ids. docs/data.md lists what SOURCE may hold.",
    "folder": "Images (png, jpg, jpeg, webp) are stored byte for byte unless --resize is given; gif, bmp, tif and tiff become PNG. "
    "Classes are numbered by name. Without SOURCE/val, --split draws validation images from those for training, in "
    "SOURCE/train/CLASS/* or SOURCE/CLASS/*, and --val-from names another folder, such as test.",
    "synthetic": "A class sets colours, shape and textures; an image depends only on --seed, split and number.",
}
"""The text of --help for each kind."""


@door
def main() -> None:
    make, options = _arguments()
    folder = options["folder"]
    try:
        with _alone_in(folder):
            counts = make(**options)
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"; free some space, {_same_command(options)} then continues" if full else ""
        raise InputError(f"{error}{remedy}") from None
    except KeyboardInterrupt:
        print(f"\nstopped before all shards were made; {_same_command(options)} continues in {folder}", file=sys.stderr)
        sys.exit(130)
    print(f"{folder}: " + ", ".join(f"{count} samples for {split}" for split, count in counts.items()) + _skipped(folder))


def _same_command(options: dict[str, Any]) -> str:
    return "the same command" + (" without --overwrite" if options["overwrite"] else "")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it. It is removed again if it stays empty, as with a mistyped source. Raises ValueError if another
    command makes shards there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, expected the folder where the shards go; name another")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another command is making shards there; wait for it, or stop it") from None
        except OSError:
            pass  # some network file systems cannot lock a folder
        yield
    finally:
        os.close(lock)
        for path in new:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _skipped(folder: Path) -> str:
    path = folder / "skipped.json"
    return f"; {len(json.loads(path.read_text())['skipped'])} images left out, see {path}" if path.exists() else ""


def _arguments() -> tuple[Callable[..., dict[str, int]], dict[str, Any]]:
    """The function that makes the shards, and its arguments."""
    parser = parser_of("data_tools.make_shards", __doc__)
    kinds = parser.add_subparsers(required=True, metavar="KIND", title="kinds")

    def kind(name: str, make: Callable, text: str, source: str | None = None) -> argparse.ArgumentParser:
        one = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {MORE[name]}")
        one.set_defaults(make=make)
        if source:
            one.add_argument("source", type=argument, metavar="SOURCE", help=source)
        one.add_argument("folder", type=argument, metavar="FOLDER", help=f"folder for the shards, for example data/{name}")
        one.add_argument("--overwrite", action="store_true", help="remove the shards in FOLDER and make them again")
        return one

    kind("digits", digits, "scikit-learn's 1 797 scanned digits, 8x8 grey")
    fashion = kind("fashion_mnist", fashion_mnist, "70 000 images of clothes, 28x28 grey")
    fashion.add_argument("--source", type=argument, default=FASHION_MNIST_SOURCE, help="folder of the four idx files (%(default)s)")
    cifar = kind("cifar10", cifar10, "60 000 images, 32x32 RGB", "cifar-10-binary.tar.gz, or its unpacked folder")
    tars = "folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or with train/ and val/"
    large = kind("imagenet", imagenet, "ImageNet-1K, from its tars or unpacked", tars)
    own = kind(
        "folder", image_folder, "your own images, in a folder for each class", "holds train/CLASS/* and val/CLASS/*, or CLASS/*"
    )
    own.add_argument("--split", type=_split, metavar="FRACTION", help="of each class's images, drawn by --seed for validation")
    own.add_argument("--val-from", metavar="NAME", help="folder of SOURCE with the validation images, instead of val")
    drawn = kind("synthetic", synthetic, "drawn JPEGs of ImageNet's sizes, in any number")
    for one in (large, own):
        _image_options(one)
    for name, default, text in (
        ("classes", 100, "number of classes"),
        ("train", 50_000, "training images"),
        ("val", 5_000, "validation images"),
        ("size", 500, "longer side of a typical image, in pixels"),
    ):
        drawn.add_argument(f"--{name}", type=whole(), default=default, metavar="N", help=f"{text} (%(default)s)")
    drawn.add_argument("--seed", type=whole(0), default=0, help="seed of all images (%(default)s)")
    for one in (fashion, cifar, large, own, drawn):
        one.add_argument("--shard-samples", type=whole(), default=5000, metavar="N", help="most samples of a shard (%(default)s)")
        one.add_argument("--workers", type=whole(), default=cores(), metavar="N", help="processes (all cores, here %(default)s)")
    options = vars(parser.parse_args())
    return options.pop("make"), options


def _image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=whole(0), default=0, help="seed of the training images' order (%(default)s)")
    add("--resize", type=whole(), metavar="N", help="reduce larger images to a shorter side of N pixels (Lanczos, JPEG 4:2:0)")
    add("--quality", type=whole(1, 95), default=90, metavar="Q", help="quality of resized JPEGs (%(default)s)")
    check = "decode every image, as --resize does too; by default only heads and ends of JPEGs are read"
    add("--check", action="store_true", help=check)
    add("--max-bad", type=_fraction, default=MAX_BAD, metavar="FRACTION", help="of a split's images, may be left out (%(default)s)")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to 1, found {text!r}")
    return value


def _split(text: str) -> float:
    if not 0 < (value := _fraction(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, such as 0.1, found {text!r}")
    return value


if __name__ == "__main__":
    main()
