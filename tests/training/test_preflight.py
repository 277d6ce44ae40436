"""A network has as many classes as the indices of its shards name, and all of them number the classes alike."""

import json
from pathlib import Path

import pytest
from examining import found
from faulty import records, refused, samples, write_index, write_tar
from in_process import called

from dnal_dist import cost
from dnal_dist.doctor import data


def name(folder: Path, *names: str) -> None:
    """Give the index in `folder`, of all its shards, these names of the classes."""
    write_index(folder, *sorted(path.name for path in folder.glob("*.tar")))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"classes": names}))


@pytest.fixture
def apart(folder):
    """Changes of a recipe whose splits lie in folders, and so have indices, of their own."""
    for split in ("train", "val"):
        (folder / split).mkdir()
        write_tar(folder / split / "0.tar", samples())
    return [f"data.train={folder}/train/*.tar", f"data.val={folder}/val/*.tar", "data.global_batch=8"]


def test_more_classes_than_the_index_names_are_a_warning_of_training_doctor_and_costs(train, folder, case_of, capsys):
    name(folder, *(f"class {n}" for n in range(10)))
    assert train("model.num_classes=12").code == 0
    message = "the index of data.train names 10 classes, the network has 12, some of which are never right"
    assert [one["message"].partition(";")[0] for one in records(folder, "warning")].count(message) == 1
    shards = [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar"]
    case = case_of(*shards, "data.global_batch=8", "model.num_classes=12")
    found(data.labels, case, "warn", message, "set 'model.num_classes' to 10, or correct the index")
    code, _, err = called(cost.main, capsys, "digits", *shards, "model.num_classes=1000", "--json")
    assert code == 0 and err.count("names 10 classes, the network has 1000") == 1


def test_an_index_without_names_says_nothing_of_classes_that_it_lacks(train, folder, case_of, apart):
    """It counts the labels of its own shards."""
    name(folder / "train", *map(str, range(10)))
    name(folder / "val", *map(str, range(7)))
    found(data.labels, case_of(*apart), "pass", "10 of 10 classes")
    assert train(*apart).code == 0
    assert not [one for one in records(folder, "warning") if "classes" in one["message"]]


def test_fewer_classes_are_refused(train, folder):
    name(folder, *(f"class {n}" for n in range(11)))
    refused(train(), "the index of data.train names 11 classes, the network has 10; set 'model.num_classes' to 11")
    assert not (folder / "run").exists()


def test_splits_that_number_the_classes_differently_are_refused(train, folder, case_of, apart):
    names = [f"class {n}" for n in range(10)]
    name(folder / "train", *names)
    name(folder / "val", *names[::-1])
    message = f"{folder}/val/index.json: calls class 0 'class 9', {folder}/train/index.json calls it 'class 0'"
    refused(train(*apart), message)
    assert not (folder / "run").exists()
    found(data.labels, case_of(*apart), "fail", message, "make them with the classes in one order")
