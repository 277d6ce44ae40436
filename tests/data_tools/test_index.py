"""index.json of shards made elsewhere is what make_shards would have written."""

import json
import os

import pytest
from shards_made import encoded, ended, findings, image, sample, tar

from data_tools import index, verify
from dnal_dist.data.shards import Shards


@pytest.mark.parametrize("workers", [1, 2])
def test_the_index_of_our_shards_equals_their_own(own, capsys, workers):
    before = (own / "index.json").read_bytes()
    (own / "index.json").unlink()
    (own.parent / "names.txt").write_text("\n".join("0123456789") + "\n\n")
    arguments = (own, "--classes", own.parent / "names.txt", "--workers", workers)
    assert ended(index, capsys, *arguments) == (0, "6 shards, 1797 samples\n", "")
    assert (own / "index.json").read_bytes() == before


def test_patterns_and_output(own, capsys):
    out = own.parent / "elsewhere.json"
    code, said, _ = ended(index, capsys, f"{own}/train-{{000001..000002}}.tar", f"{own}/val-*", "--output", out)
    assert (code, said) == (0, "4 shards, 1076 samples\n")
    files = [entry["file"] for entry in json.loads(out.read_text())["shards"]]
    assert files == ["train-000001.tar", "train-000002.tar", "val-000000.tar", "val-000001.tar"]
    tar(own.parent / "other" / "a.tar", *sample("a", 1, 0))
    code, _, said = ended(index, capsys, own, own.parent / "other", "--output", out)
    assert code == 2 and "--output: one index for the shards of 2 folders" in said


def test_an_index_keeps_its_entries_of_other_shards(own, capsys):
    before = json.loads((own / "index.json").read_text())
    (own / "val-000001.tar").unlink()
    assert ended(index, capsys, f"{own}/train-*.tar")[0] == 0
    after = json.loads((own / "index.json").read_text())
    assert after == before | {"shards": before["shards"][:5]}


def test_faulty_samples_are_named_and_stay_in_the_index(tmp_path, capsys):
    members = [*sample("a", 1, 2), ("b.jpg", image(2)), *sample("c", 3, "x"), *sample("d", 4, 0), ("e.jpg", b""), ("e.pyd", b"1")]
    path = tar(tmp_path / "foreign" / "part-0.tar", *members)
    code, said, wrong = ended(index, capsys, path.parent)
    assert (code, said) == (0, "1 shards, 5 samples; 3 of them will be skipped\n")
    assert [line.partition(": ")[2].partition(":")[0] for line in wrong.splitlines()] == ["sample b", "sample c", "sample e"]
    found = json.loads((path.parent / "index.json").read_text())
    assert found["shards"][0]["samples"] == 5 and found["classes"] == ["0", "1", "2"]
    assert Shards(str(path), "data.train", 3).samples == 5


KINDS = (("JPG", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("BMP", "BMP"), ("tiff", "TIFF"))


@pytest.mark.parametrize("label", ["cls", "cls.txt", "txt", "json"])
def test_the_image_kinds_and_label_forms_of_the_stream_are_read(tmp_path, capsys, label):
    """Labels are names of classes, which the index maps to numbers, or numbers; verify agrees with the index."""
    members = []
    for number, (extension, kind) in enumerate(KINDS):
        text = ("cat", "dog", "2")[number % 3]
        content = json.dumps({"label": int(text) if text.isdigit() else text, "width": 9}) if label == "json" else f"{text}\n"
        members += [(f"{number}.{label}", content.encode()), (f"{number}.{extension}", encoded(number, kind))]
    path, names = tar(tmp_path / "own" / "train-0.tar", *members), tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    key = ("--label-key", "label") if label == "json" else ()
    assert ended(index, capsys, path, "--classes", names, *key) == (0, "1 shards, 6 samples\n", "")
    assert findings(capsys, path, "--decode", *key) == []
    # A second time the names are those of the index.
    assert ended(index, capsys, path, *key) == (0, "1 shards, 6 samples\n", "")
    row = json.loads(ended(verify, capsys, path, "--json", *key)[1])["splits"]["train"]
    assert (row["per_class"], row["faulty"], row["unread"]) == ([2, 2, 2], 0, {})
    assert ended(verify, capsys, path, "--contact-sheet", tmp_path / "sheet.png", *key)[0] == 0


def test_unknown_names_and_missing_json_keys_are_faults(tmp_path, capsys):
    path = tar(tmp_path / "a" / "a.tar", ("a.txt", b"cat"), ("a.jpg", image(1, "jpg")), *sample("b", 2, 0))
    code, said, wrong = ended(index, capsys, path)
    assert (code, said) == (0, "1 shards, 2 samples; 1 of them will be skipped\n")
    assert "sample a: label 'cat' is out of range" in wrong
    members = [("a.json", b'{"name": 1}'), ("a.jpg", image(1, "jpg")), ("b.json", b"{"), ("b.png", image(2))]
    path = tar(tmp_path / "b" / "b.tar", *members)
    code, said, wrong = ended(index, capsys, path, "--label-key", "label")
    assert (code, said) == (0, "1 shards, 2 samples; 2 of them will be skipped\n")
    assert "no key 'label'" in wrong and "no object of JSON" in wrong


def test_members_without_a_reader_are_listed_once_by_kind(tmp_path, capsys):
    more = [[(f"{key}.json", b"{}")] + ([(f"{key}.npy", b"1")] if key == "a" else []) for key in "abc"]
    members = [one for number, key in enumerate("abc") for one in (*sample(key, number, 0), *more[number])]
    path = tar(tmp_path / "own" / "a.tar", *members)
    line = "members without a reader, and the samples that have them: .json (3), .npy (1)\n"
    assert ended(index, capsys, path) == (0, "1 shards, 3 samples\n", line)
    code, said, _ = ended(verify, capsys, path)
    assert code == 0 and said.count("without a reader") == 1 and line in said
    assert json.loads(ended(verify, capsys, path, "--json")[1])["splits"]["a"]["unread"] == {"json": 3, "npy": 1}


def test_a_label_of_twenty_digits_takes_no_memory(tmp_path, capsys):
    path = tar(tmp_path / "own" / "a.tar", *sample("a", 1, 10**19), *sample("b", 2, 1))
    code, said, wrong = ended(index, capsys, path)
    assert code == 0 and "1 of them will be skipped" in said and "sample a: label '10000000000000000000' is out of range" in wrong
    assert json.loads((tmp_path / "own" / "index.json").read_text())["classes"] == ["0", "1"]
    assert [kind for kind, *_ in findings(capsys, path)] == ["sample"]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, bytes(10240)])
def test_no_index_is_made_of_other_files(tmp_path, capsys, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    code, _, said = ended(index, capsys, path)
    assert code == 2 and f"{path}: not a shard (" in said and said.count("\n") == 1
    assert not (tmp_path / "index.json").exists()


def test_index_names_what_it_cannot_find(tmp_path, capsys):
    for arguments in ([tmp_path], [tmp_path / "none-*.tar"], [tmp_path, "--classes", tmp_path / "names.txt"]):
        code, _, said = ended(index, capsys, *arguments)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said


@pytest.mark.parametrize("content", ["{", '{"version": 1, "shards": [{"file": 1}]}'])
def test_a_damaged_index_is_made_again(own, capsys, content):
    before = json.loads((own / "index.json").read_text())
    (own / "index.json").write_text(content)
    code, _, err = ended(index, capsys, f"{own}/val-*.tar")
    assert code == 2 and "index.json: not an index of shards" in err and "from all shards of the folder" in err
    code, _, err = ended(index, capsys, own)
    assert code == 0 and "index.json: damaged, and made again" in err
    assert json.loads((own / "index.json").read_text()) == before


def test_the_index_of_another_program_is_left_alone(own, capsys):
    content = '{"wids_version": 1, "shardlist": []}'
    (own / "index.json").write_text(content)
    code, _, err = ended(index, capsys, own)
    assert code == 2 and "index.json: of another program; rename it" in err and (own / "index.json").read_text() == content


def test_a_pipe_in_place_of_the_index_is_refused_or_replaced(tmp_path, capsys):
    tar(tmp_path / "own" / "train-0.tar", *sample("a", 1, 0))
    os.mkfifo(tmp_path / "own" / "index.json")
    code, _, err = ended(verify, capsys, tmp_path / "own")
    assert code == 2 and "not a regular file" in err and err.count("\n") == 1
    assert ended(index, capsys, tmp_path / "own")[0] == 0 and (tmp_path / "own" / "index.json").is_file()


def test_names_of_classes_are_read_of_files_alone(tmp_path, capsys):
    tar(tmp_path / "own" / "train-0.tar", *sample("a", 1, "cat"))
    code, _, err = ended(index, capsys, tmp_path / "own", "--classes", "/dev/zero")
    assert code == 2 and "/dev/zero: not a regular file" in err
    (tmp_path / "names.txt").write_text("\ufeffcat\ndog\n")
    assert ended(index, capsys, tmp_path / "own", "--classes", tmp_path / "names.txt")[1] == "1 shards, 1 samples\n"
