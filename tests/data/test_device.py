"""Batches reach the device in order, none is taken ahead, and nvJPEG's path gives the images of the CPU's."""

import jpegs
import numpy as np
import pytest
import simplejpeg
import torch
from torchvision.transforms import v2

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.data import device, images, nvjpeg, receipts
from dnal_dist.data import device as feeding
from dnal_dist.data.device import feed
from dnal_dist.data.pipeline import Batch, Stream
from dnal_dist.data.shards import Origin, Shards
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Augmentation, Data
from dnal_dist.training import setup

CPU = torch.device("cpu")


def settings(folder="", kind: str = "resized_crop", **changes) -> Data:
    augmentation = Augmentation(kind=kind, padding=3, flip=True, **changes.pop("augmentation", {}))
    paths = {"train": f"{folder}/train-*.tar", "val": f"{folder}/train-*.tar", "image_size": 32, "global_batch": 12}
    return Data(**paths, augmentation=augmentation, **{"workers": 0} | changes)


def batch_of(number: int, size: int = 8) -> Batch:
    rng = np.random.default_rng(number)
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, size, size), np.uint8))
    return Batch(
        images, torch.from_numpy(rng.integers(0, 10, 4)), torch.tensor([True, False, True, False]), [str(number)], [], (0, 0)
    )


def counted(taken: list, closed: list, count: int = 100):
    try:
        for number in range(count):
            taken.append(number)
            yield batch_of(number)
    finally:
        closed.append(True)


def test_batches_come_in_order_normalised_and_mirrored():
    data = settings()
    found = list(feed(counted([], [], 3), data, CPU, memory_format=torch.channels_last))
    assert [fed.batch.keys for fed in found] == [["0"], ["1"], ["2"]]
    for number, fed in enumerate(found):
        batch = batch_of(number)
        expected = v2.Normalize(data.mean, data.std)(batch.images.float() / 255)
        expected[batch.flips] = expected[batch.flips].flip(-1)
        assert fed.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fed.images, expected)
        assert torch.equal(fed.labels, batch.labels)


def test_no_batch_is_taken_before_it_is_asked_for_and_closing_reaches_the_stream():
    taken, closed = [], []
    fed = feed(counted(taken, closed), settings(), CPU)
    for _ in range(3):
        next(fed)
    assert taken == [0, 1, 2] and not closed
    fed.close()
    assert taken == [0, 1, 2] and closed


def test_what_a_stream_raises_comes_with_the_batch_that_it_is_about():
    def failing():
        yield batch_of(0)
        raise InputError("shard gone")

    fed = feed(failing(), settings(), CPU)
    next(fed)
    with pytest.raises(InputError, match="shard gone"):
        next(fed)


def test_waiting_is_the_time_for_the_stream_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(feeding.time, "monotonic", lambda: now[0])

    def slow():
        for number in range(2):
            now[0] += 3.0
            yield batch_of(number)

    def normalise(images, *_, **__):
        now[0] += 50.0
        return images

    monkeypatch.setattr(device, "normalise", normalise)
    waited = []
    for fed in feed(slow(), settings(), CPU):
        waited.append(fed.waited)
        now[0] += 700.0
    assert waited == [3.0, 3.0]


# --- nvJPEG's path, with another decoder in its place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jpegs.shard(tmp_path_factory.mktemp("jpegs"))


def batches(folder, count: int = 2, train: bool = True, **changes):
    data = settings(folder, **changes)
    stream = Stream(Shards(data.train, "data.train", 10), data, 0, train)
    fed = feed(stream.batches(), data, CPU)
    found = [next(fed) for _ in range(count)]
    fed.close()
    return found


class Decoder:
    """In place of nvJPEG: lists as torchvision's, on the CPU, refusing a whole list for one JPEG whose bytes are in `refused`."""

    def __init__(self):
        self.seen, self.refused = [], set()

    def __call__(self, jpegs, _device):
        found = [jpeg.numpy().tobytes() for jpeg in jpegs]
        if self.refused.intersection(found):
            raise RuntimeError("nvjpegDecode failed")
        self.seen += found
        return [torch.from_numpy(simplejpeg.decode_jpeg(jpeg)).permute(2, 0, 1) for jpeg in found]


@pytest.fixture
def decoder(monkeypatch):
    decoder = Decoder()
    monkeypatch.setattr(nvjpeg, "decode", decoder)
    return decoder


def same(ones, others, tolerance: float) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.batch.keys == other.batch.keys and one.batch.tally == other.batch.tally
        assert [str(fault) for fault in one.batch.bad] == [str(fault) for fault in other.batch.bad]
        assert torch.equal(one.labels, other.labels) and torch.equal(one.batch.flips, other.batch.flips)
        assert float((one.images - other.images).abs().max()) <= tolerance / 255 / 0.224


@pytest.mark.parametrize(
    "kind, augmentation", [("none", {}), ("pad_crop", {}), ("resized_crop", {}), ("resized_crop", {"resize": 40})]
)
def test_the_device_gives_the_images_of_the_cpu(kind, augmentation, folder, decoder, monkeypatch):
    monkeypatch.setattr(images, "reduction_of", lambda *_: 1)
    ours = batches(folder, decode="cuda", kind=kind, augmentation=augmentation)
    # What nvJPEG can take of the 24.
    assert len(decoder.seen) == 20
    # Pillow and torch round differently.
    same(ours, batches(folder, kind=kind, augmentation=augmentation), 2)


def test_encoded_images_come_through_loader_processes(folder, decoder):
    same(batches(folder, decode="cuda", workers=1), batches(folder, decode="cuda"), 0)


def test_an_image_that_the_device_refuses_is_decoded_on_the_cpu(folder, decoder):
    data = settings(folder)
    shards = Shards(data.train, "data.train", 10)
    decoder.refused = {shards[4].image, shards[11].image}
    same(batches(folder, decode="cuda"), batches(folder), 40)
    assert len(decoder.seen) == 18


def test_an_image_that_neither_decodes_is_left_out_and_reported(folder, decoder):
    whole = batches(folder, 1, decode="cuda")[0]
    stream = Stream(Shards(f"{folder}/train-*.tar", "data.train", 10), settings(folder, decode="cuda"), 0, True)
    batch = next(stream.batches())
    jpegs = [part.numpy().tobytes() for part in batch.encoded.data.split(batch.encoded.sizes)]
    # The end is in its place, so that only decoding shows the fault.
    jpegs[2] = jpegs[2][: len(jpegs[2]) // 2]
    decoder.refused = {jpegs[2]}
    lost = batch.encoded.rows[2]
    found = nvjpeg.finish(batch._replace(encoded=nvjpeg.pack(jpegs, *batch.encoded[2:])), 32, CPU)
    kept = [place for place in range(len(batch.labels)) if place != lost]
    assert found.keys == [batch.keys[place] for place in kept] and torch.equal(found.labels, batch.labels[kept])
    assert torch.equal(found.flips, batch.flips[kept]) and torch.equal(found.images, whole.batch.images[kept])
    (fault,) = set(map(str, found.bad)) - set(map(str, batch.bad))
    assert fault.startswith(f"{folder}/train-000000.tar: sample {batch.keys[lost]} at byte ")
    assert found.tally == receipts.without(batch.tally, [batch.encoded.origins[2]])


def test_a_batch_of_which_nothing_is_left_stops_the_run(decoder):
    jpeg, geometry = b"\xff\xd8 no image \xff\xd9", nvjpeg.Geometry((8, 8), (8, 8), (0, 0, 8, 8))
    encoded = nvjpeg.pack([jpeg], [0], [geometry], [Origin("shard/3", 0, "3", "shard", 9, 3)])
    decoder.refused = {jpeg}
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    batch = Batch(empty, torch.tensor([1]), torch.tensor([False]), ["3"], [], (0, 0), encoded)
    with pytest.raises(InputError, match=r"shard: sample 3 at byte 9: .*: no image of a batch of 1 can be used"):
        nvjpeg.finish(batch, 8, CPU)


def test_validation_never_waits_for_the_device(folder, decoder):
    ours = batches(folder, train=False, decode="cuda")
    assert not decoder.seen
    same(ours, batches(folder, train=False), 0)


def test_without_a_gpu_decoding_there_is_refused_before_training(digits, tmp_path):
    paths = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path / 'run'}"]
    asked = recipe.load("recipes/digits.yaml", [*paths, "data.decode=cuda"])
    with pytest.raises(InputError, match=r"key 'data\.decode': cuda needs an NVIDIA GPU, and this run computes on the cpu"):
        setup.prepare(asked, Context())


def test_a_torchvision_without_nvjpeg_is_refused_before_training(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(nvjpeg, "decode", refuse)
    with pytest.raises(InputError, match=r"key 'data\.decode': .*\(not compiled with nvJPEG support\); set it to cpu"):
        nvjpeg.require(torch.device("cuda"))


def test_a_batch_that_lost_samples_is_filled_with_images_of_no_weight():
    """The loss and its gradient are those of the images that there are, and all processes see the same number."""
    batch = batch_of(3)
    (fed,) = feed(iter_closing([batch]), settings(), CPU, fill=7)
    (plain,) = feed(iter_closing([batch]), settings(), CPU)
    assert len(plain.labels) == 4 and len(fed.labels) == len(fed.images) == 7
    assert torch.equal(fed.images[:4], plain.images) and torch.equal(fed.images[4:], plain.images[:3])
    weights = torch.randn(10, 192, requires_grad=True)
    losses = [
        torch.nn.functional.cross_entropy(one.images.flatten(1) @ weights.T, one.labels, reduction="sum") for one in (fed, plain)
    ]
    ours, reference = (torch.autograd.grad(loss, weights)[0] for loss in losses)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(ours, reference)


def iter_closing(batches):
    yield from batches
