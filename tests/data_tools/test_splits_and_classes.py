"""Labels, classes and splits of shards are checked against their index and against one another."""

import json

import pytest
from shards_made import ended, findings, kinds, made, name_classes, sample, tar

from data_tools import index, verify


def test_labels_and_classes_are_checked(tmp_path, capsys):
    folder = made(tmp_path / "own", train=[*sample("a", 1, 0), *sample("b", 2, 3), *sample("c", 3, 1)], val=sample("v", 4, 1))
    assert findings(capsys, folder) == [
        ("label", "train-000000.tar: b", "label 3 is outside the 3 classes"),
        ("class", "class 2 (name 2)", "has no training sample"),
    ]


def test_splits_in_folders_of_their_own_are_distinguished(tmp_path, capsys):
    tar(tmp_path / "train" / "shard-000.tar", *sample("a", 1, 0), *sample("b", 2, 2))
    tar(tmp_path / "val" / "shard-000.tar", *sample("a", 1, 0), *sample("c", 3, 1))
    assert ended(index, capsys, tmp_path / "train", tmp_path / "val")[0] == 0
    assert kinds(capsys, tmp_path / "train", tmp_path / "val") == [
        ("class", "class 1 (1)"),
        ("leak", "shard-000.tar: a"),
    ]
    assert kinds(capsys, tmp_path / "train") == [("class", "class 1 (1)")]
    assert kinds(capsys, tmp_path / "val") == []


def test_shards_of_one_split_in_two_folders_are_one_split(tmp_path, capsys):
    for number, folder in enumerate(("first", "second")):
        made(tmp_path / folder, 2, train=[*sample(f"a{number}", 1, 0), *sample(f"b{number}", 2 + number, 1)])
    assert kinds(capsys, tmp_path / "first", tmp_path / "second") == []


@pytest.mark.parametrize("first, second", [("train-0-of-2", "train-1-of-2"), ("train_00000_of_00002", "train_00001_of_00002")])
def test_a_number_of_shards_in_a_name_is_no_split(tmp_path, capsys, first, second):
    tar(tmp_path / "own" / f"{first}.tar", *sample("a", 1, 0))
    tar(tmp_path / "own" / f"{second}.tar", *sample("b", 1, 0))
    assert ended(index, capsys, tmp_path / "own")[0] == 0
    assert kinds(capsys, tmp_path / "own") == []
    assert list(json.loads(ended(verify, capsys, tmp_path / "own", "--json")[1])["splits"]) == ["train"]


def test_training_shards_are_known_by_a_word_of_their_name(tmp_path, capsys):
    tar(tmp_path / "own" / "imagenet1k-train-0000.tar", *sample("a", 1, 0), *sample("b", 2, 2))
    tar(tmp_path / "own" / "imagenet1k-val-0000.tar", *sample("c", 3, 1))
    assert ended(index, capsys, tmp_path / "own")[0] == 0
    assert kinds(capsys, tmp_path / "own") == [("class", "class 1 (1)")]


def test_two_indices_with_different_class_names_are_found(tmp_path, capsys):
    train = made(tmp_path / "a", 2, train=[*sample("a", 1, 0), *sample("b", 2, 1)])
    val = made(tmp_path / "b", 2, val=sample("c", 3, 1))
    assert kinds(capsys, train, val) == []
    for names, said in ((["name 1", "name 0"], "calls class 0 'name 1', "), (["name 0", "name 1", "more"], "names 3 classes, ")):
        name_classes(val, names)
        ((kind, where, what),) = findings(capsys, train, val)
        assert (kind, where) == ("class", "index.json") and what.startswith(said) and "a/index.json" in what
    # Of the numbers that an index has without --classes there are as many as its own labels need.
    name_classes(val, ["0"])
    assert kinds(capsys, val, train) == []


def test_an_index_does_not_keep_outdated_numbers_of_classes(tmp_path, capsys):
    folder = tmp_path / "own"
    tar(folder / "train-0.tar", *sample("a", 1, 3))
    tar(folder / "val-0.tar", *sample("b", 2, 1))
    for pattern, count in (("val-*.tar", 2), ("*.tar", 4), ("val-*.tar", 4)):
        assert ended(index, capsys, f"{folder}/{pattern}")[0] == 0
        assert json.loads((folder / "index.json").read_text())["classes"] == list(map(str, range(count)))
    (folder / "train-0.tar").unlink()
    assert ended(index, capsys, folder)[0] == 0
    assert json.loads((folder / "index.json").read_text())["classes"] == ["0", "1"]


def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, capsys):
    path, names = tar(tmp_path / "own" / "a.tar", *sample("a", 1, 0), *sample("b", 2, 2)), tmp_path / "names.txt"
    for content, said in (
        (b"cat\ndog\n", f"{names}: names 2 classes, but {path}: b has label 2"),
        (b"cat\n\ndog\nowl", f"{names}: line 2 is empty"),
        (b"\ncat\ndog\nowl", f"{names}: line 1 is empty"),
        (b"cat\nM\xf6we\nowl", f"{names}: not UTF-8 text (at byte 5)"),
        (b"\n", f"{names}: holds no name"),
    ):
        names.write_bytes(content)
        code, _, err = ended(index, capsys, path, "--classes", names)
        assert code == 2 and said in err and not (tmp_path / "own" / "index.json").exists()
    names.write_text("cat\ndog\nowl\n\n")
    assert ended(index, capsys, path, "--classes", names)[0] == 0
    assert json.loads((tmp_path / "own" / "index.json").read_text())["classes"] == ["cat", "dog", "owl"]
    tar(path, *sample("a", 1, 3))
    code, _, err = ended(index, capsys, path)
    assert code == 2 and "index.json: names 3 classes, but" in err and "by --classes" in err


def test_classes_of_uneven_size_are_reported_and_counted(tmp_path, capsys):
    members = [member for number in range(21) for member in sample(f"{number:02}", number, 1 if number else 0)]
    made(tmp_path / "own", classes=2, train=members)
    code, out, _ = ended(verify, capsys, tmp_path / "own")
    assert code == 0 and "train: 1 samples of class 0 (name 0), 20 of class 1 (name 1)" in out
    _, out, _ = ended(verify, capsys, tmp_path / "own", "--json")
    assert json.loads(out)["splits"]["train"]["class_counts"] == [1, 20]
