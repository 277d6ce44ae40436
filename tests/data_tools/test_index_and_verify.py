"""index.json of shards made elsewhere is what make_shards would have written; verify finds what is wrong, and nothing else."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from servers import FileServer

from data_tools import index, make_shards, verify
from data_tools.images import png
from dnal_dist.data.shards import Shards


def ended(module, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m data_tools.index` or `.verify` with these arguments, by one worker
    unless they say otherwise: processes start more slowly than these shards are read."""
    arguments = (*arguments, *(() if "--workers" in arguments else ("--workers", 1)))
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    code = 0
    try:
        module.main()
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.out, said.err


def image(number: int, extension: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number % 3, 8, 3), np.uint8)
    if extension == "png":
        return png(pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, number: int, label: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", image(number, "jpg"))]


@pytest.fixture
def own(tmp_path, digits):
    """Shards of the digits that a test may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    for path in digits.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_the_index_of_our_shards_equals_their_own(own, monkeypatch, capsys, workers):
    before = (own / "index.json").read_bytes()
    (own / "index.json").unlink()
    (own.parent / "names.txt").write_text("\n".join("0123456789") + "\n\n")
    arguments = (own, "--classes", own.parent / "names.txt", "--workers", workers)
    assert ended(index, monkeypatch, capsys, *arguments) == (0, "6 shards, 1797 samples\n", "")
    assert (own / "index.json").read_bytes() == before


def test_patterns_and_output(own, monkeypatch, capsys):
    out = own.parent / "elsewhere.json"
    code, said, _ = ended(index, monkeypatch, capsys, f"{own}/train-{{000001..000002}}.tar", f"{own}/val-*", "--output", out)
    assert (code, said) == (0, "4 shards, 1076 samples\n")
    files = [entry["file"] for entry in json.loads(out.read_text())["shards"]]
    assert files == ["train-000001.tar", "train-000002.tar", "val-000000.tar", "val-000001.tar"]
    tar(own.parent / "other" / "a.tar", *sample("a", 1, 0))
    code, _, said = ended(index, monkeypatch, capsys, own, own.parent / "other", "--output", out)
    assert code == 2 and "--output: one index for the shards of 2 folders" in said


def test_an_index_keeps_its_entries_of_other_shards(own, monkeypatch, capsys):
    before = json.loads((own / "index.json").read_text())
    (own / "val-000001.tar").unlink()
    assert ended(index, monkeypatch, capsys, f"{own}/train-*.tar")[0] == 0
    after = json.loads((own / "index.json").read_text())
    assert after == before | {"shards": before["shards"][:5]}


def test_faulty_samples_are_named_and_stay_in_the_index(tmp_path, monkeypatch, capsys):
    members = [*sample("a", 1, 2), ("b.jpg", image(2)), *sample("c", 3, "x"), *sample("d", 4, 0), ("e.jpg", b""), ("e.pyd", b"1")]
    path = tar(tmp_path / "foreign" / "part-0.tar", *members)
    code, said, wrong = ended(index, monkeypatch, capsys, path.parent)
    assert (code, said) == (0, "1 shards, 5 samples; 3 of them will be skipped\n")
    assert [line.partition(": ")[2].partition(":")[0] for line in wrong.splitlines()] == ["sample b", "sample c", "sample e"]
    found = json.loads((path.parent / "index.json").read_text())
    assert found["shards"][0]["samples"] == 5 and found["classes"] == ["0", "1", "2"]
    assert Shards(str(path), "data.train", 3).samples == 5


def encoded(number: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 9, 3), np.uint8)).save(out, kind)
    return out.getvalue()


KINDS = (("JPG", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("BMP", "BMP"), ("tiff", "TIFF"))


@pytest.mark.parametrize("label", ["cls", "cls.txt", "txt", "json"])
def test_the_image_kinds_and_label_forms_of_the_stream_are_read(tmp_path, monkeypatch, capsys, label):
    """Labels are names of classes, which the index maps to numbers, or numbers; verify agrees with the index."""
    members = []
    for number, (extension, kind) in enumerate(KINDS):
        text = ("cat", "dog", "2")[number % 3]
        content = json.dumps({"label": int(text) if text.isdigit() else text, "width": 9}) if label == "json" else f"{text}\n"
        members += [(f"{number}.{label}", content.encode()), (f"{number}.{extension}", encoded(number, kind))]
    path, names = tar(tmp_path / "own" / "train-0.tar", *members), tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    key = ("--label-key", "label") if label == "json" else ()
    assert ended(index, monkeypatch, capsys, path, "--classes", names, *key) == (0, "1 shards, 6 samples\n", "")
    assert findings(monkeypatch, capsys, path, "--decode", *key) == []
    # A second time the names are those of the index.
    assert ended(index, monkeypatch, capsys, path, *key) == (0, "1 shards, 6 samples\n", "")
    row = json.loads(ended(verify, monkeypatch, capsys, path, "--json", *key)[1])["splits"]["train"]
    assert (row["per_class"], row["faulty"], row["unread"]) == ([2, 2, 2], 0, {})
    assert ended(verify, monkeypatch, capsys, path, "--contact-sheet", tmp_path / "sheet.png", *key)[0] == 0


def test_unknown_names_and_missing_json_keys_are_faults(tmp_path, monkeypatch, capsys):
    path = tar(tmp_path / "a" / "a.tar", ("a.txt", b"cat"), ("a.jpg", image(1, "jpg")), *sample("b", 2, 0))
    code, said, wrong = ended(index, monkeypatch, capsys, path)
    assert (code, said) == (0, "1 shards, 2 samples; 1 of them will be skipped\n")
    assert "sample a: label 'cat' is out of range" in wrong
    members = [("a.json", b'{"name": 1}'), ("a.jpg", image(1, "jpg")), ("b.json", b"{"), ("b.png", image(2))]
    path = tar(tmp_path / "b" / "b.tar", *members)
    code, said, wrong = ended(index, monkeypatch, capsys, path, "--label-key", "label")
    assert (code, said) == (0, "1 shards, 2 samples; 2 of them will be skipped\n")
    assert "no key 'label'" in wrong and "no object of JSON" in wrong


def test_members_without_a_reader_are_listed_once_by_kind(tmp_path, monkeypatch, capsys):
    more = [[(f"{key}.json", b"{}")] + ([(f"{key}.npy", b"1")] if key == "a" else []) for key in "abc"]
    members = [one for number, key in enumerate("abc") for one in (*sample(key, number, 0), *more[number])]
    path = tar(tmp_path / "own" / "a.tar", *members)
    line = "members without a reader, and the samples that have them: .json (3), .npy (1)\n"
    assert ended(index, monkeypatch, capsys, path) == (0, "1 shards, 3 samples\n", line)
    code, said, _ = ended(verify, monkeypatch, capsys, path)
    assert code == 0 and said.count("without a reader") == 1 and line in said
    assert json.loads(ended(verify, monkeypatch, capsys, path, "--json")[1])["splits"]["a"]["unread"] == {"json": 3, "npy": 1}


def test_a_label_of_twenty_digits_takes_no_memory(tmp_path, monkeypatch, capsys):
    path = tar(tmp_path / "own" / "a.tar", *sample("a", 1, 10**19), *sample("b", 2, 1))
    code, said, wrong = ended(index, monkeypatch, capsys, path)
    assert code == 0 and "1 of them will be skipped" in said and "sample a: label '10000000000000000000' is out of range" in wrong
    assert json.loads((tmp_path / "own" / "index.json").read_text())["classes"] == ["0", "1"]
    assert [kind for kind, *_ in findings(monkeypatch, capsys, path)] == ["sample"]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, bytes(10240)])
def test_no_index_is_made_of_other_files(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    code, _, said = ended(index, monkeypatch, capsys, path)
    assert code == 2 and f"{path}: not a shard (" in said and said.count("\n") == 1
    assert not (tmp_path / "index.json").exists()


def test_index_names_what_it_cannot_find(tmp_path, monkeypatch, capsys):
    for arguments in ([tmp_path], [tmp_path / "none-*.tar"], [tmp_path, "--classes", tmp_path / "names.txt"]):
        code, _, said = ended(index, monkeypatch, capsys, *arguments)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said


def findings(monkeypatch, capsys, *arguments) -> list[tuple[str, str, str]]:
    """Kind, shard (and sample) and text of each finding; the exit code must agree."""
    code, out, err = ended(verify, monkeypatch, capsys, *arguments, "--json")
    found = json.loads(out)["findings"]
    assert code == bool(found) and not err
    return [(one["kind"], one["where"].rpartition("/")[2], one["what"]) for one in found]


def test_whole_shards_give_no_finding(own, monkeypatch, capsys):
    assert findings(monkeypatch, capsys, own, "--decode") == []
    assert findings(monkeypatch, capsys, f"{own}/val-*.tar", "--workers", 2) == []
    code, out, _ = ended(verify, monkeypatch, capsys, own, "--decode")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in out.splitlines() if "│" in line
    }
    assert code == 0 and out.endswith("nothing was found\n")
    assert rows["samples"] == ["1,442", "355"] and rows["shards"] == ["4", "2"] and rows["faulty"] == ["0", "0"]
    assert rows["per class"] == ["140 / 144 / 147", "34 / 36 / 36"] and rows["width"] == ["8 / 8 / 8"] * 2


def test_the_summary_counts_as_numpy_does(own, monkeypatch, capsys):
    code, out, _ = ended(verify, monkeypatch, capsys, own, "--json")
    labels = [label for path in own.glob("train-*") for label in _labels(path)]
    counts = np.bincount(labels)
    row = json.loads(out)["splits"]["train"]
    assert row["per_class"] == [counts.min(), np.median(counts), counts.max()] and row["width"] is None
    assert row["bytes"] == sum(path.stat().st_size for path in own.glob("train-*")) and code == 0


def _labels(path: Path) -> list[int]:
    with tarfile.open(path) as shard:
        return [int(shard.extractfile(member).read()) for member in shard if member.name.endswith(".cls")]


def test_a_shard_that_differs_from_the_index_is_found(own, monkeypatch, capsys):
    path = own / "train-000001.tar"
    content = bytearray(path.read_bytes())
    # In the padding behind an image, where no sample is harmed by it.
    content[content.index(b"IEND") + 40] ^= 1
    path.write_bytes(content)
    (kind, where, what), *others = findings(monkeypatch, capsys, own)
    assert (kind, where) == ("digest", path.name) and "as SHA-256, index.json says" in what and not others
    (own / "val-000000.tar").unlink()
    path.write_bytes(content[:-10240])
    found = findings(monkeypatch, capsys, own)
    assert ("index", "val-000000.tar") in [(kind, where) for kind, where, _ in found]
    assert any(kind == "digest" and "bytes, index.json says" in what for kind, _, what in found)
    tar(own / "train-000009.tar", *sample("new", 1, 3))
    assert ("index", "train-000009.tar", "not in any index; python -m data_tools.index makes one") in findings(
        monkeypatch, capsys, own
    )


def test_damage_and_faulty_samples_are_found(own, monkeypatch, capsys):
    path = own / "train-000001.tar"
    content = bytearray(path.read_bytes())
    begin = json.loads((own / "index.json").read_text())["shards"][1]["offsets"][3]
    content[begin : begin + 2048] = b"\xaa" * 2048
    path.write_bytes(content)
    kinds = {kind for kind, where, _ in findings(monkeypatch, capsys, own) if where.startswith(path.name)}
    assert kinds == {"digest", "damage", "sample"}


def made(folder: Path, classes: int = 3, **shards: list[tuple[str, bytes]]) -> Path:
    folder.mkdir()
    for name, members in shards.items():
        tar(folder / f"{name}-000000.tar", *members)
    index.make(sorted(folder.glob("*.tar")), None, None, 1)
    name_classes(folder, [f"name {i}" for i in range(classes)])
    return folder


def name_classes(folder: Path, names: list[str]) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"classes": names}))


def test_labels_and_classes_are_checked(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path / "own", train=[*sample("a", 1, 0), *sample("b", 2, 3), *sample("c", 3, 1)], val=sample("v", 4, 1))
    assert findings(monkeypatch, capsys, folder) == [
        ("label", "train-000000.tar: b", "label 3 is outside the 3 classes"),
        ("class", "class 2 (name 2)", "has no training sample"),
    ]


def kinds(monkeypatch, capsys, *arguments) -> list[tuple[str, str]]:
    return [(kind, where) for kind, where, _ in findings(monkeypatch, capsys, *arguments)]


def test_splits_in_folders_of_their_own_are_distinguished(tmp_path, monkeypatch, capsys):
    tar(tmp_path / "train" / "shard-000.tar", *sample("a", 1, 0), *sample("b", 2, 2))
    tar(tmp_path / "val" / "shard-000.tar", *sample("a", 1, 0), *sample("c", 3, 1))
    assert ended(index, monkeypatch, capsys, tmp_path / "train", tmp_path / "val")[0] == 0
    assert kinds(monkeypatch, capsys, tmp_path / "train", tmp_path / "val") == [
        ("class", "class 1 (1)"),
        ("leak", "shard-000.tar: a"),
    ]
    assert kinds(monkeypatch, capsys, tmp_path / "train") == [("class", "class 1 (1)")]
    assert kinds(monkeypatch, capsys, tmp_path / "val") == []


def test_shards_of_one_split_in_two_folders_are_one_split(tmp_path, monkeypatch, capsys):
    for number, folder in enumerate(("first", "second")):
        made(tmp_path / folder, 2, train=[*sample(f"a{number}", 1, 0), *sample(f"b{number}", 2 + number, 1)])
    assert kinds(monkeypatch, capsys, tmp_path / "first", tmp_path / "second") == []


@pytest.mark.parametrize("first, second", [("train-0-of-2", "train-1-of-2"), ("train_00000_of_00002", "train_00001_of_00002")])
def test_a_number_of_shards_in_a_name_is_no_split(tmp_path, monkeypatch, capsys, first, second):
    tar(tmp_path / "own" / f"{first}.tar", *sample("a", 1, 0))
    tar(tmp_path / "own" / f"{second}.tar", *sample("b", 1, 0))
    assert ended(index, monkeypatch, capsys, tmp_path / "own")[0] == 0
    assert kinds(monkeypatch, capsys, tmp_path / "own") == []
    assert list(json.loads(ended(verify, monkeypatch, capsys, tmp_path / "own", "--json")[1])["splits"]) == ["train"]


def test_training_shards_are_known_by_a_word_of_their_name(tmp_path, monkeypatch, capsys):
    tar(tmp_path / "own" / "imagenet1k-train-0000.tar", *sample("a", 1, 0), *sample("b", 2, 2))
    tar(tmp_path / "own" / "imagenet1k-val-0000.tar", *sample("c", 3, 1))
    assert ended(index, monkeypatch, capsys, tmp_path / "own")[0] == 0
    assert kinds(monkeypatch, capsys, tmp_path / "own") == [("class", "class 1 (1)")]


def test_two_indices_with_different_class_names_are_found(tmp_path, monkeypatch, capsys):
    train = made(tmp_path / "a", 2, train=[*sample("a", 1, 0), *sample("b", 2, 1)])
    val = made(tmp_path / "b", 2, val=sample("c", 3, 1))
    assert kinds(monkeypatch, capsys, train, val) == []
    for names, said in ((["name 1", "name 0"], "calls class 0 'name 1', "), (["name 0", "name 1", "more"], "names 3 classes, ")):
        name_classes(val, names)
        ((kind, where, what),) = findings(monkeypatch, capsys, train, val)
        assert (kind, where) == ("class", "index.json") and what.startswith(said) and "a/index.json" in what
    # Of the numbers that an index has without --classes there are as many as its own labels need.
    name_classes(val, ["0"])
    assert kinds(monkeypatch, capsys, val, train) == []


def test_an_index_does_not_keep_outdated_numbers_of_classes(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "own"
    tar(folder / "train-0.tar", *sample("a", 1, 3))
    tar(folder / "val-0.tar", *sample("b", 2, 1))
    for pattern, count in (("val-*.tar", 2), ("*.tar", 4), ("val-*.tar", 4)):
        assert ended(index, monkeypatch, capsys, f"{folder}/{pattern}")[0] == 0
        assert json.loads((folder / "index.json").read_text())["classes"] == list(map(str, range(count)))
    (folder / "train-0.tar").unlink()
    assert ended(index, monkeypatch, capsys, folder)[0] == 0
    assert json.loads((folder / "index.json").read_text())["classes"] == ["0", "1"]


def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, monkeypatch, capsys):
    path, names = tar(tmp_path / "own" / "a.tar", *sample("a", 1, 0), *sample("b", 2, 2)), tmp_path / "names.txt"
    for content, said in (
        (b"cat\ndog\n", f"{names}: names 2 classes, but {path}: b has label 2"),
        (b"cat\n\ndog\nowl", f"{names}: line 2 is empty"),
        (b"\ncat\ndog\nowl", f"{names}: line 1 is empty"),
        (b"cat\nM\xf6we\nowl", f"{names}: not UTF-8 text (at byte 5)"),
        (b"\n", f"{names}: holds no name"),
    ):
        names.write_bytes(content)
        code, _, err = ended(index, monkeypatch, capsys, path, "--classes", names)
        assert code == 2 and said in err and not (tmp_path / "own" / "index.json").exists()
    names.write_text("cat\ndog\nowl\n\n")
    assert ended(index, monkeypatch, capsys, path, "--classes", names)[0] == 0
    assert json.loads((tmp_path / "own" / "index.json").read_text())["classes"] == ["cat", "dog", "owl"]
    tar(path, *sample("a", 1, 3))
    code, _, err = ended(index, monkeypatch, capsys, path)
    assert code == 2 and "index.json: names 3 classes, but" in err and "by --classes" in err


@pytest.mark.parametrize("content", ["{", '{"version": 1, "shards": [{"file": 1}]}'])
def test_a_damaged_index_is_made_again(own, monkeypatch, capsys, content):
    before = json.loads((own / "index.json").read_text())
    (own / "index.json").write_text(content)
    code, _, err = ended(index, monkeypatch, capsys, f"{own}/val-*.tar")
    assert code == 2 and "index.json: not an index of shards" in err and "from all shards of the folder" in err
    code, _, err = ended(index, monkeypatch, capsys, own)
    assert code == 0 and "index.json: damaged, and made again" in err
    assert json.loads((own / "index.json").read_text()) == before


def test_the_index_of_another_program_is_left_alone(own, monkeypatch, capsys):
    content = '{"wids_version": 1, "shardlist": []}'
    (own / "index.json").write_text(content)
    code, _, err = ended(index, monkeypatch, capsys, own)
    assert code == 2 and "index.json: of another program; rename it" in err and (own / "index.json").read_text() == content


def test_kinds_of_duplicates_are_distinguished(tmp_path, monkeypatch, capsys):
    train = [*sample("a", 1, 0), *sample("b", 1, 0), *sample("c", 1, 1), *sample("d", 2, 2), *sample("a", 3, 1)]
    folder = made(tmp_path / "own", train=train, val=[*sample("d", 4, 0), *sample("w", 2, 2)])
    found = findings(monkeypatch, capsys, folder)
    assert [(kind, where) for kind, where, _ in found] == [
        ("key", "train-000000.tar: a"),
        ("label", "train-000000.tar: c"),
        ("leak", "val-000000.tar: w"),
    ]
    assert "the same image as" in found[1][2] and "of label 0 there and 1 here" in found[1][2]
    assert "train-000000.tar: d, in another split" in found[2][2]
    _, out, _ = ended(verify, monkeypatch, capsys, folder, "--json")
    assert {name: row["same_picture"] for name, row in json.loads(out)["splits"].items()} == {"train": 2, "val": 0}


def test_only_decode_finds_images_that_do_not_decode(tmp_path, monkeypatch, capsys):
    cut, damaged = image(1, "jpg")[:-60], bytearray(image(2))
    damaged[60] ^= 0xFF
    members = [("a.cls", b"0"), ("a.jpg", cut), ("b.cls", b"0"), ("b.png", bytes(damaged)), ("c.cls", b"0"), ("c.jpg", b"")]
    folder = made(tmp_path / "own", 1, train=[*members, *sample("d", 5, 0)])
    assert findings(monkeypatch, capsys, folder) == []
    found = findings(monkeypatch, capsys, folder, "--decode")
    assert [(kind, where) for kind, where, _ in found] == [("sample", f"train-000000.tar: {key}") for key in "abc"]
    assert "truncated" in found[0][2] and found[2][2] == "it is empty"


def test_many_findings_are_counted_and_some_printed(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path / "own", 1, train=[part for i in range(30) for part in sample(f"{i:02d}", i, 0 if i < 10 else 1)])
    code, out, _ = ended(verify, monkeypatch, capsys, folder, "--list", "3")
    assert code == 1 and out.count("is outside the 1 classes") == 3
    assert "label: and 17 more" in out and out.endswith("20 findings\n")


def test_verify_names_the_reason_why_it_cannot_run(tmp_path, own, monkeypatch, capsys):
    (own / "index.json").write_text("{")
    for pattern, said in ((tmp_path / "none", "none"), (own, "index.json: not an index of shards")):
        code, _, wrong = ended(verify, monkeypatch, capsys, pattern)
        assert code == 2 and wrong.startswith("error: ") and said in wrong and wrong.count("\n") == 1


@pytest.mark.parametrize("what", ["an empty tar", "only what would be unpickled", "a repeated member", "gzip"])
def test_verify_reports_shards_without_a_usable_sample(tmp_path, monkeypatch, capsys, what):
    members = {
        "an empty tar": [],
        "only what would be unpickled": [("a.cls", b"0"), ("a.pickle", b"N.")],
        "a repeated member": [*sample("a", 1, 0), *sample("a", 1, 0)],
        "gzip": sample("a", 1, 0),
    }
    path = tar(tmp_path / "own" / "train-0.tar", *members[what])
    if what == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = findings(monkeypatch, capsys, path.parent)
    expected = {"gzip": "damage", "an empty tar": "index"}.get(what, "sample")
    assert expected in [kind for kind, *_ in found]
    if what == "gzip":
        assert "it is compressed; gunzip it" in [why for *_, why in found]
        assert "not a shard (it is compressed; gunzip it)" in ended(index, monkeypatch, capsys, path)[2]
    sheet = tmp_path / "sheet.png"
    code, out, err = ended(verify, monkeypatch, capsys, path.parent, "--json", "--contact-sheet", sheet)
    assert code == 2 and len(json.loads(out)["findings"]) == len(found) and "no sample to put on a contact sheet" in err


def test_a_contact_sheet_that_cannot_be_written_is_refused_before_anything_is_read(own, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("shards were read")

    monkeypatch.setattr(verify, "survey", never)
    for path in (own.parent / "none" / "sheet.png", own):
        code, out, err = ended(verify, monkeypatch, capsys, own, "--contact-sheet", path)
        assert code == 2 and not out and f"--contact-sheet: {path} cannot be written" in err


def test_findings_are_printed_if_the_contact_sheet_fails(own, monkeypatch, capsys):
    (own / "index.json").unlink()
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    code, out, err = ended(verify, monkeypatch, capsys, own, "--contact-sheet", own.parent / "sheet.png")
    assert code == 2 and out.endswith("6 findings\n") and "no space left" in err


def test_the_contact_sheet_shows_what_the_seed_draws(tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    out.mkdir()
    make_shards.synthetic(out, classes=3, train=70, val=3, size=40)
    sheets = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        path = tmp_path / f"{name}.png"
        code, _, _ = ended(verify, monkeypatch, capsys, out, "--contact-sheet", path, "--seed", seed)
        assert code == 0
        with Image.open(path) as sheet:
            sheets[name] = np.asarray(sheet)
    assert sheets["a"].shape == (8 * 180, 8 * 160, 3)
    assert (sheets["a"] == sheets["again"]).all() and (sheets["a"] != sheets["b"]).any()
    tiles = sheets["a"].reshape(8, 180, 8, 160, 3).transpose(0, 2, 1, 3, 4).reshape(64, 180, 160, 3)
    for tile in tiles:
        # An image in many colours, and below it a caption in black on white.
        assert len(np.unique(tile[:160].reshape(-1, 3), axis=0)) > 200 and tile[160:].min() < 80 and tile[160, 0].min() == 255


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200), (120, 120, 120)]


@pytest.mark.parametrize("name", ["{}", "name {}"])
def test_each_tile_of_a_contact_sheet_shows_a_sample_and_its_own_label(tmp_path, monkeypatch, capsys, name):
    """Class c is all COLOURS[c]; its caption is drawn here anew."""
    members = []
    for number in range(40):
        pixels = np.full((8, 8, 3), COLOURS[number % 7], np.uint8)
        pixels[0, 0, 0] = number
        members += [(f"{number:02d}.cls", b"%d" % (number % 7)), (f"{number:02d}.png", png(pixels))]
    folder = made(tmp_path / "own", 7, train=members)
    name_classes(folder, [name.format(c) for c in range(7)])
    assert ended(verify, monkeypatch, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 5 * 180)
        shown, numbers = [], []
        for tile in range(40):
            left, top = tile % 8 * 160, tile // 8 * 180
            label = COLOURS.index(sheet.getpixel((left + 80, top + 80)))
            caption = Image.new("RGB", (160, 20), "white")
            text = f"{label} {name.format(label)}"
            ImageDraw.Draw(caption).text((4, 3), text, "black", font=ImageFont.load_default(11))
            assert (np.asarray(sheet.crop((left, top + 160, left + 160, top + 180))) == np.asarray(caption)).all(), text
            shown.append(label)
            numbers.append(sheet.getpixel((left + 6, top + 6))[0])
    assert sorted(numbers) == list(range(40)) and [number % 7 for number in numbers] == shown


def test_grey_of_16_bits_is_shown_as_training_sees_it(tmp_path, monkeypatch, capsys):
    members = [("a.cls", b"0"), ("a.png", png(np.full((8, 8), 100 << 8, np.uint16)))]
    folder = made(tmp_path / "own", 1, train=members)
    assert ended(verify, monkeypatch, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")[0] == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((80, 80)) == (100, 100, 100)


def test_a_contact_sheet_marks_images_that_cannot_be_decoded(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path / "own", 1, train=[("a.cls", b"0"), ("a.jpg", b"no image")])
    code, _, _ = ended(verify, monkeypatch, capsys, folder, "--contact-sheet", tmp_path / "sheet.png")
    assert code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 180) and sheet.getpixel((80, 80)) == (255, 0, 0)


@pytest.fixture
def served(digits, monkeypatch):
    """The digits' shards and their index on an HTTP server."""
    monkeypatch.setenv("NO_PROXY", "*")
    with FileServer() as server:
        server.files = {f"digits/{path.name}": path.read_bytes() for path in digits.iterdir()}
        yield server


def test_remote_shards_are_verified_as_local_ones(served, digits, monkeypatch, capsys, tmp_path):
    url, sheet = f"{served.url}/digits", tmp_path / "sheet.png"
    arguments = (url, "--decode", "--json")
    code, out, _ = ended(verify, monkeypatch, capsys, *arguments, "--contact-sheet", sheet)
    assert code == 0 and json.loads(out) == json.loads(ended(verify, monkeypatch, capsys, digits, "--decode", "--json")[1])
    ended(verify, monkeypatch, capsys, digits, "--contact-sheet", tmp_path / "local.png")
    assert sheet.read_bytes() == (tmp_path / "local.png").read_bytes()
    content = served.files["digits/train-000001.tar"]
    served.files["digits/train-000001.tar"] = content[:600] + b"\1" + content[601:]
    assert [(kind, where) for kind, where, _ in findings(monkeypatch, capsys, *arguments[:-1])] == [("digest", "train-000001.tar")]


def test_the_index_of_remote_shards_goes_to_a_file(served, digits, monkeypatch, capsys, tmp_path):
    pattern, names = f"{served.url}/digits/{{train-{{000000..000003}},val-{{000000..000001}}}}.tar", tmp_path / "names.txt"
    names.write_text("\n".join("0123456789"))
    code, _, said = ended(index, monkeypatch, capsys, pattern)
    assert code == 2 and "no index can be written there; write it with --output" in said
    arguments = (pattern, "--classes", names, "--output", tmp_path / "index.json", "--workers", 2)
    assert ended(index, monkeypatch, capsys, *arguments)[:2] == (0, "6 shards, 1797 samples\n")
    assert (tmp_path / "index.json").read_bytes() == (digits / "index.json").read_bytes()


def several(number: int) -> list[tuple[str, bytes]]:
    names = ("png", "cls", "crop.png", "crop.cls")
    return [(f"{number}.{name}", image(number) if name.endswith("png") else b"0") for name in names]


def test_samples_with_several_images_are_found_until_one_is_named(tmp_path, monkeypatch, capsys):
    tar(tmp_path / "train-0.tar", *(member for number in range(3) for member in several(number)))
    code, out, err = ended(index, monkeypatch, capsys, tmp_path)
    assert code == 0 and "3 of them will be skipped" in out and err.count("of .crop.png, .png name one by key 'data.image'") == 3
    code, out, _ = ended(verify, monkeypatch, capsys, tmp_path)
    assert code == 1 and out.count("sample: ") == 3
    for module in (index, verify):
        code, out, err = ended(module, monkeypatch, capsys, tmp_path, "--image", "crop.png", "--label", "crop.cls")
        assert code == 0 and "sample: " not in out and "skipped" not in out


def test_a_folder_is_taken_with_all_below_it(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        tar(tmp_path / name / f"train-{name}.tar", *sample(name, ord(name), 0), *sample(f"{name}1", 9 + ord(name), 1))
    code, out, _ = ended(index, monkeypatch, capsys, tmp_path)
    assert (code, out) == (0, "2 shards, 4 samples\n") and all((tmp_path / name / "index.json").is_file() for name in ("a", "b"))
    assert findings(monkeypatch, capsys, tmp_path) == []
    tar(tmp_path / "b" / "train-c.tar", *sample("c", 1, 0))
    ended(index, monkeypatch, capsys, tmp_path)
    (tmp_path / "b" / "train-b.tar").unlink()
    assert [kind for kind, *_ in findings(monkeypatch, capsys, tmp_path)] == ["index"]


def test_classes_of_uneven_size_are_told_and_counted(tmp_path, monkeypatch, capsys):
    members = [member for number in range(21) for member in sample(f"{number:02}", number, 1 if number else 0)]
    made(tmp_path / "own", classes=2, train=members)
    code, out, _ = ended(verify, monkeypatch, capsys, tmp_path / "own")
    assert code == 0 and "train: 1 samples of class 0 (name 0), 20 of class 1 (name 1)" in out
    _, out, _ = ended(verify, monkeypatch, capsys, tmp_path / "own", "--json")
    assert json.loads(out)["splits"]["train"]["class_counts"] == [1, 20]


def test_images_with_an_alpha_channel_are_counted(tmp_path, monkeypatch, capsys):
    rgba = png(np.zeros((8, 8, 4), np.uint8))
    tar(tmp_path / "own" / "train-0.tar", ("a.png", rgba), ("a.cls", b"0"), *sample("b", 1, 0))
    ended(index, monkeypatch, capsys, tmp_path / "own")
    _, out, _ = ended(verify, monkeypatch, capsys, tmp_path / "own", "--decode", "--json")
    assert json.loads(out)["splits"]["train"]["with_alpha"] == 1


def test_a_pipe_in_place_of_the_index_is_refused_or_replaced(tmp_path, monkeypatch, capsys):
    tar(tmp_path / "own" / "train-0.tar", *sample("a", 1, 0))
    os.mkfifo(tmp_path / "own" / "index.json")
    code, _, err = ended(verify, monkeypatch, capsys, tmp_path / "own")
    assert code == 2 and "not a regular file" in err and err.count("\n") == 1
    assert ended(index, monkeypatch, capsys, tmp_path / "own")[0] == 0 and (tmp_path / "own" / "index.json").is_file()


def test_names_of_classes_are_read_of_files_alone(tmp_path, monkeypatch, capsys):
    tar(tmp_path / "own" / "train-0.tar", *sample("a", 1, "cat"))
    code, _, err = ended(index, monkeypatch, capsys, tmp_path / "own", "--classes", "/dev/zero")
    assert code == 2 and "/dev/zero: not a regular file" in err
    (tmp_path / "names.txt").write_text("\ufeffcat\ndog\n")
    assert ended(index, monkeypatch, capsys, tmp_path / "own", "--classes", tmp_path / "names.txt")[1] == "1 shards, 1 samples\n"


def test_jpegs_with_further_images_behind_them_are_images_everywhere(tmp_path, monkeypatch, capsys):
    file, draw = io.BytesIO(), np.random.default_rng(0)
    pixels = [Image.fromarray(draw.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(3)]
    pixels[0].save(file, "MPO", save_all=True, append_images=pixels[1:])
    for split in ("train", "val"):
        (tmp_path / "in" / split / "a").mkdir(parents=True)
        (tmp_path / "in" / split / "a" / "x.jpg").write_bytes(file.getvalue() + split.encode())
    for options in ({"check": True}, {"resize": 20}):
        folder = tmp_path / str(options)
        folder.mkdir()
        assert make_shards.image_folder(tmp_path / "in", folder, **options) == {"train": 1, "val": 1}
        out = ended(verify, monkeypatch, capsys, folder, "--decode")[1]
        assert "sample: " not in out and ("40 / 40 / 40" if "check" in options else "20 / 20 / 20") in out
