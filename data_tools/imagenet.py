"""ImageNet-1K (ILSVRC2012) from its original tars, or unpacked."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.folder import write_images
from data_tools.imagenet_truth import WNID, Truth, find_truth
from data_tools.images import ImageFile, files_in, is_image
from data_tools.record import digest
from data_tools.workers import Tick, in_order

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLES = Path("ILSVRC/Data/CLS-LOC")
"""The folder of train/ and val/ in Kaggle's archive."""
ILSVRC2012 = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"
"""Digest of its 1 000 WordNet ids, sorted."""
EXPECTED = f"expected {TRAIN} and {VAL} with ILSVRC2012_devkit_t12.tar.gz, or train/nXXXXXXXX/*.JPEG and val/"


def imagenet(source: Path, folder: Path, workers: int = 1, **options: Any) -> dict[str, int]:
    """ImageNet-1K: SOURCE holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or instead of
    the tars the unpacked train/nXXXXXXXX/ and val/, or instead of the devkit another ground truth (docs/data.md). Nothing is
    unpacked to disk. Classes are numbered in the order of their WordNet ids, as everywhere. Training images are shuffled by --seed.
    Returns the number of samples of each split; `options` are those of `folder.write_images`."""
    truth, inner = find_truth(source), source / KAGGLES
    where = inner if inner.is_dir() else source
    train = _train(where, workers)
    wnids = sorted(train)
    if (known := {*truth.words, *truth.val.values()}) and (other := min(known ^ train.keys(), default=None)):
        only = "in the ground truth, but not in training" if other in known else "in training, but not in the ground truth"
        raise ValueError(f"{where}: the class {other} is {only}; take training images and ground truth of one set")
    label = {wnid: number for number, wnid in enumerate(wnids)}
    found = {
        "train": [image._replace(label=label[wnid]) for wnid in wnids for image in train[wnid]],
        "val": _val(where, label, truth),
    }
    for split, images in found.items():
        if not images:
            raise ValueError(f"{source}: no image for {split}; {EXPECTED}")
    return write_images("imagenet", source, found, _class_names(wnids, truth), folder, workers=workers, **options)


def _class_names(wnids: list[str], truth: Truth) -> list[str]:
    """The name of each class, or its WordNet id: the ground truth's, else torchvision's where these are the 1 000 classes of
    ILSVRC2012. Names that two classes share, such as crane, get the id too."""
    words = truth.words
    if not words and digest(wnids) == ILSVRC2012:
        # Takes a second to import, so only where it is wanted.
        from torchvision.models import ResNet50_Weights

        words = dict(zip(wnids, ResNet50_Weights.DEFAULT.meta["categories"], strict=True))
    names = [words.get(wnid, wnid) for wnid in wnids]
    return [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, wnids, strict=True)]


def _train(source: Path, workers: int) -> dict[str, list[ImageFile]]:
    """The images of each WordNet id, not labelled yet."""
    if (source / TRAIN).is_file():
        return _train_tar(source / TRAIN, workers)
    if not (source / "train").is_dir():
        raise ValueError(f"{source}: holds neither {TRAIN} nor train/; {EXPECTED}")
    folders = sorted(path for path in (source / "train").iterdir() if path.is_dir() and not path.name.startswith("."))
    if wrong := [path for path in folders if not WNID.fullmatch(path.name)]:
        raise ValueError(f"{wrong[0]}: not a WordNet id such as n01440764; for classes of your own take the kind 'folder'")
    found = {path.name: files_in(path, -1) for path in folders}
    if empty := [path for path in folders if not found[path.name]]:
        raise ValueError(f"{empty[0]}: no image; unpack its archive again")
    return found


class Inner(NamedTuple):
    """The tar of one class inside the outer tar."""

    path: Path
    offset: int
    size: int
    wnid: str


def _train_tar(path: Path, workers: int) -> dict[str, list[ImageFile]]:
    inner = []
    for member in _members(path, 0, path.stat().st_size):
        wnid = Path(member.name).name.removesuffix(".tar")
        if not WNID.fullmatch(wnid):
            raise ValueError(f"{path}: holds {member.name!r}, expected one tar for each class, nXXXXXXXX.tar; take the original")
        inner.append(Inner(path, member.offset_data, member.size, wnid))
    lists = in_order(list_inner, inner, workers, "train: listing", len(inner))
    return {one.wnid: images for one, images in zip(inner, lists, strict=True)}


def list_inner(inner: Inner, tick: Tick) -> list[ImageFile]:
    """The images of one class, as parts of the outer tar."""
    try:
        members = _members(inner.path, inner.offset, inner.size)
    except ValueError as error:
        raise ValueError(f"{error} (in {inner.wnid}.tar)") from None
    tick(1)
    if not members:
        raise ValueError(f"{inner.path}: {inner.wnid}.tar holds no image; take the original")
    return _images(inner.path, members)


def _images(path: Path, members: list[tarfile.TarInfo]) -> list[ImageFile]:
    """Images by name, not labelled yet. members: of a tar in the file at `path`."""
    changed = path.stat().st_mtime_ns
    images = [ImageFile(str(path), m.offset_data, m.size, Path(m.name).name, -1, changed) for m in members]
    return sorted(images, key=lambda image: image.name)


def _members(path: Path, offset: int, size: int) -> list[tarfile.TarInfo]:
    """The files of an uncompressed tar, which is this part of the file at `path`. Raises ValueError if the tar is not whole."""
    try:
        # Unbuffered, so that the images between the headers are not read.
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                # The true end is a block of zeros; tarfile also stops at a damaged header and at the file's end.
                file.seek(tar.offset)
                end = file.read(tarfile.BLOCKSIZE)
                if end != bytes(tarfile.BLOCKSIZE) or file.tell() > offset + size:
                    raise tarfile.TarError("cut short or damaged behind its last whole member")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # of many kinds, where a header means harm
        raise ValueError(f"{path}: not a whole tar archive ({error}); download it again") from None
    if any(member.size < 0 for member in members):
        raise ValueError(f"{path}: not a whole tar archive (a member of negative size); download it again")
    files = [member for member in members if member.isreg() and not Path(member.name).name.startswith(".")]
    names = Counter(Path(member.name).name for member in files)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: holds {repeated[0]} twice; take the original")
    return files


def _val(source: Path, label: dict[str, int], truth: Truth) -> list[ImageFile]:
    """The validation images in the order of their names, with their labels."""
    if (source / VAL).is_file():
        path = source / VAL
        return _labelled(source, _images(path, _members(path, 0, path.stat().st_size)), label, truth)
    if not (source / "val").is_dir():
        raise ValueError(f"{source}: holds neither {VAL} nor val/; {EXPECTED}")
    folders = sorted(path for path in (source / "val").iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        return _labelled(source, files_in(source / "val", -1), label, truth)
    if unknown := [path for path in folders if path.name not in label]:
        raise ValueError(f"{unknown[0]}: no such class among the {len(label)} for training; rename or remove it")
    if loose := [path for path in sorted((source / "val").iterdir()) if is_image(path) and not path.name.startswith(".")]:
        raise ValueError(f"{loose[0]}: beside folders of WordNet ids; put every image into its class's folder, or none")
    images = [image for path in folders for image in files_in(path, label[path.name])]
    if truth.val:
        expected = {image: label.get(wnid) for image, wnid in truth.val.items()}
        _refuse_incomplete(source, images, truth)
        if wrong := [image for image in images if expected[Path(image.name).stem] != image.label]:
            raise ValueError(f"{wrong[0]}: the ground truth has another class; move it, or remove the ground truth")
    return images


def _labelled(source: Path, images: list[ImageFile], label: dict[str, int], truth: Truth) -> list[ImageFile]:
    if not truth.val:
        raise ValueError(
            f"{source}: validation images without their classes; put ILSVRC2012_devkit_t12.tar.gz beside them (or "
            f"another ground truth, see docs/data.md)"
        )
    _refuse_incomplete(source, images, truth)
    found = sorted(images, key=lambda image: image.name)
    return [image._replace(label=label[truth.val[Path(image.name).stem]]) for image in found]


def _refuse_incomplete(source: Path, images: list[ImageFile], truth: Truth) -> None:
    """Raise ValueError if these are not exactly the validation images of the ground truth."""
    if extra := [image for image in images if Path(image.name).stem not in truth.val]:
        raise ValueError(f"{extra[0]}: it has no class in the ground truth; take images and ground truth of one set")
    names = Counter(Path(image.name).stem for image in images)
    if missing := min(truth.val.keys() - names.keys(), default=None):
        raise ValueError(
            f"{source}: {len(images)} of {len(truth.val)} validation images, the first that is missing is {missing}; "
            f"unpack or copy them again"
        )
    if repeated := next((name for name, count in names.items() if count > 1), None):
        raise ValueError(f"{source}: holds {repeated} twice among the validation images; remove one")
