"""`evaluate`: the counts are the training's own, in any runtime, and images that are wrong are shown."""

import json

import numpy as np
import pytest
import torch
from in_process import called
from PIL import Image
from runs import records

from dnal_dist import evaluate
from dnal_dist.data.pipeline import Batch
from dnal_dist.export.evaluation import WORST, Tally
from dnal_dist.report import evaluated


def test_a_run_s_counts_are_those_of_its_training(exported, tmp_path, capsys):
    code, out, _ = called(evaluate.main, capsys, exported, "--output", tmp_path / "found")
    last = records(exported, "eval")[-1]
    facts = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert code == 0 and "weakest classes" in out
    assert facts["top1"] == pytest.approx(last["accuracy"], abs=1e-6) and facts["top5"] == pytest.approx(last["top5"], abs=1e-6)
    assert [[row["right"], row["images"]] for row in facts["classes"]] == last["per_class"]
    confusion = np.array(facts["confusion"])
    assert confusion.sum() == facts["images"] == last["samples"]
    assert sum(row["images"] for row in facts["confused"]) <= confusion.sum() - np.trace(confusion)
    shares = [row["probability"] for row in facts["worst"]]
    assert shares == sorted(shares) and all(row["class"] != row["predicted"] for row in facts["worst"])
    assert Image.open(tmp_path / "found" / "confusion.png").width > 200
    assert Image.open(tmp_path / "found" / "worst.png").width == 8 * 128


def test_an_export_counts_the_same(exported, capsys):
    both = [called(evaluate.main, capsys, *arguments) for arguments in ([exported, "--json"], [exported / "export", "--json"])]
    one, other = (json.loads(ended.out) for ended in both)
    assert [ended.code for ended in both] == [0, 0] and (one["runtime"], other["runtime"]) == ("torch", "model.onnx")
    assert one["confusion"] == other["confusion"] and one["classes"] == other["classes"]
    page, text = (exported / "report.html").read_text(), (exported / "report.md").read_text()
    assert "Evaluation, class by class" in page and page.count('src="data:image/png;base64,') == 2
    assert "![Confusion matrix: rows are classes" in text and "](evaluation/worst.png)" in text
    assert (exported / "evaluation" / "evaluation.json").exists() and not (exported / "export" / "evaluation").exists()


def test_shards_can_be_named(exported, digits, tmp_path, capsys):
    code, out, _ = called(evaluate.main, capsys, exported, "--shards", f"{digits}/val-*.tar", "--output", tmp_path / "x", "--json")
    assert code == 0 and json.loads(out)["images"] == 355
    code, _, err = called(evaluate.main, capsys, exported, "--shards", "/nowhere/*.tar")
    assert code == 2 and err.startswith("error: key '--shards'") and err.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"images": -1, "classes": 3}', "[" * 100_000])
def test_an_evaluation_that_is_none_is_left_out_of_the_report(content, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(content)
    assert evaluated.read(tmp_path) is None and evaluated.read(tmp_path / "evaluation") is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"provenance": {"recipe": {"seed": 1}}}', "\0"])
def test_a_manifest_that_is_none_is_refused(content, exported, tmp_path, capsys):
    for name in ("preprocessing.json", "model.onnx"):
        (tmp_path / name).write_bytes((exported / "export" / name).read_bytes())
    (tmp_path / "manifest.json").write_text(content)
    code, _, err = called(evaluate.main, capsys, tmp_path)
    assert code == 2 and "manifest.json: " in err and err.count("\n") == 1


def test_parts_of_a_set_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (200, 3, 2, 2), dtype=np.uint8))
    labels, logits = torch.from_numpy(rng.integers(0, 7, 200)), rng.normal(size=(200, 7))
    keys = [f"{number:03}" for number in range(200)]

    def tally(part: slice) -> Tally:
        found = Tally(np.zeros((7, 7), dtype=np.int64))
        found.add(Batch(images[part], labels[part], labels[part] > 9, keys[part], [], (0, 0)), logits[part])
        return found

    whole, halves = tally(slice(None)), [tally(slice(0, 90)), tally(slice(90, None))]
    merged = Tally(halves[0].confusion + halves[1].confusion, halves[0].top5 + halves[1].top5)
    merged.keep([*halves[0].mistakes, *halves[1].mistakes])
    names = [f"class {number}" for number in range(7)]
    assert merged.facts(names) == whole.facts(names) and len(whole.mistakes) == WORST
