"""Encoded images to pixels, uint8, whatever bytes they are. No torch.

JPEGs go through simplejpeg; what it refuses (CMYK, small faults) and all other kinds go through Pillow. Whatever a decoder raises
is an ImageError.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from dnal_dist.common.errors import reason

# As Pillow calls them. To it a JPEG with further images behind it, as phones and stereo cameras make them, is an MPO.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
# A longer side takes more memory for the rows than for their pixels; no JPEG has one.
MOST_SIDE = 65_535
# Of smaller images simplejpeg could mean another scale by the same size.
SMALLEST_REDUCED = 64
WHITE = (255, 255, 255)


class ImageError(ValueError):
    """An image cannot be decoded; the message is the reason, one line."""


class Header(NamedTuple):
    height: int
    width: int
    colours: str
    """YCbCr, Gray, RGB, CMYK or YCCK of a JPEG; empty for other kinds."""
    orientation: int = 1
    """How the stored pixels are turned, 1 to 8 as in EXIF; height and width are those after it."""
    alpha: bool = False
    """Whether it may be transparent somewhere."""

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width of the pixels as they are stored."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)

    @property
    def plain(self) -> bool:
        """Whether simplejpeg decodes it; Pillow decodes the rest."""
        return self.colours in ("YCbCr", "Gray", "RGB")


def read_header(encoded: bytes, exif: bool = False) -> Header:
    """Size and kind of an image, without decoding it; exif: with the orientation in its EXIF. Raises ImageError."""
    if not encoded:
        raise ImageError("it is empty")
    if encoded[:2] == b"\xff\xd8":
        with contextlib.suppress(Exception):  # Pillow says what is wrong
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            orientation = 1
            # In a JPEG, EXIF is a segment that begins so; Pillow is asked only where there is one.
            if exif and b"Exif\0\0" in encoded:
                with contextlib.suppress(ImageError), opened(encoded) as image:
                    orientation = _orientation(image)
            return _oriented_header(height, width, colours, orientation)
    with opened(encoded) as image:
        # Pillow turns a TIFF itself while it decodes it, and its height and width are those after that.
        orientation = _orientation(image) if exif and image.format != "TIFF" else 1
        return _oriented_header(image.height, image.width, "", orientation)._replace(alpha=has_alpha(image))


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # of many kinds: damaged EXIF is no reason to do without the image
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in range(1, 9) else 1
    return 1


def _oriented_header(height: int, width: int, colours: str, orientation: int) -> Header:
    return Header(*((width, height) if orientation > 4 else (height, width)), colours, orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (height, width, 3) as they are to be seen; EXIF numbers the ways in which they may be stored from 1 to 8."""
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def decode(
    encoded: bytes, header: Header | None = None, reduction: int = 1, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """uint8 (height, width, 3), height and width divided by `reduction` and rounded up. `header`: if it has been read already.
    background: what shows through where the image is transparent.

    Raises ImageError for what is no image, an animation, or cut short.
    """
    header = header or read_header(encoded)
    return _turned(_stored_pixels(encoded, header, reduction, background), header.orientation)


def _stored_pixels(encoded: bytes, header: Header, reduction: int, background: tuple[int, int, int]) -> np.ndarray:
    height, width = header.stored
    if header.colours:
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        try:
            # Strict: it refuses whatever is wrong with a JPEG. Pillow then tells the harmless from the truncated.
            pixels = simplejpeg.decode_jpeg(encoded, "RGB" if header.plain else "CMYK", **least if reduction > 1 else {})
            if header.plain:
                return pixels
        except Exception as error:
            if "premature end of data" in str(error):
                # With an end behind it, half an image is a whole one to Pillow, and the other half is grey.
                raise ImageError("it is truncated, though it has an end") from None
    with opened(encoded) as image:
        if (image.height, image.width) != (height, width):
            raise ImageError("its headers contradict each other")
        if image.mode == "F":
            raise ImageError("its pixels are floating-point numbers, of which white and black are not known")
        return np.array(rgb(image, background))


def rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An image of Pillow's, not loaded yet, in RGB with `background` behind it. Of 16 bits the upper byte counts."""
    image = colours(image)
    if image.mode == "RGB":
        return image
    ground = Image.new("RGB", image.size, background)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def colours(image: Image.Image) -> Image.Image:
    """The same in RGB or, where it may be transparent, RGBA."""
    transparent, kind = image.info.get("transparency"), image.format
    if image.mode.startswith("I"):
        values = np.asarray(image)
        found = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
        if transparent is not None:
            found.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
        return found
    if not has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(transparent, tuple) and any("16" in str(part.args) for part in image.tile):
        # Pillow halves the bits of the pixels, and not those of the colour that they are compared with.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    found = image.convert("RGBA")
    # Most programs that write a BMP with room for alpha leave it empty.
    unused = kind == "BMP" and found.getchannel("A").getextrema() == (0, 0)
    return found.convert("RGB") if unused else found


def has_alpha(image: Image.Image) -> bool:
    """Whether it may be transparent somewhere."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def refusal(encoded: bytes, max_pixels: int) -> tuple[str, Header | None]:
    """Why training could not use an image, or "", and its header, if that can be read. JPEGs are decoded at an eighth of their
    scale, which takes a third of the time and still reads them whole."""
    header = None
    try:
        header = read_header(encoded)
        check_size((header.height, header.width), max_pixels)
        decode(encoded, header, 8 if header.plain and min(header.height, header.width) >= SMALLEST_REDUCED else 1)
    except ImageError as error:
        return str(error), header
    return "", header


@contextlib.contextmanager
def opened(encoded: bytes) -> Iterator[Image.Image]:
    """The image in Pillow's hands, its pixels not decoded yet. Whatever Pillow raises in here is raised as ImageError."""
    most = Image.MAX_IMAGE_PIXELS
    try:
        # data.max_pixels takes the place of Pillow's own bound, and a reason that of its warnings.
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise ImageError("it is animated, or has several pages")
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"it is no image of the kinds {', '.join(FORMATS)}, or its header is damaged") from None
    except Exception as error:  # of many kinds: each of Pillow's readers has its own
        raise ImageError(reason(error)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def check_size(shape: tuple[int, int], max_pixels: int, how: str = "") -> None:
    """Raise ImageError for a height and width that would take too much memory; `how` the image came to have them."""
    if fault := size_fault(shape, max_pixels):
        raise ImageError(how + fault)


def size_fault(shape: tuple[int, int], max_pixels: int) -> str:
    """Why an image of this height and width would take too much memory; "" if it would not."""
    if shape[0] * shape[1] > max_pixels:
        return f"{shape[1]} x {shape[0]} pixels, more than data.max_pixels ({max_pixels}) allows"
    if max(shape) > MOST_SIDE:
        return f"{shape[1]} x {shape[0]} pixels, and no side may have more than {MOST_SIDE}"
    return ""
