"""Shards hold what their source holds, the same way every time; a source that is not what it should be is refused by name."""

import gzip
import hashlib
import io
import itertools
import json
import random
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import sources
import torch
from PIL import Image
from sources import archived

from data_tools import make_shards
from dnal_dist import shards, stream
from dnal_dist.recipe import Data
from dnal_dist.shards import Sample, Shards, boundaries, parse


def scan(path) -> list[Sample]:
    content = path.read_bytes()
    offsets, faults = boundaries(io.BytesIO(content))
    assert not faults
    return [parse(content[begin:end]) for begin, end in itertools.pairwise(offsets)]


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_bytes_every_time(digits, tmp_path):
    assert make_shards.digits(_made(tmp_path / "again")) == {"train": 1442, "val": 355}
    assert digests(tmp_path / "again") == digests(digits)


def _made(folder):
    folder.mkdir()
    return folder


def test_the_index_tells_what_the_shards_hold(digits):
    index = json.loads((digits / "index.json").read_text())
    assert [entry["file"] for entry in index["shards"]] == sorted(path.name for path in digits.glob("*.tar"))
    for entry in index["shards"]:
        path = digits / entry["file"]
        assert (entry["samples"], entry["bytes"]) == (len(scan(path)), path.stat().st_size)
    assert index["classes"] == list("0123456789")


def test_the_splits_share_no_sample_and_every_class_is_in_both(digits):
    split = {name: [s for path in sorted(digits.glob(f"{name}-*.tar")) for s in scan(path)] for name in ("train", "val")}
    keys = {name: {sample.key for sample in samples} for name, samples in split.items()}
    assert not keys["train"] & keys["val"]
    assert len(keys["train"] | keys["val"]) == 1797
    for samples in split.values():
        assert {sample.label for sample in samples} == set(range(10))


def test_shards_differ_by_one_sample_at_most(tmp_path):
    samples = ((f"{i:03d}", b"picture", "png", 0) for i in range(10))
    entries = make_shards.write_shards(tmp_path, "train", samples, 10, 3)
    assert [entry["samples"] for entry in entries] == [4, 3, 3]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_picture_is_made_no_earlier_than_it_is_written(tmp_path):
    """So that a set larger than memory can be written: when sample 6 is made, the shards before it are complete."""
    complete = []

    def samples():
        for i in range(9):
            complete.append(len(list(tmp_path.glob("*.tar"))))
            yield f"{i:03d}", b"picture", "png", 0

    make_shards.write_shards(tmp_path, "train", samples(), 9, 3)
    assert complete == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_shards_of_an_earlier_making_are_not_left_among_new_ones(tmp_path):
    (tmp_path / "val-000002.tar").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"val-000002.tar: .* remove it"):
        make_shards.digits(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val-000002.tar"]


def test_makers_and_stream_agree_on_pictures():
    assert make_shards.PICTURES == shards.PICTURES


def test_command_line_says_where_it_cannot_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["make_shards", "digits", str(tmp_path / "file" / "digits")])
    with pytest.raises(SystemExit) as stopped:
        make_shards.main()
    assert stopped.value.code == 2
    assert "file/digits" in capsys.readouterr().err


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was said of `python -m data_tools.make_shards` with these arguments."""
    monkeypatch.setattr("sys.argv", ["make_shards", *map(str, arguments)])
    try:
        make_shards.main()
    except SystemExit as ended:
        said = capsys.readouterr()
        return ended.code, said.out + said.err
    return 0, capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line that the command is refused with."""
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def streamed(folder, split: str, size: int, classes: int = 10) -> dict[str, tuple[torch.Tensor, int]]:
    """Picture and label of every key of `split`, as a run's validation gets them."""
    data = Data(train="-", val="-", image_size=size, global_batch=4, workers=0)
    shards = Shards(f"{folder}/{split}-*.tar", f"data.{split}", classes)
    found = {}
    for batch in stream.Stream(shards, data, 0, False).batches():
        assert not batch.bad
        found |= {key: (image, int(label)) for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True)}
    return found


def assert_streams(folder, split: str, pictures: np.ndarray, labels: np.ndarray) -> None:
    """The shards hold exactly these pictures (N, height, width, 3) with these labels, in this order of keys."""
    found = [value for _, value in sorted(streamed(folder, split, pictures.shape[1]).items())]
    assert [label for _, label in found] == labels.tolist()
    assert torch.equal(torch.stack([image for image, _ in found]), torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A small Fashion-MNIST in its true format, and what it holds."""
    monkeypatch.setattr(make_shards, "FASHION_MNIST", sources.FASHION_MNIST)
    folder = tmp_path / "idx"
    return SimpleNamespace(folder=folder, truth=sources.fashion_mnist(folder))


def test_fashion_mnist_comes_through_to_the_pixel(fashion, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "fashion_mnist", out, "--source", fashion.folder, "--shard-samples", 5)
    assert (code, said) == (0, f"{out}: 12 samples for train, 5 samples for val\n")
    for split, (pictures, labels) in fashion.truth.items():
        assert_streams(out, split, pictures, labels)
    index = json.loads((out / "index.json").read_text())
    assert [(entry["file"], entry["samples"]) for entry in index["shards"]] == [
        *((f"train-{i:06d}.tar", 4) for i in range(3)),
        ("val-000000.tar", 5),
    ]
    assert len(index["classes"]) == 10 and index["classes"][9] == "Ankle boot"


def test_fashion_mnist_is_checked_for_its_true_size():
    assert make_shards.FASHION_MNIST == {"train": ("train", 60_000), "val": ("t10k", 10_000)}


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("train-images-idx3-ubyte.gz", None, "no such file"),
        ("train-images-idx3-ubyte.gz", lambda b: b[: len(b) // 2], "not a whole gzip file"),
        ("train-images-idx3-ubyte.gz", lambda b: b"plain text", "not a whole gzip file"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1]), "holds less than 12 x 28 x 28 bytes"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b) + b"1"), "holds more than 12 x 28 x 28 bytes"),
        ("train-labels-idx1-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1] + b"\x0a"), "a label of 10"),
        ("t10k-labels-idx1-ubyte", lambda b: b"\0\0\x0b\1" + b[4:], "begins with 00 00 0b 01"),
        ("t10k-images-idx3-ubyte", lambda b: b[:8] + struct.pack(">I", 32) + b[12:], "expected the idx header of 5 x 28 x 28"),
        ("t10k-images-idx3-ubyte", lambda b: b"", "begins with , expected"),
    ],
)
def test_a_fashion_mnist_that_is_not_whole_is_refused(fashion, tmp_path, monkeypatch, capsys, name, change, said):
    path = fashion.folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    line = refused(monkeypatch, capsys, "fashion_mnist", tmp_path / "shards", "--source", fashion.folder)
    assert said in line and (name.partition("-")[0] in line)
    assert not (tmp_path / "shards" / "index.json").exists()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-10 in the format of its binary version: folder, archive, and what they hold."""
    monkeypatch.setattr(make_shards, "CIFAR10_RECORDS", sources.CIFAR10_RECORDS)
    folder = tmp_path / "cifar-10-batches-bin"
    truth = sources.cifar10(folder)
    return SimpleNamespace(folder=folder, archive=archived(folder), truth=truth)


@pytest.mark.parametrize("source", ["archive", "folder", "folder above"])
def test_cifar10_comes_through_to_the_pixel(cifar, tmp_path, monkeypatch, capsys, source):
    path = {"archive": cifar.archive, "folder": cifar.folder, "folder above": cifar.folder.parent}[source]
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "cifar10", path, out, "--shard-samples", 10)
    assert (code, said) == (0, f"{out}: 30 samples for train, 6 samples for val\n")
    for split, (pictures, labels) in cifar.truth.items():
        assert_streams(out, split, pictures, labels)
    assert json.loads((out / "index.json").read_text())["classes"] == sources.CIFAR10_CLASSES


def test_cifar10_is_checked_for_its_true_size():
    assert (make_shards.CIFAR10_RECORDS, make_shards.CIFAR10_RECORD_BYTES) == (10_000, 3073)


def test_names_in_an_archive_reach_no_place_on_disk(cifar, tmp_path):
    archive = archived(cifar.folder, "../../outside/")
    before = {path for path in tmp_path.parent.rglob("*")}
    make_shards.cifar10(archive, _made(tmp_path / "shards"))
    assert_streams(tmp_path / "shards", "val", *cifar.truth["val"])
    assert all(
        tmp_path / "shards" in path.parents or path == tmp_path / "shards" for path in set(tmp_path.parent.rglob("*")) - before
    )


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("data_batch_3.bin", None, "holds no data_batch_3.bin"),
        ("batches.meta.txt", lambda b: b"one\ntwo\n", "names 2 classes"),
        ("data_batch_5.bin", lambda b: b[:-1], "data_batch_5.bin holds less than 6 records of 3073 bytes"),
        ("test_batch.bin", lambda b: b + b"0", "test_batch.bin holds more than 6 records"),
        # CIFAR-100's records are one byte longer, and so their first bytes are no labels.
        ("data_batch_1.bin", lambda b: b"\x63" + b[1:], "data_batch_1.bin holds a label of 99"),
    ],
)
def test_a_cifar10_that_is_not_whole_is_refused(cifar, tmp_path, monkeypatch, capsys, name, change, said):
    path = cifar.folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    for source in (cifar.folder, archived(cifar.folder)):
        line = refused(monkeypatch, capsys, "cifar10", source, tmp_path / "shards")
        assert said in line and str(source) in line
        assert not (tmp_path / "shards" / "index.json").exists()


def test_a_damaged_archive_is_refused(cifar, tmp_path, monkeypatch, capsys):
    whole = cifar.archive.read_bytes()
    flipped = bytes([*whole[: len(whole) // 2], whole[len(whole) // 2] ^ 1, *whole[len(whole) // 2 + 1 :]])
    cut = gzip.compress(gzip.decompress(whole)[:40_000])
    for content in (b"", b"plain text", whole[: len(whole) // 2], whole[:-4], flipped, cut):
        cifar.archive.write_bytes(content)
        line = refused(monkeypatch, capsys, "cifar10", cifar.archive, tmp_path / "shards")
        assert "cifar-10-binary.tar.gz" in line
    assert "no such file" in refused(monkeypatch, capsys, "cifar10", tmp_path / "nowhere.tar.gz", tmp_path / "shards")


def test_cifar10_for_python_is_refused_with_the_archive_to_take(tmp_path, monkeypatch, capsys):
    folder = _made(tmp_path / "cifar-10-batches-py")
    for name in ("batches.meta", "data_batch_1", "test_batch"):
        (folder / name).write_bytes(b"\x80\x02}q\x01.")
    for source in (folder, tmp_path, archived(folder, "cifar-10-batches-py/")):
        line = refused(monkeypatch, capsys, "cifar10", source, tmp_path / "shards")
        assert "version for Python" in line and 'take the "binary version"' in line


@pytest.fixture
def pictures(tmp_path):
    """Folders of pictures with extensions as they occur, and beside them what is no picture."""
    random.seed(0)
    for split, count in (("train", 7), ("val", 2)):
        for c, name in enumerate(("n01440764", "n01443537", "z.last")):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for i in range(count):
                extension = ("JPEG", "jpg", "png")[i % 3]
                image = Image.new("RGB", (random.randint(8, 20), random.randint(8, 20)), (c, i, 255))
                image.save(tmp_path / "in" / split / name / f"{name}_{i}.{extension}", "PNG" if extension == "png" else "JPEG")
    inner = tmp_path / "in" / "train" / "n01440764" / "images"
    inner.mkdir()
    Image.new("RGB", (9, 9)).save(inner / "grey.v2.JPEG", "JPEG")
    (inner / "._grey.JPEG").write_bytes(b"of a Mac")
    (inner / "boxes.txt").write_text("no picture")
    (tmp_path / "in" / "train" / ".hidden").mkdir()
    (inner.parent / ".thumbnails").mkdir()
    (inner.parent / ".thumbnails" / "grey.JPEG").write_bytes(b"no picture of the set")
    return tmp_path / "in"


def members(folder, split: str) -> list[tuple[str, bytes, int]]:
    """Extension, bytes and label of every sample, in the order of the shards."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        found += [(sample.extension, sample.picture, sample.label) for sample in scan(path)]
    return found


def test_pictures_of_folders_come_through_byte_for_byte(pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "folder", pictures, out, "--shard-samples", 8)
    assert (code, said) == (0, f"{out}: 22 samples for train, 6 samples for val\n")
    for split in ("train", "val"):
        expected = [
            (
                path.suffix[1:].lower(),
                path.read_bytes(),
                ("n01440764", "n01443537", "z.last").index(path.relative_to(pictures).parts[1]),
            )
            for path in (pictures / split).rglob("*.*")
            if path.suffix in (".JPEG", ".jpg", ".png") and not {".thumbnails", "._grey.JPEG"} & {*path.parts}
        ]
        assert sorted(members(out, split)) == sorted(expected)
    assert len(streamed(out, "train", 8, 3)) == 22
    assert [path.name for path in sorted(out.glob("train-*"))] == [f"train-{i:06d}.tar" for i in range(3)]
    assert json.loads((out / "index.json").read_text())["classes"] == ["n01440764", "n01443537", "z.last"]


def test_pictures_such_as_imagenet_has_decode(tmp_path):
    """Grey ones, CMYK ones and a PNG that is called JPEG."""
    sources.imagenet(tmp_path / "in", 4)
    make_shards.image_folder(tmp_path / "in", _made(tmp_path / "shards"))
    assert len(streamed(tmp_path / "shards", "train", 32, 4)) == 8


def test_the_seed_orders_training_pictures_and_nothing_else(pictures, tmp_path):
    folders = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        folders[name] = _made(tmp_path / name)
        make_shards.image_folder(pictures, folders[name], seed=seed)
    assert digests(folders["a"]) == digests(folders["again"])
    assert members(folders["a"], "val") == members(folders["b"], "val")
    assert members(folders["a"], "train") != members(folders["b"], "train")
    assert sorted(members(folders["a"], "train")) == sorted(members(folders["b"], "train"))
    labels = [label for *_, label in members(folders["a"], "train")]
    assert labels != sorted(labels)


def test_folders_that_do_not_fit_are_refused(pictures, tmp_path, monkeypatch, capsys):
    def line(source=pictures):
        return refused(monkeypatch, capsys, "folder", source, tmp_path / "shards")

    assert "nowhere/train: no such folder" in line(tmp_path / "nowhere")
    (pictures / "val" / "other").mkdir()
    assert "val/other: no such class among the 3" in line()
    (pictures / "val" / "other").rmdir()
    (pictures / "train" / "empty").mkdir()
    assert "train/empty: no picture (png, jpg, jpeg)" in line()
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        (flat / split / "one.jpg").write_bytes(b"picture")
    assert "flat/train: holds no folders" in line(flat)


def test_a_shard_holds_at_least_one_sample(pictures, tmp_path, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "folder", pictures, tmp_path / "shards", "--shard-samples", "0")
    assert code == 2 and "expected a whole number above 0, found '0'" in said


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shards, "digits", interrupted)
    code, said = command(monkeypatch, capsys, "digits", tmp_path)
    assert code == 130 and said == f"\nstopped before all shards were made; the same command makes {tmp_path} anew\n"
