"""Images a second on one core: stock webdataset with Pillow and torchvision, torchvision's ImageFolder, and dnal_dist's stream.

python benchmarks/stream.py --markdown

JPEGs that compress as photographs do are made in a temporary folder, 500x375 pixels and with a shorter side of 256, as shards and
as an ImageFolder. All contenders then take turns, round after round, in one process on one core without loader processes. Times are
processor time, which other work on the machine changes least; a ratio is the median over the rounds of the ratios within a round.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dnal_dist.data import images
from dnal_dist.data.device import feed
from dnal_dist.data.pipeline import Batches, Stream
from dnal_dist.data.shards import Shards
from dnal_dist.recipe import Augmentation, Data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {"500x375": (375, 500), "shorter side 256": (256, 341)}
STOCK = "webdataset + Pillow + torchvision v2, float"
OURS, ALONE, NORMALISED = "dnal_dist's stream, uint8", "dnal_dist, decode and augment alone", "dnal_dist's stream, then normalised"
BATCH = 64


def photograph(rng: np.random.Generator) -> Image.Image:
    """500x375 pixels with the spectrum of photographs: amplitudes fall with the frequency, and channels go together."""
    height, width = CASES["500x375"]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    shape = (3, *frequency.shape)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * frequency**-1.5
    brightness, *colours = np.fft.irfft2(spectrum, (height, width))
    channels = np.stack([brightness, *(brightness + 0.4 * colour for colour in colours)], axis=-1)
    return Image.fromarray(np.clip(channels / channels.std() * 55 + 120, 0, 255).astype(np.uint8))


def make(folder: Path, count: int, classes: int = 10) -> None:
    """`count` images of each case, as FOLDER/CASE/train-000000.tar and as FOLDER/CASE/folder/CLASS/*.jpg."""
    rng = np.random.default_rng(0)
    originals = [photograph(rng) for _ in range(count)]
    for case, (height, width) in CASES.items():
        path = folder / case / "train-000000.tar"
        path.parent.mkdir(parents=True)
        with webdataset.TarWriter(str(path)) as tar:
            for i, original in enumerate(originals):
                encoded = io.BytesIO()
                original.resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
                tar.write({"__key__": f"{i:06d}", "jpg": encoded.getvalue(), "cls": str(i % classes).encode()})
                own = folder / case / "folder" / f"{i % classes:02d}"
                own.mkdir(parents=True, exist_ok=True)
                (own / f"{i:06d}.jpg").write_bytes(encoded.getvalue())
        index = {"shards": [{"file": path.name, "samples": count, "bytes": path.stat().st_size}], "classes": []}
        (path.parent / "index.json").write_text(json.dumps(index))


def torchvision_transform(train: bool, on_tensors: bool = True) -> v2.Compose:
    geometry = (
        [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()] if train else [v2.Resize(256), v2.CenterCrop(224)]
    )
    geometry = [v2.ToImage(), *geometry] if on_tensors else [*geometry, v2.ToImage()]
    return v2.Compose([*geometry, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def encoded(shard: Path) -> Iterator[bytes]:
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                yield tar.extractfile(member).read()


def stock(shard: Path, train: bool, on_tensors: bool = True) -> Iterator:
    source = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    return iter(source.map_tuple(torchvision_transform(train, on_tensors), int).batched(BATCH))


def contenders(folder: Path) -> dict[str, Callable[[], int]]:
    """Each a function that passes once over the images in `folder` and returns their number."""
    shard = folder / "train-000000.tar"
    held, settings = list(encoded(shard)), data(folder)
    tree = ImageFolder(folder / "folder", torchvision_transform(train=True))
    ours = {train: Stream(Shards(settings.train, "data.train", 10), settings, 0, train) for train in (True, False)}
    transform, steps = images.Transform(settings, 0, train=True), len(held) // BATCH

    def pillow(encoded_image: bytes) -> None:
        with Image.open(io.BytesIO(encoded_image)) as image:
            image.convert("RGB")

    batches = Batches(settings.image_size, train=True, on_device=False)

    def alone() -> int:
        for first in range(0, len(held), BATCH):
            images = [transform(encoded_image, 0, first + i)[0] for i, encoded_image in enumerate(held[first : first + BATCH])]
            batches.stacked(images)
        return len(held)

    def epoch() -> Iterator:
        batches = ours[True].batches()
        return (next(batches) for _ in range(steps))

    def fed() -> int:
        batches = feed(ours[True].batches(), settings, torch.device("cpu"))
        return sum(len(next(batches).labels) for _ in range(steps))

    return {
        "tar, read alone": lambda: sum(1 for _ in encoded(shard)),
        "Pillow, decode alone": lambda: sum(pillow(encoded_image) is None for encoded_image in held),
        "dnal_dist, decode alone": lambda: sum(images.decode(encoded_image) is not None for encoded_image in held),
        STOCK: lambda: sum(len(labels) for _, labels in stock(shard, True)),
        f"{STOCK}, crop by Pillow": lambda: sum(len(labels) for _, labels in stock(shard, True, on_tensors=False)),
        "torchvision ImageFolder, float": lambda: sum(len(labels) for _, labels in DataLoader(tree, BATCH, shuffle=True)),
        ALONE: alone,
        OURS: lambda: sum(len(batch.labels) for batch in epoch()),
        NORMALISED: fed,
        "webdataset, validation": lambda: sum(len(labels) for _, labels in stock(shard, False, on_tensors=False)),
        "dnal_dist's stream, validation": lambda: sum(len(batch.labels) for batch in ours[False].batches()),
    }


def data(folder: Path) -> Data:
    shards = f"'{folder}'/train-000000.tar"
    augmentation = Augmentation(kind="resized_crop", flip=True)
    return Data(train=shards, val=shards, image_size=224, resize=256, augmentation=augmentation, global_batch=BATCH, workers=0)


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Images a second of processor time, of each contender in each case, one value a round."""
    runs = {(case, name): run for case in CASES for name, run in contenders(folder / case).items()}
    found: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    for turn in range(rounds + 1):
        for (case, name), run in runs.items():
            begun = time.process_time()
            count = run()
            if turn:  # the first warms up
                found[case].setdefault(name, []).append(count / (time.process_time() - begun))
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Rows of text. Ratios of small images are to the stock loader on small shards, and to it on the originals."""
    rows = [["", *(f"{case}, images/s" for case in CASES), *(f"{case}, ratio" for case in CASES), "small to original's stock"]]
    original, small = (found[case] for case in CASES)
    for name in original:
        base = "webdataset, validation" if name.endswith("validation") else STOCK
        pairs = ((original[name], original[base]), (small[name], small[base]), (small[name], original[base]))
        speeds = [f"{median(v[name]):.0f} ({min(v[name]):.0f} to {max(v[name]):.0f})" for v in (original, small)]
        rows.append([name, *speeds, *(f"{ratio(*pair):.2f}" for pair in pairs)])
    return rows


def ratio(ones: list[float], others: list[float]) -> float:
    return median(one / other for one, other in zip(ones, others, strict=True))


def show(rows: list[list[str]], markdown: bool) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        line = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(line) + " |" if markdown else "  ".join(line).rstrip())
        if markdown and not i:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help=f"of each size, a multiple of {BATCH} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each contender over the images (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if args.rounds < 1 or args.images < BATCH or args.images % BATCH:
        parser.error(f"expected at least one round, and images in a multiple of {BATCH}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="webdataset")
    with tempfile.TemporaryDirectory() as folder:
        print("making images", file=sys.stderr)
        make(Path(folder), args.images)
        bytes_each = [(Path(folder) / case / "train-000000.tar").stat().st_size / args.images / 1e3 for case in CASES]
        found = measure(Path(folder), args.rounds)
    show(table(found), args.markdown)
    print()
    for (case, speeds), kilobytes in zip(found.items(), bytes_each, strict=True):
        overhead = ratio(speeds[ALONE], speeds[OURS]) - 1
        print(f"{case}: {kilobytes:.0f} kB of shard an image; the stream takes {overhead:.1%} longer than decode and augment alone")


if __name__ == "__main__":
    main()
