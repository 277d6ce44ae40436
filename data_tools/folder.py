"""Your own images, in a folder for each class."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.images import EXTENSIONS, MAX_BAD, Draw, ImageFile, files_in, listing, without_faults
from data_tools.record import Record, digest
from data_tools.writing import Split, shards_for, write
from dnal_dist.common.text import printable

# Classes whose counts are printed.
MOST_LISTED = 20
# Folders that hold a split for validation or for a test under another name.
OTHER_NAMES = ("test", "valid", "validation", "dev", "eval")


def image_folder(
    source: Path, folder: Path, split: float | None = None, val_from: str | None = None, **options: Any
) -> dict[str, int]:
    """Images in folders, SOURCE/train/CLASS/* and SOURCE/val/CLASS/*, byte for byte as they are; GIF, BMP and TIFF become PNG.
    Classes are numbered by name. Training images are shuffled by --seed, so that a shard holds all classes. Returns the number of
    samples of each split; `options` are those of `write_images`.

    split: the fraction of each class's images, in SOURCE/train/CLASS/* or SOURCE/CLASS/*, that is drawn for validation by --seed.
    val_from: the folder that is taken for val.
    """
    train, val = _folders(source, split, val_from)
    classes = class_names(train)
    found = {"train": _images_of(train, classes, classes), "val": []}
    if empty := set(range(len(classes))) - {image.label for image in found["train"]}:
        raise ValueError(f"{train / classes[min(empty)]}: no image ({', '.join(EXTENSIONS)}); add some or remove it")
    if val is None:
        found = _drawn(found["train"], split, options.get("seed", 0))
    else:
        given = class_names(val)
        if unknown := [name for name in given if name not in set(classes)]:
            raise ValueError(f"{val / unknown[0]}: no such class among the {len(classes)} of {train}; rename it")
        found["val"] = _images_of(val, given, classes)
        if not found["val"]:
            raise ValueError(f"{val}: no image ({', '.join(EXTENSIONS)}); add some")
    how = f" --split {split:g}" if split is not None else f" --val-from {val_from}" if val_from else ""
    return write_images(f"folder{how}", source, found, classes, folder, **options)


def _folders(source: Path, split: float | None, val_from: str | None) -> tuple[Path, Path | None]:
    """The folders of training and of validation images; None: they are drawn from those for training."""
    train, val = source / "train", source / "val"
    if split is not None and val_from is not None:
        raise ValueError("--split and --val-from name two sources of validation images; give one")
    if split is not None:
        if val.is_dir():
            raise ValueError(f"{val}: validation images are there already; leave out --split {split:g}, or move them into train")
        if not train.is_dir() and not source.is_dir():
            raise ValueError(f"{source}: no such folder")
        if train.is_dir():
            return train, None
        if other := next((name for name in OTHER_NAMES if (source / name).is_dir()), None):
            raise ValueError(
                f"{source / other}: beside folders of classes, and named as images for validation; put the classes into "
                f"{train} and give --val-from {other}, or move it elsewhere, or rename it if it is a class"
            )
        return source, None
    if val_from is not None:
        if not (source / val_from).is_dir():
            raise ValueError(f"{source / val_from}: no such folder; --val-from wants the name of one in {source}")
        if (source / val_from).resolve() == train.resolve():
            raise ValueError(f"--val-from {val_from}: these are the training images; name another folder, or give --split 0.1")
        return train, source / val_from
    if source.is_dir() and not val.is_dir():
        other = next((name for name in OTHER_NAMES if (source / name).is_dir()), None)
        take = f"--val-from {other} takes {other}/ for validation, " if other and train.is_dir() else ""
        if train.is_dir() or (other is None and any(_class_folders(source))):
            raise ValueError(
                f"{source}: no folder val/ for validation; {take}--split 0.1 draws a tenth of each class from the training images"
            )
    return train, val


def _images_of(folder: Path, names: Sequence[str], classes: Sequence[str]) -> list[ImageFile]:
    number = {name: label for label, name in enumerate(classes)}
    return [image for name in names for image in files_in(folder / name, number[name])]


def _drawn(images: list[ImageFile], split: float, seed: int) -> dict[str, list[ImageFile]]:
    """The images of both splits: of each class the fraction `split`, one at least, is drawn for validation by `seed`."""
    found: dict[str, list[ImageFile]] = {"train": [], "val": []}
    for _, group in itertools.groupby(images, key=lambda image: image.label):
        of_class = list(group)
        if len(of_class) < 2:
            raise ValueError(f"{of_class[0]}: its class has no other image; --split takes one from each class for validation")
        most = len(of_class) - 1
        chosen = set(random.Random(seed).sample(range(len(of_class)), min(most, max(1, round(split * len(of_class))))))
        for number, image in enumerate(of_class):
            found["val" if number in chosen else "train"].append(image)
    return found


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
    _print_counts(good, classes)
    draw = Draw(resize, quality)
    splits = {name: Split(images, draw, shards_for(len(images), shard_samples)) for name, images in good.items()}
    return write(record, splits, classes, workers, skipped)


def _print_counts(splits: dict[str, list[ImageFile]], classes: Sequence[str]) -> None:
    """Print the images of each class in each split; of many classes, those with the fewest and the most."""
    counts = {split: Counter(image.label for image in images) for split, images in splits.items()}
    numbers = list(range(len(classes)))
    if len(numbers) > MOST_LISTED:
        ordered = sorted(numbers, key=lambda label: counts["train"][label])
        numbers = [*ordered[: MOST_LISTED // 2], *ordered[-MOST_LISTED // 2 :]]
        print(f"{len(classes)} classes; those with the fewest and the most images:")
    names = [printable(classes[label]) for label in numbers]
    width = max(map(len, ["class", *names]))
    print(f"{'class':{width}}  {'train':>9}  {'val':>9}")
    for label, name in zip(numbers, names, strict=True):
        print(f"{name:{width}}  {counts['train'][label]:>9,}  {counts['val'][label]:>9,}")


def class_names(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, which are the classes."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; images are expected in SOURCE/train/CLASS and SOURCE/val/CLASS")
    names = sorted(_class_folders(folder))
    if not names:
        raise ValueError(f"{folder}: holds no folders; put the images of each class into a folder of its own")
    return names


def _class_folders(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
