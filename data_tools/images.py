"""Images in files and tars: found by their place, checked, and made smaller."""

import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_tools.record import Record
from data_tools.workers import Tick, in_order
from data_tools.writing import Sample
from dnal_dist.data.tar import FORMATS
from dnal_dist.recipe import Data

EXTENSIONS = ("png", "jpg", "jpeg", "gif")
# Found too, so that they are counted among those that are left out.
OTHERS = ("webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "jfif", "avif", "heic", "jxl")
MAX_PIXELS = Data.model_fields["max_pixels"].default
MAX_BAD = 0.01
HEAD = 16 << 10
END_OF_JPEG = b"\xff\xd9"
CHUNK = 2000
# libjpeg and libpng tell what went wrong by these; a struct.error or SyntaxError is Pillow's parser in a damaged header.
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError)

# data.max_pixels takes the place of Pillow's own bound, here as in training.
Image.MAX_IMAGE_PIXELS = None


class ImageFile(NamedTuple):
    """An encoded image: `size` bytes from `offset` of the file at `path`, which may be a tar."""

    path: str
    offset: int
    size: int
    name: str
    """Its file's name, for messages and keys."""
    label: int
    changed: int = 0
    """When the file at `path` last was, in ns."""

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


def pixel_sample(number: int, reference: tuple[np.ndarray, int]) -> Sample:
    pixels, label = reference
    return f"{number:06d}", png(pixels), "png", label


def extension_of(head: bytes) -> str | None:
    """What an image is by its first bytes, whatever its name says."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "gif" if head.startswith((b"GIF87a", b"GIF89a")) else None


def fault(image: ImageFile, decode: bool) -> str | None:
    """Why training could not use this image, or None. Without `decode` a JPEG's head is read and its end looked at; it is decoded
    only if it does not end as a whole file does, which some whole ones do not either. Other kinds are always decoded."""
    if not image.size:
        return "it is empty" if os.path.exists(image.path) else "it is a link to what is not there"
    head = image.read(0, HEAD)
    if extension_of(head) is None:
        return f"it is none of JPEG, PNG, GIF (it begins with {head[:4].hex(' ')})"
    # A PNG does not show at its ends that it is damaged within, and some decoders (torchvision 0.29) then end the whole process.
    if decode or extension_of(head) != "jpg" or image.read(max(0, image.size - 2)) != END_OF_JPEG:
        return decoding_fault(image.read())[0]
    try:
        with Image.open(io.BytesIO(head), formats=("JPEG",)) as decoded:
            return too_large(decoded.size)
    except UNREADABLE:
        # Long comments and colour profiles come before what says the image's size.
        return decoding_fault(image.read())[0]


def too_large(size: tuple[int, int]) -> str | None:
    """Why training refuses an image of this width and height, or None."""
    if size[0] * size[1] <= MAX_PIXELS:
        return None
    return f"it has {size[0]} x {size[1]} pixels, more than data.max_pixels allows by default ({MAX_PIXELS})"


def decoding_fault(encoded: bytes) -> tuple[str | None, tuple[int, int] | None]:
    """Why an image cannot be decoded, or None, and its width and height if it tells them."""
    size = None
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as decoded:
            size = decoded.size
            if reason := too_large(size):
                return reason, size
            if ends_early(encoded):
                return "it is truncated, though it has an end", None
            if getattr(decoded, "is_animated", False):
                return "it is animated", size
            # An eighth of a JPEG's size takes a third of the time, and all of the file is read for it.
            decoded.draft(None, (1, 1))
            decoded.load()
            if decoded.format == "PNG":
                with Image.open(io.BytesIO(encoded)) as again:  # its checksums, which loading does not look at
                    again.verify()
    except UnidentifiedImageError:
        return "its header cannot be read", None
    except UNREADABLE as error:
        return (str(error).splitlines() or [type(error).__name__])[0], size
    return None, size


def ends_early(encoded: bytes) -> bool:
    """Whether a JPEG's data ends before its image does: with an end behind it, it is whole to Pillow, the missing part grey."""
    if extension_of(encoded) != "jpg":
        return False
    try:
        colours = simplejpeg.decode_jpeg_header(encoded)[2]
        # An eighth of the size: all of the data is read for it too.
        simplejpeg.decode_jpeg(encoded, "CMYK" if colours in ("CMYK", "YCCK") else "RGB", min_height=1, min_width=1)
    except ValueError as error:
        return "premature end of data" in str(error)
    return False


class Check(NamedTuple):
    """Finds the faults of some images, in a worker."""

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
    """The images that training can use, and of the others which they are and why, as {"picture", "reason"}.

    Raises ValueError if more than `max_bad` of a split are of no use: then the source itself is suspect.
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
    # Images of a tar may share a name.
    bad = {tuple(one["place"]) for found in faults.values() for one in found}
    good = {name: [p for p in images if not bad or (p.path, p.offset) not in bad] for name, images in splits.items()}
    left_out = [(name, one["picture"], one["reason"]) for name, found in faults.items() for one in found]
    return good, [{"split": name, "picture": image, "reason": reason} for name, image, reason in left_out]


class Draw(NamedTuple):
    """Makes a sample of an image: its bytes as they are, or, if its shorter side exceeds `shorter` pixels, a smaller JPEG."""

    shorter: int | None = None
    quality: int = 90

    def __call__(self, number: int, image: ImageFile) -> Sample:
        encoded, (stem, extension) = image.read(), os.path.splitext(image.name)
        # A key ends at its first dot; two files may share a name; and a name may be of any bytes.
        key = f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '_', stem)[:80]}"
        true = extension_of(encoded)
        extension = extension[1:].lower()
        if true != {"jpeg": "jpg"}.get(extension, extension):
            extension = true
        if self.shorter:
            try:
                smaller = resized(encoded, self.shorter, self.quality)
            except UNREADABLE as error:
                raise ValueError(f"{image}: cannot be decoded ({error}); mend or remove it") from None
            if smaller is not None:
                return key, smaller, "jpg", image.label
        if true == "gif":
            # Readers of shards know no GIF by its extension; PNG holds the same pixels.
            with Image.open(io.BytesIO(encoded), formats=("GIF",)) as decoded:
                return key, png(np.asarray(rgb(decoded))), "png", image.label
        return key, encoded, extension, image.label


def resized(encoded: bytes, shorter: int, quality: int = 90) -> bytes | None:
    """A JPEG (RGB, 4:2:0) of the image whose shorter side is `shorter` pixels, or None if it is no larger than that already.

    As in ImageNet's own use an orientation in EXIF is not followed, and EXIF and colour profile, which training does not look at,
    are left out. Raises one of UNREADABLE for what is no image.
    """
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as decoded:
        width, height = decoded.size
        if min(width, height) <= shorter:
            return None
        scale = shorter / min(width, height)
        size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
        # A JPEG of many times the size is decoded at a half, a quarter or an eighth, but at no less than twice what is wanted.
        decoded.draft(None, (2 * size[0], 2 * size[1]))
        decoded.load()
        smaller = rgb(decoded).resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return out.getvalue()


def rgb(decoded: Image.Image) -> Image.Image:
    """The image in the colours that training sees."""
    if decoded.mode.startswith("I"):
        # A grey PNG of 16 bits: the upper byte is what one of 8 bits would hold, as in training.
        decoded = Image.fromarray((np.asarray(decoded, np.uint32) >> 8).astype(np.uint8))
    return decoded if decoded.mode == "RGB" else decoded.convert("RGB")


def is_image(path: Path) -> bool:
    """By its name, and of whatever kind."""
    return path.suffix[1:].lower() in (*EXTENSIONS, *OTHERS)


def files_in(folder: Path, label: int) -> list[ImageFile]:
    """The images in `folder` and its own folders, by name; links are followed. What is hidden is left out: ._NAME.jpg, of a Mac,
    is no image. Raises ValueError for folders that cannot be read, or lead back to themselves."""
    found = []
    for path in _files(folder, ()):
        # A pipe or a device by an image's name would be read for ever.
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
    """What is not hidden in `folder` and below it. above: device and number of each folder that it is in."""
    try:
        state = folder.stat()
        with os.scandir(folder) as found:
            entries = [(folder / one.name, one.is_dir()) for one in found if not one.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}); make it readable, or remove it") from None
    if (here := (state.st_dev, state.st_ino)) in above:
        raise ValueError(f"{folder}: a link to a folder that it is in itself; remove it")
    for path, is_folder in entries:
        if is_folder:
            yield from _files(path, (*above, here))
        else:
            yield path


def listing(splits: dict[str, list[ImageFile]], source: Path) -> list[str]:
    """A line for each image, from which a digest of the source can be made, wherever it lies."""
    root = f"{source}/"
    return [
        f"{name} {p.path.removeprefix(root)} {p.offset} {p.size} {p.changed} {p.name} {p.label}"
        for name, images in splits.items()
        for p in images
    ]
