"""Fashion-MNIST and CIFAR-10 keep every pixel; incomplete and other sources are refused by name."""

import gzip
import json
import struct
from types import SimpleNamespace

import pytest
import sources
from making import assert_streams, command, new, refused
from sources import archived

from data_tools import cifar10, fashion_mnist, make_shards


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A small Fashion-MNIST in its true format, and what it holds."""
    monkeypatch.setattr(fashion_mnist, "FILES", sources.FASHION_MNIST)
    folder = tmp_path / "idx"
    return SimpleNamespace(folder=folder, truth=sources.fashion_mnist(folder))


def test_pixels_of_fashion_mnist_are_kept(fashion, tmp_path, capsys):
    out = tmp_path / "shards"
    code, said = command(capsys, "fashion_mnist", out, "--source", fashion.folder, "--shard-samples", 5)
    assert (code, said) == (0, f"{out}: 12 samples for train, 5 samples for val\n")
    for split, (images, labels) in fashion.truth.items():
        assert_streams(out, split, images, labels)
    index = json.loads((out / "index.json").read_text())
    assert [(entry["file"], entry["samples"]) for entry in index["shards"]] == [
        *((f"train-{i:06d}.tar", 4) for i in range(3)),
        ("val-000000.tar", 5),
    ]
    assert len(index["classes"]) == 10 and index["classes"][9] == "Ankle boot"


def test_fashion_mnist_is_checked_for_its_true_size():
    assert fashion_mnist.FILES == {"train": ("train", 60_000), "val": ("t10k", 10_000)}


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
def test_an_incomplete_fashion_mnist_is_refused(fashion, tmp_path, capsys, name, change, said):
    path = fashion.folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    line = refused(capsys, "fashion_mnist", tmp_path / "shards", "--source", fashion.folder)
    assert said in line and (name.partition("-")[0] in line)
    assert not (tmp_path / "shards" / "index.json").exists()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-10 in the format of its binary version: folder, archive, and what they hold."""
    monkeypatch.setattr(cifar10, "RECORDS", sources.CIFAR10_RECORDS)
    folder = tmp_path / "cifar-10-batches-bin"
    truth = sources.cifar10(folder)
    return SimpleNamespace(folder=folder, archive=archived(folder), truth=truth)


@pytest.mark.parametrize("source", ["archive", "folder", "folder above"])
def test_pixels_of_cifar10_are_kept(cifar, tmp_path, capsys, source):
    path = {"archive": cifar.archive, "folder": cifar.folder, "folder above": cifar.folder.parent}[source]
    out = tmp_path / "shards"
    code, said = command(capsys, "cifar10", path, out, "--shard-samples", 10)
    assert (code, said) == (0, f"{out}: 30 samples for train, 6 samples for val\n")
    for split, (images, labels) in cifar.truth.items():
        assert_streams(out, split, images, labels)
    assert json.loads((out / "index.json").read_text())["classes"] == sources.CIFAR10_CLASSES


def test_cifar10_is_checked_for_its_true_size():
    assert (cifar10.RECORDS, cifar10.PIXELS) == (10_000, 3072)


def test_names_in_an_archive_write_nothing_to_disk(cifar, tmp_path):
    archive = archived(cifar.folder, "../../outside/")
    before = {path for path in tmp_path.parent.rglob("*")}
    make_shards.cifar10(archive, new(tmp_path / "shards"))
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
def test_an_incomplete_cifar10_is_refused(cifar, tmp_path, capsys, name, change, said):
    path = cifar.folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    for source in (cifar.folder, archived(cifar.folder)):
        line = refused(capsys, "cifar10", source, tmp_path / "shards")
        assert said in line and str(source) in line
        assert not (tmp_path / "shards" / "index.json").exists()


def test_a_damaged_archive_is_refused(cifar, tmp_path, capsys):
    whole = cifar.archive.read_bytes()
    flipped = bytes([*whole[: len(whole) // 2], whole[len(whole) // 2] ^ 1, *whole[len(whole) // 2 + 1 :]])
    cut = gzip.compress(gzip.decompress(whole)[:40_000])
    for content in (b"", b"plain text", whole[: len(whole) // 2], whole[:-4], flipped, cut):
        cifar.archive.write_bytes(content)
        line = refused(capsys, "cifar10", cifar.archive, tmp_path / "shards")
        assert "cifar-10-binary.tar.gz" in line
    assert "no such file" in refused(capsys, "cifar10", tmp_path / "nowhere.tar.gz", tmp_path / "shards")


@pytest.mark.parametrize("source", ["archive", "folder", "folder above"])
def test_the_pickled_archive_is_refused_unread(tmp_path, capsys, source):
    """The refusal names the binary archive and its home; an instruction in the batches is not followed."""
    folder, traced = new(tmp_path / "cifar-10-batches-py"), tmp_path / "harm"
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {traced}'\ntR.".encode())
    archive = archived(folder, "cifar-10-batches-py/", "cifar-10-python.tar.gz")
    path = {"archive": archive, "folder": folder, "folder above": folder.parent}[source]
    line = refused(capsys, "cifar10", path, tmp_path / "shards")
    assert "pickled" in line and "take cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html" in line
    assert not traced.exists() and not (tmp_path / "shards").exists()
