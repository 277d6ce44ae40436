"""Your own images, in a folder for each class."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.images import EXTENSIONS, MAX_BAD, Draw, ImageFile, files_in, listing, without_faults
from data_tools.record import Record, digest
from data_tools.writing import Split, shards_for, write


def image_folder(source: Path, folder: Path, **options: Any) -> dict[str, int]:
    """Images in folders, SOURCE/train/CLASS/* and SOURCE/val/CLASS/*, byte for byte as they are; GIF, BMP and TIFF become PNG.
    Classes are numbered by name. Training images are shuffled by --seed, so that a shard holds all classes. Returns the number of
    samples of each split; `options` are those of `write_images`."""
    classes = class_names(source / "train")
    if unknown := [name for name in class_names(source / "val") if name not in set(classes)]:
        raise ValueError(f"{source / 'val' / unknown[0]}: no such class among the {len(classes)} of {source / 'train'}; rename it")
    found = {
        split: [
            image
            for label, name in enumerate(classes)
            if (source / split / name).is_dir()
            for image in files_in(source / split / name, label)
        ]
        for split in ("train", "val")
    }
    if empty := set(range(len(classes))) - {image.label for image in found["train"]}:
        raise ValueError(f"{source / 'train' / classes[min(empty)]}: no image ({', '.join(EXTENSIONS)}); add some or remove it")
    if not found["val"]:
        raise ValueError(f"{source / 'val'}: no image ({', '.join(EXTENSIONS)}); add some")
    return write_images("folder", source, found, classes, folder, **options)


def write_images(
    kind: str,
    source: Path,
    found: dict[str, list[ImageFile]],
    classes: Sequence[str],
    folder: Path,
    shard_samples: int = 5000,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 90,
    check: bool = False,
    max_bad: float = MAX_BAD,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, int]:
    """Check images, leave out and list those that training cannot use, shuffle the training images and write the shards.

    resize: the shorter side, in pixels, to which larger images are reduced, as JPEG of `quality`; check: decode every image, as
    `resize` does too; max_bad: the fraction of a split that may be left out.
    """
    options = {"kind": kind, "shard_samples": shard_samples, "seed": seed, "resize": resize, "quality": quality, "check": check}
    record = Record(folder, {**options, "source": digest(listing(found, source))}, overwrite)
    # Checked before the shards are laid out: an image found bad while it is written would make their counts unequal.
    good, skipped = without_faults(found, record, workers, check or resize is not None, max_bad)
    if empty := {image.label for image in found["train"]} - {image.label for image in good["train"]}:
        raise ValueError(f"none of the training images of {classes[min(empty)]!r} can be used; mend or remove them")
    random.Random(seed).shuffle(good["train"])
    draw = Draw(resize, quality)
    splits = {name: Split(images, draw, shards_for(len(images), shard_samples)) for name, images in good.items()}
    return write(record, splits, classes, workers, skipped)


def class_names(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, which are the classes."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; images are expected in SOURCE/train/CLASS and SOURCE/val/CLASS")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: holds no folders; put the images of each class into a folder of its own")
    return names
