"""Fashion-MNIST and CIFAR-10 come through to the pixel; a source that is not what it should be is refused by name."""

import gzip
import json
import pickle
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sources
from making import assert_streams, command, digests, new, refused
from sources import archived

from data_tools import cifar10, fashion_mnist, make_shards


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A small Fashion-MNIST in its true format, and what it holds."""
    monkeypatch.setattr(fashion_mnist, "FILES", sources.FASHION_MNIST)
    folder = tmp_path / "idx"
    return SimpleNamespace(folder=folder, truth=sources.fashion_mnist(folder))


def test_fashion_mnist_comes_through_to_the_pixel(fashion, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "fashion_mnist", out, "--source", fashion.folder, "--shard-samples", 5)
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
def test_a_fashion_mnist_that_is_not_whole_is_refused(fashion, tmp_path, monkeypatch, capsys, name, change, said):
    path = fashion.folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    line = refused(monkeypatch, capsys, "fashion_mnist", tmp_path / "shards", "--source", fashion.folder)
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
def test_cifar10_comes_through_to_the_pixel(cifar, tmp_path, monkeypatch, capsys, source):
    path = {"archive": cifar.archive, "folder": cifar.folder, "folder above": cifar.folder.parent}[source]
    out = tmp_path / "shards"
    code, said = command(monkeypatch, capsys, "cifar10", path, out, "--shard-samples", 10)
    assert (code, said) == (0, f"{out}: 30 samples for train, 6 samples for val\n")
    for split, (images, labels) in cifar.truth.items():
        assert_streams(out, split, images, labels)
    assert json.loads((out / "index.json").read_text())["classes"] == sources.CIFAR10_CLASSES


def test_cifar10_is_checked_for_its_true_size():
    assert (cifar10.RECORDS, cifar10.PIXELS) == (10_000, 3072)


def test_names_in_an_archive_reach_no_place_on_disk(cifar, tmp_path):
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


@pytest.fixture
def python_version(tmp_path, monkeypatch):
    """A small CIFAR-10 in the format of its version for Python."""
    monkeypatch.setattr(cifar10, "RECORDS", sources.CIFAR10_RECORDS)
    folder = tmp_path / "cifar-10-batches-py"
    truth = sources.cifar10(folder, "python")
    archive = archived(folder, "cifar-10-batches-py/", "cifar-10-python.tar.gz")
    return SimpleNamespace(folder=folder, archive=archive, truth=truth)


def test_the_tests_write_what_python_unpickles(python_version):
    """Else the next tests would prove nothing of the true files."""
    batch = pickle.loads((python_version.folder / "data_batch_2").read_bytes(), encoding="latin-1")
    images, labels = python_version.truth["train"]
    assert batch["labels"] == labels[6:12].tolist()
    assert np.array_equal(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), images[6:12])


@pytest.mark.parametrize("source", ["archive", "folder", "folder above"])
def test_cifar10_for_python_gives_the_same_shards(cifar, tmp_path, source):
    make_shards.cifar10(cifar.archive, new(tmp_path / "binary"))
    (tmp_path / "apart").mkdir()
    folder = tmp_path / "apart" / "cifar-10-batches-py"
    sources.cifar10(folder, "python")
    archive = archived(folder, "cifar-10-batches-py/", "cifar-10-python.tar.gz")
    path = {"archive": archive, "folder": folder, "folder above": folder.parent}[source]
    make_shards.cifar10(path, new(tmp_path / "python"))
    assert digests(tmp_path / "python") == digests(tmp_path / "binary")


HARMFUL = {
    "a call": b"cposix\nsystem\n(S'touch {path}'\ntR.",
    "a call, otherwise": b"(S'touch {path}'\niposix\nsystem\n.",
    "a call by protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch {path}\x85R.",
    "a function of NumPy": b"\x80\x02cnumpy\nfromfile\nU\x04NAME\x85R.",
    "objects in an array": sources.as_python_2_writes({"data": np.zeros((2, 3), np.uint8)}).replace(b"U\x02u1", b"U\x02O8"),
    "the type of an array called": b"\x80\x02cnumpy\nndarray\nK\x02\x85R.",
    "no dictionary": b"\x80\x02]q\x01.",
    "an attribute of what is built": b"\x80\x02}(U\x01aU\x01bu}b.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent object": b"\x80\x02U\x01aQ.",
    "nothing on the stack": b"\x80\x02\x87.",
    "no mark": b"\x80\x02K\x01K\x02t.",
    "no end": b"\x80\x02}q\x01",
    "nothing": b"",
    # To Python's own dictionaries the next two are the end of the process.
    "a nested key": b"\x80\x02}K\x01" + b"\x85" * 900_000 + b"K\x01s.",
    "a nested value": b"\x80\x02}U\x01aK\x01" + b"\x85" * 4 + b"s.",
    "a key that is no text": b"\x80\x02}K\x01K\x02s.",
    "an array of an impossible shape": sources.as_python_2_writes({"data": np.zeros((2, 3), np.uint8)}).replace(
        b"K\x02K\x03\x86", b"\x8a\x0c" + b"\xff" * 11 + b"\x01\x85"
    ),
}


@pytest.mark.parametrize("content", HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_batch_is_refused_and_runs_nothing(python_version, tmp_path, monkeypatch, capsys, content):
    traced = tmp_path / "harm"
    (python_version.folder / "data_batch_3").write_bytes(content.replace(b"{path}", str(traced).encode()))
    imported = set(sys.modules)
    line = refused(monkeypatch, capsys, "cifar10", python_version.folder, tmp_path / "shards")
    assert "data_batch_3: not a batch of CIFAR-10" in line and "take cifar-10-binary.tar.gz or" in line
    assert not traced.exists() and set(sys.modules) == imported


def test_a_batch_for_python_of_other_content_is_refused(python_version, tmp_path, monkeypatch, capsys):
    path, ones = python_version.folder / "test_batch", np.ones((6, 3072), np.uint8)
    for batch, said in (
        ({"data": ones[:5], "labels": [1] * 5}, "holds images as (5, 3072), expected an array (6, 3072)"),
        ({"data": "text", "labels": [1] * 6}, "holds images as str"),
        ({"data": ones, "labels": [1] * 5}, "holds no 6 labels"),
        ({"data": ones, "labels": [10] * 6}, "a label of 10"),
        ({"data": ones, "fine_labels": [1] * 6}, "holds no 6 labels"),
    ):
        path.write_bytes(sources.as_python_2_writes(batch))
        assert said in refused(monkeypatch, capsys, "cifar10", python_version.folder, tmp_path / "shards")
