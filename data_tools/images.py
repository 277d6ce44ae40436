"""Images in files and tars: found, checked, and made smaller."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_tools.record import Record, digest
from data_tools.workers import Tick, in_order
from data_tools.writing import Sample, Split, shards_for, write
from dnal_dist.data.decoding import FORMATS, ImageError, colours, opened, read_header, refusal, rgb, size_fault
from dnal_dist.recipe import Data

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
# Found too, so that they are counted among the images that are left out.
OTHERS = ("ppm", "pgm", "pbm", "jp2", "jfif", "avif", "heic", "jxl")
# Stored as PNG, which holds the same pixels: GIF has no reader in training, the others take several times the bytes.
AS_PNG = ("gif", "bmp", "tif")
MAX_PIXELS = Data.model_fields["max_pixels"].default
MAX_BAD = 0.01
HEAD = 16 << 10
END_OF_JPEG = b"\xff\xd9"
MAGIC = {
    "jpg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tif": (b"II*\0", b"MM\0*"),
}
CHUNK = 2000


class ImageFile(NamedTuple):
    """An encoded image: `size` bytes from `offset` of the file at `path`, which may be a tar."""

    path: str
    offset: int
    size: int
    name: str
    """File name, for messages and keys."""
    label: int
    changed: int = 0
    """Time of the last change of the file at `path`, in ns."""

    def read(self, start: int = 0, most: int | None = None) -> bytes:
        """Up to `most` bytes from byte `start` of the image on. Raises ValueError if they cannot be read."""
        wanted = min(self.size - start, self.size if most is None else most)
        try:
            with open(self.path, "rb", buffering=0) as file:
                found = os.pread(file.fileno(), wanted, self.offset + start)
        except OSError as error:
            raise ValueError(f"{self}: cannot be read ({error.strerror}); make it readable, or remove it") from None
        if len(found) != wanted:
            raise ValueError(f"{self}: has changed while it was read; make the shards again once it is complete")
        return found

    def __str__(self) -> str:
        return self.path if self.path.endswith(self.name) else f"{self.path}: {self.name}"


def png(pixels: np.ndarray) -> bytes:
    """uint8 (height, width) or (height, width, 3) as PNG, which loses nothing."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def write_pixels(
    kind: str,
    arrays: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    folder: Path,
    shard_samples: int,
    workers: int,
    overwrite: bool,
) -> dict[str, int]:
    """Write the shards of a set that is images, uint8 (N, H, W) or (N, H, W, 3), and labels (N,) of each split."""
    content = digest(array.tobytes() for split in arrays.values() for array in split)
    record = Record(folder, {"kind": kind, "shard_samples": shard_samples, "source": content}, overwrite)
    splits = {
        name: Split(list(zip(images, labels.tolist(), strict=True)), _pixel_sample, shards_for(len(labels), shard_samples))
        for name, (images, labels) in arrays.items()
    }
    return write(record, splits, classes, workers)


def _pixel_sample(number: int, reference: tuple[np.ndarray, int]) -> Sample:
    pixels, label = reference
    return f"{number:06d}", png(pixels), "png", label


def extension_of(head: bytes) -> str | None:
    """The extension of an image by its first bytes, whatever its name is; None if it is of none of FORMATS."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((extension for extension, begins in MAGIC.items() if head.startswith(begins)), None)


def fault(image: ImageFile, decode: bool) -> str | None:
    """Why training could not use this image, or None. Without `decode` only head and end of a JPEG are read; it is decoded if its
    end is not that of a whole file, which some whole files lack too. Other kinds are always decoded."""
    if not image.size:
        return "it is empty" if os.path.exists(image.path) else "it is a link to a missing file"
    head = image.read(0, HEAD)
    if extension_of(head) is None:
        return f"it is none of {', '.join(FORMATS)} (it begins with {head[:4].hex(' ')})"
    # Damage within a PNG shows at neither end, and some decoders (torchvision 0.29) then end the whole process.
    if not decode and extension_of(head) == "jpg" and image.read(max(0, image.size - 2)) == END_OF_JPEG:
        # Long comments and colour profiles come before the image's size.
        with contextlib.suppress(ImageError):
            header = read_header(head)
            return size_fault((header.height, header.width), MAX_PIXELS) or None
    return refusal(image.read(), MAX_PIXELS)[0] or None


class Check(NamedTuple):
    """Finds the faults of images, in a worker process."""

    decode: bool

    def __call__(self, images: Sequence[ImageFile], tick: Tick) -> list[dict]:
        found = []
        for image in images:
            if reason := fault(image, self.decode):
                found.append({"picture": str(image), "reason": reason, "place": [image.path, image.offset]})
            tick(1)
        return found


def without_faults(
    splits: dict[str, list[ImageFile]], record: Record, workers: int, decode: bool, max_bad: float = MAX_BAD
) -> tuple[dict[str, list[ImageFile]], list[dict]]:
    """The images that training can use, and a list of the others, as {"split", "picture", "reason"}.

    Raises ValueError if more than the fraction `max_bad` of a split cannot be used: then the source itself is suspect.
    """
    total = sum(map(len, splits.values()))

    def check_all() -> dict[str, list[dict]]:
        found = {}
        for name, images in splits.items():
            chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
            parts = in_order(Check(decode), chunks, workers, f"{name}: checking", len(images))
            found[name] = [one for part in parts for one in part]
        return found

    faults = record.once("faults", check_all) if total else {}
    for name, bad in faults.items():
        if len(bad) > max_bad * len(splits[name]):
            first = "; ".join(f"{one['picture']}: {one['reason']}" for one in bad[:3])
            raise ValueError(
                f"{len(bad)} of {len(splits[name])} images for {name} cannot be used, more than "
                f"{max_bad:.1%}: {first}; mend the source, or allow more by --max-bad"
            )
    if empty := next((name for name, bad in faults.items() if len(bad) == len(splits[name])), None):
        raise ValueError(f"all of {empty}'s images cannot be used ({faults[empty][0]['reason']}); mend the source")
    # Not by name, which two images of a tar may share.
    bad = {tuple(one["place"]) for found in faults.values() for one in found}
    good = {name: [p for p in images if not bad or (p.path, p.offset) not in bad] for name, images in splits.items()}
    left_out = [(name, one["picture"], one["reason"]) for name, found in faults.items() for one in found]
    return good, [{"split": name, "picture": image, "reason": reason} for name, image, reason in left_out]


class Draw(NamedTuple):
    """Makes the sample of an image: its own bytes; a smaller JPEG if its shorter side exceeds `shorter` pixels; PNG for kinds in
    AS_PNG."""

    shorter: int | None = None
    quality: int = 90

    def __call__(self, number: int, image: ImageFile) -> Sample:
        encoded, (stem, extension) = image.read(), os.path.splitext(image.name)
        # Numbered, since two files may share a name. A key ends at its first dot, and a file name may hold any bytes.
        key = f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '_', stem)[:80]}"
        true = extension_of(encoded)
        extension = extension[1:].lower()
        if true != {"jpeg": "jpg", "tiff": "tif"}.get(extension, extension):
            extension = true
        if self.shorter:
            try:
                smaller = resized(encoded, self.shorter, self.quality)
            except ImageError as error:
                raise ValueError(f"{image}: cannot be decoded ({error}); mend or remove it") from None
            if smaller is not None:
                return key, smaller, "jpg", image.label
        if true in AS_PNG:
            with opened(encoded) as decoded:
                return key, png(np.asarray(colours(decoded))), "png", image.label
        return key, encoded, extension, image.label


def resized(encoded: bytes, shorter: int, quality: int = 90) -> bytes | None:
    """A JPEG (RGB, 4:2:0) of the image whose shorter side is `shorter` pixels, or None if it is no larger than that already.

    An EXIF orientation is not followed, as in common use of ImageNet; EXIF and colour profile are dropped, and what is transparent
    becomes white. Raises ImageError for bytes that are no image.
    """
    with opened(encoded) as decoded:
        width, height = decoded.size
        if min(width, height) <= shorter:
            return None
        scale = shorter / min(width, height)
        size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
        # A much larger JPEG is decoded at a half, a quarter or an eighth of its size, but at no less than twice the wanted size.
        decoded.draft(None, (2 * size[0], 2 * size[1]))
        smaller = rgb(decoded).resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return out.getvalue()


def is_image(path: Path) -> bool:
    """By its name, whether its kind can be read or not."""
    return path.suffix[1:].lower() in (*EXTENSIONS, *OTHERS)


def files_in(folder: Path, label: int) -> list[ImageFile]:
    """The images in `folder` and below it, sorted by name; links are followed. Hidden files are left out, such as ._NAME.jpg of a
    Mac. Raises ValueError for folders that cannot be read, or contain themselves."""
    found = []
    for path in _files(folder, ()):
        # A pipe or a device with an image's name would be read for ever.
        if is_image(path) and (path.is_file() or not path.exists()):
            size, changed = (state.st_size, state.st_mtime_ns) if (state := _state(path)) else (0, 0)
            found.append((path, size, changed))
    return [ImageFile(str(path), 0, size, path.name, label, changed) for path, size, changed in sorted(found)]


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # of a link
        return None


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Files in `folder` and below it that are not hidden. above: device and inode of each folder around it."""
    try:
        state = folder.stat()
        with os.scandir(folder) as found:
            entries = [(folder / one.name, one.is_dir()) for one in found if not one.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); make it readable, or remove it") from None
    if (here := (state.st_dev, state.st_ino)) in above:
        raise ValueError(f"{folder}: a link to a folder around it; remove it")
    for path, is_folder in entries:
        if is_folder:
            yield from _files(path, (*above, here))
        else:
            yield path


def listing(splits: dict[str, list[ImageFile]], source: Path) -> list[str]:
    """A line for each image, the same wherever the source lies, for a digest of the source."""
    root = f"{source}/"
    return [
        f"{name} {p.path.removeprefix(root)} {p.offset} {p.size} {p.changed} {p.name} {p.label}"
        for name, images in splits.items()
        for p in images
    ]
