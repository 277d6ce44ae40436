"""verify finds what is wrong with shards, and nothing else."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import FileServer
from shards_made import ended, findings, image, made, sample, tar

from data_tools import index, make_shards, verify
from data_tools.images import png


def test_whole_shards_give_no_finding(own, capsys):
    assert findings(capsys, own, "--decode") == []
    assert findings(capsys, f"{own}/val-*.tar", "--workers", 2) == []
    code, out, _ = ended(verify, capsys, own, "--decode")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in out.splitlines() if "│" in line
    }
    assert code == 0 and out.endswith("nothing was found\n")
    assert rows["samples"] == ["1,442", "355"] and rows["shards"] == ["4", "2"] and rows["faulty"] == ["0", "0"]
    assert rows["per class"] == ["140 / 144 / 147", "34 / 36 / 36"] and rows["width"] == ["8 / 8 / 8"] * 2


def test_the_summary_counts_as_numpy_does(own, capsys):
    code, out, _ = ended(verify, capsys, own, "--json")
    labels = [label for path in own.glob("train-*") for label in _labels(path)]
    counts = np.bincount(labels)
    row = json.loads(out)["splits"]["train"]
    assert row["per_class"] == [counts.min(), np.median(counts), counts.max()] and row["width"] is None
    assert row["bytes"] == sum(path.stat().st_size for path in own.glob("train-*")) and code == 0


def _labels(path: Path) -> list[int]:
    with tarfile.open(path) as shard:
        return [int(shard.extractfile(member).read()) for member in shard if member.name.endswith(".cls")]


def test_a_shard_that_differs_from_the_index_is_found(own, capsys):
    path = own / "train-000001.tar"
    content = bytearray(path.read_bytes())
    # In the padding behind an image, where no sample is harmed by it.
    content[content.index(b"IEND") + 40] ^= 1
    path.write_bytes(content)
    (kind, where, what), *others = findings(capsys, own)
    assert (kind, where) == ("digest", path.name) and "as SHA-256, index.json says" in what and not others
    (own / "val-000000.tar").unlink()
    path.write_bytes(content[:-10240])
    found = findings(capsys, own)
    assert ("index", "val-000000.tar") in [(kind, where) for kind, where, _ in found]
    assert any(kind == "digest" and "bytes, index.json says" in what for kind, _, what in found)
    tar(own / "train-000009.tar", *sample("new", 1, 3))
    assert ("index", "train-000009.tar", "not in any index; python -m data_tools.index makes one") in findings(capsys, own)


def test_damage_and_faulty_samples_are_found(own, capsys):
    path = own / "train-000001.tar"
    content = bytearray(path.read_bytes())
    begin = json.loads((own / "index.json").read_text())["shards"][1]["offsets"][3]
    content[begin : begin + 2048] = b"\xaa" * 2048
    path.write_bytes(content)
    kinds = {kind for kind, where, _ in findings(capsys, own) if where.startswith(path.name)}
    assert kinds == {"digest", "damage", "sample"}


def test_kinds_of_duplicates_are_distinguished(tmp_path, capsys):
    train = [*sample("a", 1, 0), *sample("b", 1, 0), *sample("c", 1, 1), *sample("d", 2, 2), *sample("a", 3, 1)]
    folder = made(tmp_path / "own", train=train, val=[*sample("d", 4, 0), *sample("w", 2, 2)])
    found = findings(capsys, folder)
    assert [(kind, where) for kind, where, _ in found] == [
        ("key", "train-000000.tar: a"),
        ("label", "train-000000.tar: c"),
        ("leak", "val-000000.tar: w"),
    ]
    assert "the same image as" in found[1][2] and "of label 0 there and 1 here" in found[1][2]
    assert "train-000000.tar: d, in another split" in found[2][2]
    _, out, _ = ended(verify, capsys, folder, "--json")
    assert {name: row["same_picture"] for name, row in json.loads(out)["splits"].items()} == {"train": 2, "val": 0}


def test_only_decode_finds_images_that_do_not_decode(tmp_path, capsys):
    cut, damaged = image(1, "jpg")[:-60], bytearray(image(2))
    damaged[60] ^= 0xFF
    members = [("a.cls", b"0"), ("a.jpg", cut), ("b.cls", b"0"), ("b.png", bytes(damaged)), ("c.cls", b"0"), ("c.jpg", b"")]
    folder = made(tmp_path / "own", 1, train=[*members, *sample("d", 5, 0)])
    assert findings(capsys, folder) == []
    found = findings(capsys, folder, "--decode")
    assert [(kind, where) for kind, where, _ in found] == [("sample", f"train-000000.tar: {key}") for key in "abc"]
    assert "truncated" in found[0][2] and found[2][2] == "it is empty"


def test_many_findings_are_counted_and_some_printed(tmp_path, capsys):
    folder = made(tmp_path / "own", 1, train=[part for i in range(30) for part in sample(f"{i:02d}", i, 0 if i < 10 else 1)])
    code, out, _ = ended(verify, capsys, folder, "--list", "3")
    assert code == 1 and out.count("is outside the 1 classes") == 3
    assert "label: and 17 more" in out and out.endswith("20 findings\n")


def test_verify_names_the_reason_why_it_cannot_run(tmp_path, own, capsys):
    (own / "index.json").write_text("{")
    for pattern, said in ((tmp_path / "none", "none"), (own, "index.json: not an index of shards")):
        code, _, wrong = ended(verify, capsys, pattern)
        assert code == 2 and wrong.startswith("error: ") and said in wrong and wrong.count("\n") == 1


@pytest.mark.parametrize("what", ["an empty tar", "only what would be unpickled", "a repeated member", "gzip"])
def test_verify_reports_shards_without_a_usable_sample(tmp_path, capsys, what):
    members = {
        "an empty tar": [],
        "only what would be unpickled": [("a.cls", b"0"), ("a.pickle", b"N.")],
        "a repeated member": [*sample("a", 1, 0), *sample("a", 1, 0)],
        "gzip": sample("a", 1, 0),
    }
    path = tar(tmp_path / "own" / "train-0.tar", *members[what])
    if what == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = findings(capsys, path.parent)
    expected = {"gzip": "damage", "an empty tar": "index"}.get(what, "sample")
    assert expected in [kind for kind, *_ in found]
    if what == "gzip":
        assert "it is compressed; gunzip it" in [why for *_, why in found]
        assert "not a shard (it is compressed; gunzip it)" in ended(index, capsys, path)[2]
    sheet = tmp_path / "sheet.png"
    code, out, err = ended(verify, capsys, path.parent, "--json", "--contact-sheet", sheet)
    assert code == 2 and len(json.loads(out)["findings"]) == len(found) and "no sample to put on a contact sheet" in err


@pytest.fixture
def served(digits, monkeypatch):
    """The digits' shards and their index on an HTTP server."""
    monkeypatch.setenv("NO_PROXY", "*")
    with FileServer() as server:
        server.files = {f"digits/{path.name}": path.read_bytes() for path in digits.iterdir()}
        yield server


def test_remote_shards_are_verified_as_local_ones(served, digits, capsys, tmp_path):
    url, sheet = f"{served.url}/digits", tmp_path / "sheet.png"
    arguments = (url, "--decode", "--json")
    code, out, _ = ended(verify, capsys, *arguments, "--contact-sheet", sheet)
    local = json.loads(ended(verify, capsys, digits, "--decode", "--json")[1])
    mean, std, number = local["colours"]
    assert number == 721 and mean == pytest.approx([0.305] * 3, abs=0.01) and std == pytest.approx([0.376] * 3, abs=0.01)
    assert code == 0 and json.loads(out) == {**local, "colours": None}
    ended(verify, capsys, digits, "--contact-sheet", tmp_path / "local.png")
    assert sheet.read_bytes() == (tmp_path / "local.png").read_bytes()
    content = served.files["digits/train-000001.tar"]
    served.files["digits/train-000001.tar"] = content[:600] + b"\1" + content[601:]
    assert [(kind, where) for kind, where, _ in findings(capsys, *arguments[:-1])] == [("digest", "train-000001.tar")]


def test_the_index_of_remote_shards_goes_to_a_file(served, digits, capsys, tmp_path):
    pattern, names = f"{served.url}/digits/{{train-{{000000..000003}},val-{{000000..000001}}}}.tar", tmp_path / "names.txt"
    names.write_text("\n".join("0123456789"))
    code, _, said = ended(index, capsys, pattern)
    assert code == 2 and "no index can be written there; write it with --output" in said
    arguments = (pattern, "--classes", names, "--output", tmp_path / "index.json", "--workers", 2)
    assert ended(index, capsys, *arguments)[:2] == (0, "6 shards, 1797 samples\n")
    assert (tmp_path / "index.json").read_bytes() == (digits / "index.json").read_bytes()


def several(number: int) -> list[tuple[str, bytes]]:
    names = ("png", "cls", "crop.png", "crop.cls")
    return [(f"{number}.{name}", image(number) if name.endswith("png") else b"0") for name in names]


def test_samples_with_several_images_are_found_until_one_is_named(tmp_path, capsys):
    tar(tmp_path / "train-0.tar", *(member for number in range(3) for member in several(number)))
    code, out, err = ended(index, capsys, tmp_path)
    assert code == 0 and "3 of them will be skipped" in out and err.count("of .crop.png, .png name one by key 'data.image'") == 3
    code, out, _ = ended(verify, capsys, tmp_path)
    assert code == 1 and out.count("sample: ") == 3
    for module in (index, verify):
        code, out, err = ended(module, capsys, tmp_path, "--image", "crop.png", "--label", "crop.cls")
        assert code == 0 and "sample: " not in out and "skipped" not in out


def test_a_folder_is_taken_with_all_below_it(tmp_path, capsys):
    for name in ("a", "b"):
        tar(tmp_path / name / f"train-{name}.tar", *sample(name, ord(name), 0), *sample(f"{name}1", 9 + ord(name), 1))
    code, out, _ = ended(index, capsys, tmp_path)
    assert (code, out) == (0, "2 shards, 4 samples\n") and all((tmp_path / name / "index.json").is_file() for name in ("a", "b"))
    assert findings(capsys, tmp_path) == []
    tar(tmp_path / "b" / "train-c.tar", *sample("c", 1, 0))
    ended(index, capsys, tmp_path)
    (tmp_path / "b" / "train-b.tar").unlink()
    assert [kind for kind, *_ in findings(capsys, tmp_path)] == ["index"]


def test_images_with_an_alpha_channel_are_counted(tmp_path, capsys):
    rgba = png(np.zeros((8, 8, 4), np.uint8))
    tar(tmp_path / "own" / "train-0.tar", ("a.png", rgba), ("a.cls", b"0"), *sample("b", 1, 0))
    ended(index, capsys, tmp_path / "own")
    _, out, _ = ended(verify, capsys, tmp_path / "own", "--decode", "--json")
    assert json.loads(out)["splits"]["train"]["with_alpha"] == 1


def test_jpegs_with_further_images_behind_them_are_images_everywhere(tmp_path, capsys):
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
        out = ended(verify, capsys, folder, "--decode")[1]
        assert "sample: " not in out and ("40 / 40 / 40" if "check" in options else "20 / 20 / 20") in out
