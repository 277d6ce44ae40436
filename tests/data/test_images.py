"""Encoded images become squares: those of the stock transforms, from any bytes, or a reason why not."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scenes import encode, scene, settings, stock
from torchvision.transforms import v2

from dnal_dist.data import images
from dnal_dist.data.decoding import Header, decode
from dnal_dist.data.images import Transform, _random_part, normalise, reduction_of
from dnal_dist.data.kept import Kept
from dnal_dist.data.order import Place
from dnal_dist.data.pipeline import Batches, Decoder, Item
from dnal_dist.data.policy import policy_for
from dnal_dist.recipe import Data

KINDS = ["none", "pad_crop", "resized_crop"]


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


@pytest.mark.parametrize("policy", ["trivial_augment", "rand_augment"])
def test_a_policy_is_torchvisions_and_depends_on_seed_epoch_and_sample_alone(policy):
    """And neither moves torch's generator nor is moved by it."""
    made = {"trivial_augment": v2.TrivialAugmentWide, "rand_augment": v2.RandAugment}[policy](fill=[124, 116, 104])
    change = policy_for(settings(augmentation={"policy": policy}), 7)
    image, before = scene(24, 24), torch.get_rng_state()
    torch.manual_seed(1)
    found = [change(image, 2, index) for index in range(8)]
    assert torch.initial_seed() == 1 and torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())
    again = Decoder(Transform(settings(image_size=24), 7, True), False, Kept(), change)
    encoded = Item(Place(0, 2, 0, 3, 3), None, None, 0, encode(image, "PNG"))
    assert np.array_equal(again(encoded).image, found[3])
    assert any(not np.array_equal(one, image) for one in found)
    torch.manual_seed(int(np.random.SeedSequence((7, 2, 3, 1)).generate_state(1, np.uint64)[0] >> 1))
    expected = made(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    torch.set_rng_state(before)
    assert np.array_equal(found[3], expected)


def test_erased_parts_are_the_mean():
    change = policy_for(settings(augmentation={"erasing": 1.0}, mean=(0.2, 0.4, 0.6)), 0)
    image = np.full((32, 32, 3), 250, np.uint8)
    found = change(image, 0, 0)
    erased = (found == (51, 102, 153)).all(-1)
    assert 0.02 < erased.mean() < 0.4 and (found[~erased] == 250).all()
    assert policy_for(settings(), 0) is None
