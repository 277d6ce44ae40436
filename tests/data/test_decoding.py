"""Encoded images of any kind are decoded as Pillow decodes them, or refused with a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from scenes import encode, scene, settings, stock

from dnal_dist.data import images
from dnal_dist.data.decoding import ImageError, decode
from dnal_dist.data.images import Transform


def png_of_16_bits(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha. pixels: uint16 (h, w, channels)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_of_16_bits_the_upper_byte_counts(colour, channels):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (9, 7, channels), np.uint16)
    upper = (pixels >> 8).astype(np.uint8)
    if channels % 2 == 0:
        pixels[..., -1] = 0xFFFF
    expected = np.repeat(upper[:, :, :1], 3, 2) if channels < 3 else upper[:, :, :3]
    assert np.array_equal(decode(png_of_16_bits(pixels, colour)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pngs_of_all_modes_are_what_pillow_converts_them_to(mode):
    encoded = encode(scene(20, 30), "PNG", mode)
    assert np.array_equal(decode(encoded), np.asarray(stock(encoded)))


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_an_animation_is_refused(kind):
    frames, file = [Image.new("RGB", (8, 8), (grey, 0, 0)) for grey in (0, 200)], io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="it is animated, or has several pages"):
        decode(file.getvalue())


def test_files_that_are_no_image_are_refused_with_a_reason():
    transform = Transform(settings(), 0, False)
    cut = encode(scene(8, 8))[:100]
    for encoded, reason in ((b"", "it is empty"), (b"words", "no image"), (b"\xff\xd8", "no image"), (cut, ".")):
        with pytest.raises(ImageError, match=reason) as refused:
            transform(encoded, 0, 0)
        assert str(refused.value).isprintable()


def bomb(kind: str) -> bytes:
    """An image of few bytes whose header tells of 60000 x 60000 pixels."""
    if kind == "PNG":
        whole = png_of_16_bits(np.zeros((1, 1, 3), np.uint16), 2)
        head = b"IHDR" + struct.pack(">II", 60000, 60000) + whole[24:29]
        return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]
    whole = encode(scene(8, 8))
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", 60000, 60000) + whole[at + 4 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind, monkeypatch):
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"^60000 x 60000 pixels, more than data\.max_pixels \(100000000\) allows$"):
        Transform(settings(), 0, False)(bomb(kind), 0, 0)


def test_max_pixels_is_the_bound_and_pillows_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    encoded = encode(scene(30, 40), "PNG")
    assert Transform(settings(max_pixels=1200), 0, False)(encoded, 0, 0)[0].shape == (24, 24, 3)
    with pytest.raises(ImageError, match=r"^40 x 30 pixels"):
        Transform(settings(max_pixels=1199), 0, False)(encoded, 0, 0)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_a_line_that_would_grow_without_bounds_is_refused():
    encoded = encode(np.zeros((1, 60_000, 3), np.uint8))
    with pytest.raises(ImageError, match=r"resized from 60000 x 1 to 15360000 x 256 pixels, more than data\.max_pixels"):
        Transform(settings(image_size=224, resize=256, max_pixels=10_000_000), 0, False)(encoded, 0, 0)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}])
def test_a_truncated_jpeg_is_an_error_and_not_half_an_image(options):
    whole = encode(scene(120, 160), **options)
    image = decode(whole)
    for length in range(len(whole) - 1, 0, -37):
        try:
            found = decode(whole[:length])
        except ImageError:
            continue
        assert np.array_equal(found, image), length
    for end in (b"", b"\xff\xd9"):
        with pytest.raises(ImageError, match="truncated"):
            decode(whole[: len(whole) // 2] + end)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_harmless_faults_of_a_jpeg_are_passed_over(mode):
    whole = encode(scene(40, 50), mode=mode)
    for faulty in (whole + b"more", whole[:-2] + b"\x12\x34" + whole[-2:]):
        assert np.array_equal(decode(faulty), decode(whole))


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("GIF", "P")])
def test_damaged_images_are_decoded_or_refused_without_other_output(kind, mode, capfd):
    whole, rng, refused = encode(scene(24, 36), kind, mode), np.random.default_rng(0), 0
    transform = Transform(settings(max_pixels=1_000_000), 0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1500):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
            for place in rng.integers(0, len(damaged), rng.integers(0, 6)):
                damaged[place] ^= 1 << rng.integers(8)
            try:
                image, _ = transform(bytes(damaged), 0, 0)
                assert (image.shape, image.dtype) == ((24, 24, 3), np.uint8)
            except ImageError as error:
                refused += 1
                assert "\n" not in str(error) and str(error).isprintable()
    assert refused > 300
    assert capfd.readouterr() == ("", "")
