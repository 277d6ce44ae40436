"""Shards hold the samples of their source, the same bytes every time, however often the command was stopped."""

import hashlib
import io
import itertools
import json
import tarfile

import pytest
from drawing import die, draw, fail
from making import command, digests, made, new, refused, scan

from data_tools import make_shards
from data_tools.record import Record
from dnal_dist.data.samples import SampleFormat, parse
from dnal_dist.data.tar import boundaries


def test_the_same_bytes_every_time(digits, tmp_path):
    assert make_shards.digits(new(tmp_path / "again")) == {"train": 1442, "val": 355}
    assert digests(tmp_path / "again") == digests(digits)


def test_the_index_holds_samples_and_bytes_of_each_shard(digits):
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
    for found in split.values():
        assert {sample.label for sample in found} == set(range(10))


def test_shards_differ_by_one_sample_at_most(tmp_path):
    assert made(tmp_path) == {"train": 10, "val": 2}
    assert [len(scan(tmp_path / f"train-{i:06d}.tar")) for i in range(3)] == [4, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        *(f"train-{i:06d}.tar" for i in range(3)),
        "val-000000.tar",
    ]


def test_the_index_holds_the_offset_of_each_sample(tmp_path):
    made(tmp_path)
    text = (tmp_path / "index.json").read_text()
    index = json.loads(text)
    assert (index["version"], index["classes"]) == (1, ["a", "b", "c"])
    # A line for each shard, so that its reader need not be clever to be quick.
    assert [line for line in text.splitlines() if line.startswith('{"file"')] == text.splitlines()[3:-1]
    number = {"train": 0, "val": 0}
    for entry in index["shards"]:
        content, split = (tmp_path / entry["file"]).read_bytes(), entry["file"].partition("-")[0]
        assert entry["bytes"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert len(entry["offsets"]) == entry["samples"] + 1 and entry["offsets"][0] == 0
        for begin, end in itertools.pairwise(entry["offsets"]):
            sample = parse(content[begin:end], SampleFormat(3))
            assert (sample.key, sample.label) == (f"{number[split]:03d}", number[split] % 3)
            assert sample.image == f"image of {split[0]}{number[split]}".encode()
            number[split] += 1
        assert content[entry["offsets"][-1] :].count(0) == len(content) - entry["offsets"][-1]
        assert boundaries(io.BytesIO(content)) == (entry["offsets"], [])
    assert number == {"train": 10, "val": 2}


def test_the_bytes_of_a_shard_are_those_of_a_plain_ustar_archive(tmp_path):
    """Made here by tarfile: no release of webdataset may change the digests of shards that exist already."""
    made(tmp_path, count=4, shards=1)
    with tarfile.open(tmp_path / "by_hand.tar", mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(4):
            key, image, extension, label = draw(i, f"t{i}")
            for suffix, content in sorted([(extension, image), ("cls", str(label).encode())]):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mtime, member.mode, member.uname, member.gname = len(content), 0, 0o444, "bigdata", "bigdata"
                tar.addfile(member, io.BytesIO(content))
    content = (tmp_path / "train-000000.tar").read_bytes()
    assert (tmp_path / "by_hand.tar").read_bytes() == content
    assert hashlib.sha256(content).hexdigest() == "dcd0dff29ded1fcad0cf8488bfd4bec5673c37abbf7a60b96ef80b38418b6984"


def test_workers_change_no_byte(tmp_path):
    made(new(tmp_path / "one"), count=40, shards=7)
    made(new(tmp_path / "three"), count=40, shards=7, workers=3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_is_raised_in_the_main_process(tmp_path, workers):
    with pytest.raises(ValueError, match="t7: cannot be drawn"):
        made(tmp_path, draw=fail, workers=workers)
    assert not list(tmp_path.glob("*.unfinished")) and not (tmp_path / "index.json").exists()


def test_a_killed_worker_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"a worker process was killed, .* lower --workers"):
        made(tmp_path, draw=die, workers=2)


def test_a_full_disk_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    record = Record(new(tmp_path / "record"), {"kind": "test"})
    record.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*making\.jsonl"):
        record.begin()
    for name in ("train-000000.tar", "index.json", "skipped.json"):
        folder = new(tmp_path / name)
        (folder / (name if name == "skipped.json" else f"{name}.unfinished")).symlink_to("/dev/full")
        with pytest.raises(OSError, match=rf"No space left on device: .*{name}'$"):
            made(folder, skipped=[{"picture": "a", "reason": "b"}])

    def full(folder, overwrite):
        raise OSError(28, "No space left on device", str(folder / "making.jsonl"))

    monkeypatch.setattr(make_shards, "digits", full)
    line = refused(capsys, "digits", tmp_path / "shards", "--overwrite")
    assert line.endswith("making.jsonl'; free some space, the same command without --overwrite then continues\n")


def test_a_mistyped_source_leaves_no_folder_behind(tmp_path, capsys):
    refused(capsys, "folder", tmp_path / "nowhere", tmp_path / "new" / "shards")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file: a file, expected the folder where" in refused(capsys, "digits", tmp_path / "file")


@pytest.mark.parametrize("kind", make_shards.MORE)
def test_the_help_of_a_kind_is_for_its_users(kind, capsys):
    code, said = command(capsys, kind, "--help")
    assert code == 0 and " ".join(make_shards.MORE[kind].split())[:40] in " ".join(said.split())
    assert "Returns" not in said and "write_images" not in said


def test_older_shards_are_not_left_among_new_ones(tmp_path):
    (tmp_path / "val-000002.tar").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"val-000002.tar: .* remove it"):
        make_shards.digits(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val-000002.tar"]


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--shard-samples", "0", "expected a whole number of 1 or more, found '0'"),
        ("--workers", "-1", "expected a whole number of 1 or more, found '-1'"),
        ("--resize", "large", "expected a whole number of 1 or more, found 'large'"),
        ("--quality", "96", "expected a whole number from 1 to 95, found '96'"),
        ("--seed", "-1", "expected a whole number of 0 or more, found '-1'"),
        ("--max-bad", "5%", "expected a fraction from 0 to 1, found '5%'"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, capsys, option, value, said):
    code, line = command(capsys, "folder", tmp_path, tmp_path / "shards", f"{option}={value}")
    assert code == 2 and said in line


def test_help_names_every_kind(capsys):
    code, said = command(capsys, "--help")
    assert code == 0
    for kind in ("digits", "fashion_mnist", "cifar10", "imagenet", "folder", "synthetic"):
        assert f"python -m data_tools.make_shards {kind} " in said and f"\n    {kind}" in said
