"""The shards of the demo: complete, split the same way every time, and the same bytes every time."""

import hashlib
import json

import pytest

from data_tools import make_shards
from dnal_dist import stream


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
        assert (entry["samples"], entry["bytes"]) == (len(stream.scan(path, 10)), path.stat().st_size)
    assert index["classes"] == list("0123456789")


def test_the_splits_share_no_sample_and_every_class_is_in_both(digits):
    split = {name: [s for path in sorted(digits.glob(f"{name}-*.tar")) for s in stream.scan(path)] for name in ("train", "val")}
    keys = {name: {sample.key for sample in samples} for name, samples in split.items()}
    assert not keys["train"] & keys["val"]
    assert len(keys["train"] | keys["val"]) == 1797
    for samples in split.values():
        assert {sample.label for sample in samples} == set(range(10))


def test_shards_differ_by_one_sample_at_most(tmp_path):
    samples = [(f"{i:03d}", b"picture", "png", 0) for i in range(10)]
    entries = make_shards.write_shards(tmp_path, "train", samples, 3)
    assert [entry["samples"] for entry in entries] == [4, 3, 3]
    assert not list(tmp_path.glob("*.unfinished"))


def test_command_line_says_where_it_cannot_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["make_shards", "digits", str(tmp_path / "file" / "digits")])
    with pytest.raises(SystemExit) as stopped:
        make_shards.main()
    assert stopped.value.code == 2
    assert "file/digits" in capsys.readouterr().err
