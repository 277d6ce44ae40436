"""End to end: images/s of the stream alone, with decoding by loader processes and by nvJPEG, and of training that reads from it."""

import collections
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset
from kernels import seconds_of
from stepping import LR, Way, context_for, free, reporting
from stream import photograph

from dnal_dist import nets
from dnal_dist.data.device import feed
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import SGD, Augmentation, Data
from dnal_dist.training.steps import weight_step


def loader(part) -> None:
    """JPEGs of 500x375 pixels, drawn here, random crops of 224: the stream alone by number of workers, then ResNet50's training."""
    cores = len(os.sched_getaffinity(0))
    batch, distinct, samples = (4, 4, 32) if part.small else (128, 96, 4096)
    # What decides most comes first.
    usual = (("cpu", 16), ("cuda", 4), ("cpu", 8), ("cuda", 16), ("cuda", 8), ("cpu", 4), ("cpu", 12), ("cpu", 1), ("cpu", 2))
    ways = [("cpu", 1), ("cpu", 2), ("cuda", 2)] if part.small else [way for way in usual if way[1] <= cores]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), distinct, samples)
        training = _training(part, batch)
        part.report({"decode": "none: one batch that stays", **_without_data(part, batch, training)})
        for decode, count in ways:
            row = {"decode": decode, "workers": count, "batch": batch}
            if decode == "cuda" and part.device != "cuda":
                part.report({**row, "failed": "needs a GPU"})
                continue
            if part.left() < 12:
                part.report({**row, "failed": "not run: no time was left"})
                continue
            with reporting(row, part.report):
                settings = data(Path(folder), batch, count, decode)
                alone, _ = read(settings, part.device, lambda images, labels: None, 1.0 if part.small else 2.5)
                trained, waited = read(settings, part.device, training, 1.0 if part.small else 2.5)
                found = {"stream_images_per_second": alone, "training_images_per_second": trained, "data_wait": waited}
                part.report({**row, **found})
            # With its loader processes, which outlive a pass.
            free()
    del training
    free()


def _without_data(part, batch: int, training) -> dict:
    images, labels = torch.randn(batch, 3, 224, 224, device=part.device), torch.zeros(batch, dtype=torch.long, device=part.device)
    if part.device == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    rate = batch / seconds_of(lambda: training(images, labels), part.device, 2.0)
    return {"workers": 0, "batch": batch, "training_images_per_second": round(rate, 1)}


def _training(part, batch: int):
    """A function of images and labels that takes a pretrain step of ResNet50 (of a small network on a CPU)."""
    context, training = context_for(Way(precision="fp32" if part.small else "bf16"), part.device)
    context.tune(training)
    network = nets.build("mobilenetv2_imagenet", width=0.25) if part.small else nets.build("resnet50_imagenet")
    trained = context.wrap(network, SGD(lr=LR, momentum=0.9), {}, training)
    return lambda images, labels: weight_step(trained, images, labels, batch)


def make(folder: Path, distinct: int, samples: int) -> None:
    """A shard of `samples` JPEGs, `distinct` of them different, that compress as photographs do."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(distinct):
        file = io.BytesIO()
        photograph(rng).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    path = folder / "train-000000.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(samples):
            tar.write({"__key__": f"{i:06d}", "jpg": encoded[i % distinct], "cls": str(i % 10).encode()})
    index = {"shards": [{"file": path.name, "samples": samples, "bytes": path.stat().st_size}], "classes": []}
    (folder / "index.json").write_text(json.dumps(index))


def data(folder: Path, batch: int, workers: int, decode: str) -> Data:
    shards = f"'{folder}'/train-000000.tar"
    augmentation = Augmentation(kind="resized_crop", flip=True)
    rest = {"augmentation": augmentation, "global_batch": batch, "workers": workers, "decode": decode}
    return Data(train=shards, val=shards, image_size=224, resize=256, **rest)


def read(settings: Data, device: str, use, seconds: float) -> tuple[float, float]:
    """Images/s on the device, each batch given to `use`, and the fraction of the time that was spent waiting for data. The first
    batches, until the loader processes have begun, do not count."""
    stream = Stream(Shards(settings.train, "data.train", 10), settings, 0, True, pin=device == "cuda")
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    count, waited, queued = 0, 0.0, collections.deque()
    with contextlib.closing(feed(stream.batches(), settings, torch.device(device), memory_format=layout)) as batches:
        for _ in range(max(2, settings.workers)):
            fed = next(batches)
            use(fed.images, fed.labels)
        _wait(device)
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            fed = next(batches)
            use(fed.images, fed.labels)
            count, waited = count + len(fed.labels), waited + fed.waited
            if device == "cuda":
                # The host would queue far more than the device can do.
                queued.append(torch.cuda.Event())
                queued[-1].record()
                if len(queued) > 2:
                    queued.popleft().synchronize()
        _wait(device)
        spent = time.perf_counter() - begun
    return round(count / spent, 1), round(waited / spent, 3)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
