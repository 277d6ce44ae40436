"""Jobs of test_nvjpeg: nvJPEG against the CPU's decoder, and the stream that copies."""

import contextlib
import time

import numpy as np
import torch
from jpegs import drawn, jpeg

from dnal_dist.common.errors import InputError
from dnal_dist.data import device, nvjpeg
from dnal_dist.data.decoding import ImageError, decode, read_header
from dnal_dist.data.pipeline import Batch, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import Augmentation, Data

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def decodes(context: Context, sizes: list[list[int]]) -> dict[str, dict[str, float]]:
    """Of nvJPEG's pixels against the CPU's: mean and largest absolute difference of 255, by kind of JPEG over all sizes. All
    sizes of a kind in a list; and how far that is from each JPEG alone."""
    rng, found = np.random.default_rng(0), {}
    for kind in (*SUBSAMPLINGS, "gray"):
        options = {"subsampling": SUBSAMPLINGS[kind]} if kind != "gray" else {}
        jpegs = [jpeg(drawn(rng, *size, "L" if kind == "gray" else "RGB"), **options) for size in sizes]
        assert all(nvjpeg.takes(read_header(encoded), encoded) for encoded in jpegs)
        waiting = [torch.frombuffer(bytearray(encoded), dtype=torch.uint8) for encoded in jpegs]
        together = nvjpeg.decode(waiting, context.device)
        means, largest, alone = [], 0, 0
        for encoded, own, image, size in zip(jpegs, waiting, together, sizes, strict=True):
            assert image.device.type == context.device.type and tuple(image.shape) == (3, *size), (kind, image.shape)
            alone = max(alone, int((image.int() - nvjpeg.decode([own], context.device)[0].int()).abs().max()))
            off = (image.cpu().permute(1, 2, 0).int() - torch.from_numpy(decode(encoded)).int()).abs()
            means.append(float(off.float().mean()))
            largest = max(largest, int(off.max()))
        found[kind] = {"mean": max(means), "largest": largest, "alone": alone}
    return found


def settings(folder: str, **changes) -> Data:
    paths = {"train": f"{folder}/train-*.tar", "val": f"{folder}/train-*.tar", "image_size": 32, "global_batch": 12}
    augmentation = Augmentation(kind="resized_crop", flip=True)
    return Data(**paths, augmentation=augmentation, exif=True, max_bad_fraction=0.2, **{"workers": 0} | changes)


def fed(context: Context, folder: str, number: int, where: torch.device, **changes) -> list[device.Fed]:
    data, pin = settings(folder, **changes), where.type == "cuda"
    stream = Stream(Shards(data.train, "data.train", 10), data, 0, True, pin=pin)
    with contextlib.closing(device.feed(stream.batches(), data, where)) as batches:
        return [next(batches) for _ in range(number)]


def batches(context: Context, folder: str, workers: int) -> dict:
    """Batches decoded by nvJPEG and by the CPU, with all kinds of images in them: differences in units of 1/255, by who decodes."""
    ours = fed(context, folder, 2, context.device, decode="cuda" if context.device.type == "cuda" else "cpu", workers=workers)
    plain = fed(context, folder, 2, torch.device("cpu"))
    found = {"nvjpeg": [], "cpu": [], "bad": []}
    kinds = kinds_by_key(folder)
    for one, other in zip(ours, plain, strict=True):
        assert one.batch.keys == other.batch.keys and tuple(one.batch.tally) == tuple(other.batch.tally)
        assert torch.equal(one.labels.cpu(), other.labels) and torch.equal(one.batch.flips.cpu(), other.batch.flips)
        found["bad"] += [str(fault) for fault in one.batch.bad]
        assert [str(fault) for fault in one.batch.bad] == [str(fault) for fault in other.batch.bad]
        off = (one.images.cpu() - other.images).abs().flatten(1).mul(255 * 0.225)
        for key, mean, largest in zip(one.batch.keys, off.mean(1).tolist(), off.max(1).values.tolist(), strict=True):
            found["nvjpeg" if kinds[key] else "cpu"].append([mean, largest])
    return found


def kinds_by_key(folder: str) -> dict[str, bool]:
    """Whether nvJPEG is to decode each sample."""
    shards = Shards(f"{folder}/train-*.tar", "data.train", 10)
    found = {}
    for number in range(shards.samples):
        sample, origin = shards.take(number, number)
        with contextlib.suppress(Exception):
            found[origin.key] = nvjpeg.takes(read_header(sample.image, exif=True), sample.image)
    return found


def refused(context: Context) -> dict:
    """What becomes of JPEGs whose middle is missing although they have an end: the image of the CPU, or a fault."""
    rng = np.random.default_rng(1)
    whole = jpeg(drawn(rng, 64, 64))
    [answer] = nvjpeg.decoded([torch.frombuffer(bytearray(b"\xff\xd8 no image \xff\xd9"), dtype=torch.uint8)], context.device)
    no_scan = whole[: whole.index(b"\xff\xda")] + b"\xff\xd9"
    found = {"no image": answer is None, "no scan is left to the CPU": False}
    # nvJPEG gives an image for it.
    try:
        found["no scan is left to the CPU"] = not nvjpeg.takes(read_header(no_scan), no_scan)
    except ImageError:
        found["no scan is left to the CPU"] = True
    good = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    bad = torch.frombuffer(bytearray(b"\xff\xd8 no image \xff\xd9"), dtype=torch.uint8)
    one, none, two = nvjpeg.decoded([good, bad, good], context.device)
    found["others of the list"] = none is None and torch.equal(one, two) and tuple(one.shape) == (3, 64, 64)
    try:
        nvjpeg.require(context.device)
    except InputError as error:
        found["require"] = str(error)
    return found


def overlaps(context: Context) -> dict:
    """A batch is asked for while a kernel of about a second runs: whether the host, and the copy, had to wait for it."""
    made = []

    def noted(*args, **options):
        found = usual(*args, **options)
        # Others are names of streams that there are.
        if "stream_id" not in options:
            made.append(found)
        return found

    data, layout = Data(train="none", val="none", image_size=224, global_batch=64), torch.channels_last

    def given():
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            images = torch.randint(0, 256, (64, 3, 224, 224), generator=generator, dtype=torch.uint8).pin_memory()
            labels, flips = torch.full((64,), number).pin_memory(), (torch.arange(64) % 2 == 0).pin_memory()
            yield Batch(images, labels, flips, [str(number)] * 64, [], (0, 0))

    usual, torch.cuda.Stream = torch.cuda.Stream, noted
    try:
        batches = device.feed(given(), data, context.device, memory_format=layout)
        # Memory is allocated, and kernels are loaded.
        exact = [fed.images.clone() for fed in (next(batches), next(batches))]
    finally:
        torch.cuda.Stream = usual
    torch.cuda.synchronize()
    found, ended = {"streams": len(made)}, torch.cuda.Event()
    begun = time.monotonic()
    # Cycles of a clock of 1 to 2 GHz.
    torch.cuda._sleep(2_000_000_000)
    ended.record()
    fed = next(batches)
    found["host waited"], found["kernel runs on, after the batch"] = time.monotonic() - begun, not ended.query()
    made[0].synchronize()
    found["copy waited"], found["kernel runs on, after the copy"] = time.monotonic() - begun, not ended.query()
    torch.cuda.synchronize()
    found["kernel took"] = time.monotonic() - begun
    right = device.normalise(fed.batch.images.to(context.device), data.mean, data.std, fed.batch.flips.to(context.device))
    found["images are right"], found["labels"] = bool(torch.equal(fed.images, right)), fed.labels.unique().tolist()
    found["layout"] = fed.images.is_contiguous(memory_format=layout)
    # Memory that a step gave back while it was still queued must not hold another batch.
    found["earlier batches differ"] = not torch.equal(exact[0], exact[1])
    return found


def facts(context: Context) -> dict[str, str]:
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "CPU"
    return {"device": str(context.device), "name": name, "torch": torch.__version__, "backend": context.backend}
