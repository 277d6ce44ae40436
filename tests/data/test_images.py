"""Encoded images become squares: those of the stock transforms, from any bytes, or a reason why not."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import v2

from dnal_dist.data import images
from dnal_dist.data.decoding import Header, ImageError, decode
from dnal_dist.data.images import Transform, _random_part, normalise, reduction_of
from dnal_dist.data.pipeline import Batches
from dnal_dist.recipe import Augmentation, Data

KINDS = ["none", "pad_crop", "resized_crop"]


def settings(kind: str = "none", image_size: int = 24, **changes) -> Data:
    augmentation = Augmentation(kind=kind, **changes.pop("augmentation", {}))
    return Data(train="t", val="v", image_size=image_size, augmentation=augmentation, global_batch=1, **changes)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth with some edges and noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    noisy[height // 3 : height // 2, width // 4 : width // 2] //= 2
    return noisy.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **{"quality": 90} | options if kind == "JPEG" else options)
    return file.getvalue()


def stock(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def distance(ones, others) -> float:
    return float(np.abs(np.asarray(ones).astype(int) - np.asarray(others).astype(int)).mean())


# --- validation

SHAPES = [(375, 500), (500, 375), (256, 341), (333, 257), (100, 700), (31, 37), (256, 256)]


@pytest.mark.parametrize("height, width", SHAPES)
@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")])
def test_validation_is_bit_for_bit_the_stock_one(height, width, kind, mode):
    encoded = encode(scene(height, width), kind, mode)
    expected = v2.CenterCrop(224)(v2.Resize(256, antialias=True)(stock(encoded)))
    for train in (False, True):
        image, flip = Transform(settings(image_size=224, resize=256), 0, train)(encoded, 3, 5)
        assert np.array_equal(image, np.asarray(expected)) and not flip


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"keep_rgb": True}])
def test_jpegs_of_all_kinds_decode_to_the_bits_that_pillow_gives(options):
    encoded = encode(scene(61, 83), **options)
    assert np.array_equal(decode(encoded), np.asarray(stock(encoded)))


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("kind", ["none", "pad_crop"])
def test_images_of_fixed_size_are_not_resized(kind, size):
    pixels = scene(size, size)
    transform = Transform(settings(kind, size, augmentation={"padding": 2}), 0, True)
    assert np.array_equal(Transform(settings(kind, size), 0, False)(encode(pixels, "PNG"), 0, 0)[0], pixels)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    for index in range(20):
        image, _ = transform(encode(pixels, "PNG"), 0, index)
        places = [(y, x) for y in range(9) for x in range(9) if np.array_equal(padded[y : y + size, x : x + size], image)]
        assert len(places) == 1 and (places[0] == (4, 4) if kind == "none" else 2 <= min(places[0]) <= max(places[0]) <= 6)


# --- training


def reference(pixels: np.ndarray, data: Data, seed: int, epoch: int, index: int) -> tuple[np.ndarray, bool]:
    """The augmentation step by step with torchvision on the whole image, at full resolution."""
    image, size, augmentation = torch.from_numpy(pixels).permute(2, 0, 1), data.image_size, data.augmentation
    rng = np.random.default_rng((seed, epoch, index))
    if augmentation.kind == "pad_crop":
        image = TF.pad(TF.center_crop(TF.resize(image, [size], antialias=True), [size, size]), [augmentation.padding] * 4)
        top, left = rng.integers(0, 2 * augmentation.padding, size=2, endpoint=True)
        image = image[:, top : top + size, left : left + size]
    else:
        if augmentation.resize:
            image = TF.resize(image, [augmentation.resize], antialias=True)
        part = _random_part(*image.shape[1:], augmentation.scale, rng)
        image = TF.resized_crop(image, *part, [size, size], antialias=True)
    return image.permute(1, 2, 0).numpy(), bool(augmentation.flip and rng.random() < 0.5)


AUGMENTATIONS = [
    ("pad_crop", {"padding": 3, "flip": True}),
    ("resized_crop", {"flip": True}),
    ("resized_crop", {"scale": (0.2, 0.5)}),
    ("resized_crop", {"resize": 80, "flip": True}),
]


@pytest.mark.parametrize("height, width", [(150, 200), (200, 150), (97, 64), (40, 300), (64, 64)])
@pytest.mark.parametrize("kind, augmentation", AUGMENTATIONS)
def test_training_images_are_those_of_the_augmentation_at_full_resolution(kind, augmentation, height, width, monkeypatch):
    monkeypatch.setattr(images, "reduction_of", lambda *_: 1)
    data, encoded = settings(kind, 64, augmentation=augmentation), encode(scene(height, width))
    pixels = np.array(stock(encoded))
    for index in range(12):
        image, flip = Transform(data, 7, True)(encoded, 2, index)
        expected, mirrored = reference(pixels, data, 7, 2, index)
        # pad_crop resizes as validation does, by Pillow, which rounds otherwise than torch here and there.
        assert np.abs(image.astype(int) - expected).max() <= 1 and flip == mirrored


@pytest.mark.parametrize("kind, augmentation", AUGMENTATIONS)
def test_reduced_scale_is_close_to_full_resolution(kind, augmentation):
    data, encoded = settings(kind, 32, augmentation=augmentation), encode(scene(403, 601))
    transform, header, reductions = Transform(data, 0, True), Header(403, 601, "YCbCr"), []
    pixels = np.array(stock(encoded))
    for index in range(30):
        reductions.append(reduction_of(header, transform.plan(header, 0, index), 32))
        assert distance(transform(encoded, 0, index)[0], reference(pixels, data, 0, 0, index)[0]) < 3
    assert max(reductions) > 1


@pytest.mark.parametrize("kind, augmentation", AUGMENTATIONS)
def test_reduced_scale_never_leaves_fewer_pixels_than_are_wanted(kind, augmentation):
    transform = Transform(settings(kind, 32, augmentation=augmentation), 0, True)
    for index in range(200):
        header = Header(*np.random.default_rng(index).integers(20, 900, 2).tolist(), "YCbCr")
        geometry = transform.plan(header, 0, index)
        factor = reduction_of(header, geometry, 32)
        if geometry.whole == header[:2]:
            left, wanted = [side / factor for side in geometry.part[2:]], (32, 32)
        else:
            left, wanted = [side / factor for side in header[:2]], geometry.whole
        assert factor == 1 or all(one >= other for one, other in zip(left, wanted, strict=True))
        assert factor == 8 or any(one < 2 * other for one, other in zip(left, wanted, strict=True))


def test_validation_and_training_without_augmentation_decode_at_full_scale():
    for train in (True, False):
        transform = Transform(settings("none", 32), 0, train)
        header = Header(2000, 3000, "YCbCr")
        assert reduction_of(header, transform.plan(header, 0, 0), 32) == 1


def test_random_changes_depend_on_seed_epoch_and_index_alone():
    data, encoded = settings("resized_crop", 16, augmentation={"flip": True}), encode(scene(60, 80))
    once = {(s, e, i): Transform(data, s, True)(encoded, e, i)[0].tobytes() for s in (0, 1) for e in (0, 1) for i in (0, 1)}
    assert len(set(once.values())) == 8
    transform = Transform(data, 1, True)
    assert transform(encoded, 0, 1)[0].tobytes() == once[1, 0, 1] and transform(encoded, 1, 0)[0].tobytes() == once[1, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width", [(300, 40), (40, 300), (24, 24), (7, 5), (1, 1), (1, 90)])
def test_images_of_any_shape_become_square(kind, height, width):
    data, encoded = settings(kind, augmentation={"flip": True}), encode(np.full((height, width, 3), 200, np.uint8))
    for train in (True, False):
        image, flip = Transform(data, 0, train)(encoded, 0, 0)
        assert (image.shape, image.dtype, type(flip)) == ((24, 24, 3), np.uint8, bool)
        assert 195 < image.max() < 205


def test_a_random_part_may_be_taken_of_the_resized_image():
    """An image that is one pixel in eight, resized away: only the part of a resized image has lost its stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255
    spreads = []
    for resize in (None, 8):
        data = settings("resized_crop", 32, augmentation={"scale": (0.2, 0.3), "resize": resize})
        spreads.append(float(Transform(data, 0, True)(encode(stripes, "PNG"), 0, 0)[0].std()))
    assert spreads[1] < 0.2 * spreads[0]


# --- the batch


def test_a_stack_is_one_tensor_of_channels_last_memory_without_gaps():
    images = Batches(8, True, False).stacked([scene(8, 8, seed) for seed in (0, 1)])
    assert images.shape == (2, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(images[1].permute(1, 2, 0), scene(8, 8, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise_is_the_usual_one(dtype):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)).permute(0, 3, 1, 2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = v2.Normalize(mean, std)(images.float() / 255)
    found = normalise(images, mean, std, dtype=dtype)
    assert found.is_contiguous() and found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))
    flips = torch.tensor([True, False, False, True, True])
    mirrored = normalise(images, mean, std, flips, dtype, torch.channels_last)
    assert mirrored.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mirrored[flips], found[flips].flip(-1)) and torch.equal(mirrored[~flips], found[~flips])


# --- images that are odd, and what is none


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


def test_what_is_no_image_is_refused_with_a_reason():
    transform = Transform(settings(), 0, False)
    cut = encode(scene(8, 8))[:100]
    for encoded, reason in ((b"", "it is empty"), (b"words", "no image"), (b"\xff\xd8", "no image"), (cut, ".")):
        with pytest.raises(ImageError, match=reason) as told:
            transform(encoded, 0, 0)
        assert str(told.value).isprintable()


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
def test_a_image_of_too_many_pixels_is_refused_by_its_header(kind, monkeypatch):
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
def test_a_truncated_jpeg_is_an_error_and_not_half_a_image(options):
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
def test_damaged_images_are_images_or_refused_and_say_nothing_else(kind, mode, capfd):
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
