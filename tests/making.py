"""What the tests of data_tools share: its commands, and what shards hold."""

import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from drawing import draw
from in_process import called

from data_tools import make_shards, writing
from data_tools.record import Record
from data_tools.writing import Split
from dnal_dist.data import pipeline
from dnal_dist.data.samples import Sample, parse
from dnal_dist.data.shards import Shards
from dnal_dist.data.tar import boundaries
from dnal_dist.recipe import Data


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def scan(path) -> list[Sample]:
    content = path.read_bytes()
    offsets, faults = boundaries(io.BytesIO(content))
    assert not faults
    return [parse(content[begin:end]) for begin, end in itertools.pairwise(offsets)]


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def command(capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was said of `python -m data_tools.make_shards` with these arguments, in this process: each process of
    its own imports torch, since webdataset does."""
    alone = () if arguments[0] == "digits" or "--workers" in arguments else ("--workers", 1)
    capsys.readouterr()  # of calls before
    code, out, err = called(make_shards.main, capsys, *arguments, *alone)
    return code, out + err if code else out


def refused(capsys, *arguments) -> str:
    """The one line that the command is refused with."""
    code, said = command(capsys, *arguments)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def streamed(folder, split: str, size: int, classes: int = 10) -> dict[str, tuple[torch.Tensor, int]]:
    """Image and label of every key of `split`, as a run's validation gets them."""
    data = Data(train="-", val="-", image_size=size, global_batch=4, workers=0)
    shards = Shards(f"{folder}/{split}-*.tar", f"data.{split}", classes)
    found = {}
    for batch in pipeline.Stream(shards, data, 0, False).batches():
        assert not batch.bad
        found |= {key: (image, int(label)) for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True)}
    return found


def assert_streams(folder, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """The shards hold exactly these images (N, height, width, 3) with these labels, in this order of keys."""
    found = [value for _, value in sorted(streamed(folder, split, images.shape[1]).items())]
    assert [label for _, label in found] == labels.tolist()
    assert torch.equal(torch.stack([image for image, _ in found]), torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def members(folder, split: str) -> list[tuple[str, bytes, int]]:
    """Extension, bytes and label of every sample, in the order of the shards."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        found += [(sample.extension, sample.image, sample.label) for sample in scan(path)]
    return found


def skipped(folder) -> dict[str, str]:
    """The reason why each image was left out, by its file's name."""
    found = json.loads((folder / "skipped.json").read_text())["skipped"]
    return {entry["picture"].rpartition(": ")[2].rpartition("/")[2]: entry["reason"] for entry in found}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def splits(count: int = 10, shards: int = 3, draw=draw) -> dict[str, Split]:
    return {"train": Split([f"t{i}" for i in range(count)], draw, shards), "val": Split(["v0", "v1"], draw, 1)}


def made(folder, count=10, shards=3, draw=draw, options=None, overwrite=False, **how):
    record = Record(folder, {"kind": "test", **(options or {})}, overwrite)
    return writing.write(record, splits(count, shards, draw), ["a", "b", "c"], **how)
