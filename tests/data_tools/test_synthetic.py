"""Drawn images: as large as ImageNet's, learnable, and a function of seed, split and number alone."""

import io
import json

import numpy as np
import pytest
from making import command, digests, members, new, refused, scan
from PIL import Image

from data_tools import make_shards
from data_tools.synthetic import Draw


def opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


def test_an_image_depends_only_on_seed_split_and_number(tmp_path):
    make_shards.synthetic(new(tmp_path / "few"), classes=4, train=8, val=4, size=48)
    make_shards.synthetic(new(tmp_path / "many"), classes=4, train=20, val=12, size=48, shard_samples=7)
    make_shards.synthetic(new(tmp_path / "other"), classes=4, train=8, val=4, size=48, seed=1)
    few, many, other = (members(tmp_path / name, "train") for name in ("few", "many", "other"))
    assert few == many[:8]
    assert not {encoded for _, encoded, _ in few} & {encoded for _, encoded, _ in other}
    images = {encoded for split in ("train", "val") for _, encoded, _ in members(tmp_path / "many", split)}
    assert len(images) == 32


def test_classes_are_of_equal_counts_in_every_shard(tmp_path, capsys):
    out = tmp_path / "shards"
    drawn = ["--classes", 5, "--train", 43, "--val", 10, "--size", 32, "--shard-samples", 15, "--workers", 1]
    assert command(capsys, "synthetic", out, *drawn) == (0, f"{out}: 43 samples for train, 10 samples for val\n")
    for path in out.glob("train-*.tar"):
        counts = np.bincount([sample.label for sample in scan(path)], minlength=5)
        assert counts.min() >= 2 and counts.max() - counts.min() <= 1
    assert json.loads((out / "index.json").read_text())["classes"] == [f"class {i}" for i in range(5)]


def test_sizes_are_about_those_of_imagenet():
    draw = Draw(0, "train", 10, 500)
    encoded = [draw(i, i)[1] for i in range(60)]
    sizes = [opened(one).size for one in encoded]
    assert np.median([max(size) for size in sizes]) == 500
    assert 0.5 < np.mean([size in ((500, 375), (500, 334)) for size in sizes]) < 0.9
    assert any(height > width for width, height in sizes) and len(set(sizes)) > 4
    assert 20_000 < np.mean([len(one) for one in encoded]) < 120_000


def features(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of 16x16 pixels (N, 769), with a one, and labels (N,) of 20 classes."""
    draw, found = Draw(0, split, 20, 64), []
    for i in range(count):
        _, encoded, _, label = draw(i, i)
        thumbnail = np.asarray(opened(encoded).resize((16, 16), Image.Resampling.BOX), float).ravel() / 255 - 0.5
        found.append((np.append(thumbnail, 1), label))
    return np.array([values for values, _ in found]), np.array([label for _, label in found])


def test_classes_can_be_learned():
    """By a linear model of thumbnails already; chance is 5 %."""
    (values, labels), (unseen, truth) = features("train", 600), features("val", 200)
    weights = np.linalg.solve(values.T @ values + 10 * np.eye(values.shape[1]), values.T @ np.eye(20)[labels])
    assert np.mean((unseen @ weights).argmax(1) == truth) > 0.5


def test_the_same_bytes_every_time(tmp_path):
    for name in ("one", "again"):
        make_shards.synthetic(new(tmp_path / name), classes=3, train=9, val=3, size=64)
    assert digests(tmp_path / "one") == digests(tmp_path / "again")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--size", "8"], "--size: expected 32 or more, found 8"),
        (["--classes", "50", "--train", "49"], "--train: expected 50 or more, found 49"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(tmp_path, capsys, options, said):
    assert said in refused(capsys, "synthetic", tmp_path / "shards", *options)
