"""Runs that an older release left behind resume, and report, as its own would."""

import json
from pathlib import Path

import pytest
from runs import records
from sources import unpack

from dnal_dist.report import outputs
from dnal_dist.report.records import summary

# Made by the last commit before the package was divided into rooms: a run stopped in its search, and the same run to its end.
ARCHIVE = Path(__file__).parent / "runs_before_rooms.tar.gz"


@pytest.fixture
def older(tmp_path):
    unpack(ARCHIVE, tmp_path)
    return tmp_path


def resumed(older: Path, train_here) -> list[dict]:
    """Records of the stopped run once it is resumed to its end."""
    recipe, run = older / "stopped" / "recipe.yaml", older / "stopped"
    places = [f"data.train={older}/data/train-*.tar", f"data.val={older}/data/val-*.tar", f"output={run}"]
    ended = train_here(recipe, *places)
    assert ended.code == 0, ended.err
    return records(run, "train", "eval", "prune", "phase", "end")


def test_a_run_of_an_older_release_resumes_to_the_end_that_it_would_have_had(older, train_here):
    found, expected = resumed(older, train_here), records(older / "finished", "train", "eval", "prune", "phase", "end")
    assert [(one["kind"], one.get("phase"), one.get("step")) for one in found] == [
        (one["kind"], one.get("phase"), one.get("step")) for one in expected
    ]
    # Sums in another order, on another processor or with another torch, change the last digits only.
    for one, other in zip(found, expected, strict=True):
        for key in ("cross_entropy", "penalty", "expected_macs", "learning_rate"):
            if other.get(key) is not None:
                assert one[key] == pytest.approx(other[key], rel=1e-3), (one, key)
    prune, expected_prune = (next(r for r in one if r["kind"] == "prune") for one in (found, expected))
    assert prune["mask"] == expected_prune["mask"] and prune["compact"] == expected_prune["compact"]


def test_a_finished_run_of_an_older_release_reports(older):
    folder = older / "finished"
    outputs.write_all(folder, draw=False)
    end = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = summary(folder)
    assert found["finished"] and found["accuracy"]["finetune"] == pytest.approx(records(folder, "eval")[-1]["accuracy"]), end
    assert "<html" in (folder / "report.html").read_text() and "25.1 %" in (folder / "report.md").read_text()
