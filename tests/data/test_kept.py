"""Decoded images that are kept: the very batches of a stream that decodes each image each time, within a bound."""

import multiprocessing
import pickle

import numpy as np
import pytest
from faulty import write_tar
from scenes import encode, scene

from dnal_dist.data import images
from dnal_dist.data.decoding import Header
from dnal_dist.data.kept import Kept, KeptImage
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Data

AUGMENTATIONS = {
    "none": {"flip": True},
    "pad_crop": {"kind": "pad_crop", "padding": 3, "flip": True},
    "resized_crop": {"kind": "resized_crop"},
    "resized_crop of a resized image": {"kind": "resized_crop", "resize": 40},
}
SAMPLES = 16


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """JPEGs and PNGs of several sizes, some of which are decoded at a reduced scale; one has an alpha channel, one is no image."""
    sizes, members = [(32, 32), (40, 61), (90, 70), (150, 130)], {}
    for number in range(SAMPLES):
        kind, mode = (("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"))[number // 4]
        members[f"{number:02}.png"] = encode(scene(*sizes[number % 4], number), kind, mode) if number != 5 else b"no image"
        members[f"{number:02}.cls"] = str(number % 10).encode()
    path = tmp_path_factory.mktemp("kept") / "all.tar"
    write_tar(path, members)
    return path


def seen(shard, train: bool, augmentation: str, decoded_gb: float, workers: int = 0) -> list:
    """Everything that three epochs' batches hold."""
    data = Data(
        train=str(shard),
        val=str(shard),
        image_size=32,
        global_batch=4,
        workers=workers,
        decoded_gb=decoded_gb,
        augmentation=AUGMENTATIONS[augmentation],
    )
    stream = Stream(Shards(str(shard), "data.train", 10, data), data, 0, train)
    batches, per_epoch = stream.batches(), SAMPLES // 4
    found = [next(batches) for _ in range(3 * per_epoch)] if train else [batch for _ in range(3) for batch in stream.batches()]
    return [
        (b.images.numpy().tobytes(), b.labels.tolist(), b.flips.tolist(), b.keys, list(map(str, b.bad)), b.tally, b.with_alpha)
        for b in found
    ]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("train", [True, False])
def test_batches_are_those_of_a_stream_that_keeps_nothing(shard, train, augmentation):
    assert seen(shard, train, augmentation, 1.0) == seen(shard, train, augmentation, 0)


@pytest.fixture
def decoded(monkeypatch):
    """A shared counter of the images that this process and its loaders decode."""
    decode, count = images.decode, multiprocessing.Value("i")

    def counting(*arguments):
        with count:
            count.value += 1
        return decode(*arguments)

    monkeypatch.setattr(images, "decode", counting)
    return count


def test_an_image_is_decoded_once(shard, decoded):
    seen(shard, False, "none", 1.0)
    assert decoded.value == SAMPLES - 1


def test_loader_processes_share_what_each_has_decoded(shard, decoded):
    """Batches are taken from two processes in turn, so an image comes to either of them, in one epoch or another."""
    kept = seen(shard, True, "pad_crop", 1.0, workers=2)
    # A process that is ahead may decode what the other has in its hands.
    assert SAMPLES - 1 <= decoded.value < 2 * SAMPLES
    assert kept == seen(shard, True, "pad_crop", 0)


def test_a_set_that_does_not_fit_is_not_kept(shard, decoded):
    seen(shard, False, "none", 32 * 32 * 3 * SAMPLES / 1e9)
    assert decoded.value == 3 * (SAMPLES - 1)


def image(number: int, key: str = "key") -> KeptImage:
    return KeptImage(key, number, Header(300, 200, "", alpha=bool(number % 2)), scene(6, 5, number))


def test_an_image_comes_back_as_it_was_until_the_memory_is_full():
    kept = Kept(10, 1000)
    for number in range(10):
        kept.put(number, image(number, "k\udc80" * number))
    there = [number for number in range(10) if kept.get(number) is not None]
    assert there == list(range(len(there))) and 5 <= len(there) <= 9
    for number in there:
        found, expected = kept.get(number), image(number, "k\udc80" * number)
        assert found[:3] == expected[:3] and np.array_equal(found.pixels, expected.pixels)


def test_a_pickled_copy_keeps_nothing():
    kept = Kept(10, 1000)
    kept.put(3, image(3))
    copy = pickle.loads(pickle.dumps(kept))
    copy.put(3, image(3))
    assert copy.get(3) is None and kept.get(3) is not None
