"""A network has as many classes as the index of its shards names."""

import json
import subprocess
import sys

from faulty import records, refused, write_index


def named(folder, number: int) -> None:
    write_index(folder, "train-0.tar", "val-0.tar")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"classes": [f"class {n}" for n in range(number)]}))


def test_more_classes_than_the_index_names_are_a_warning_of_training_and_costs(train, folder):
    named(folder, 10)
    assert train("model.num_classes=12").code == 0
    message = "names 10 classes, the network has 12"
    assert [r["message"].count(message) for r in records(folder, "warning")].count(1) == 2
    shards = [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar"]
    words = [sys.executable, "-m", "dnal_dist.cost", "digits", *shards, "model.num_classes=1000", "--json"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr.count("names 10 classes, the network has 1000") == 2


def test_fewer_classes_are_refused(train, folder):
    named(folder, 11)
    refused(train(), "the index of data.train names 11 classes, the network has 10; set 'model.num_classes' to 11")
    assert not (folder / "run").exists()
