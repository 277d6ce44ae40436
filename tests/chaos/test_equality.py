"""The comparison of two run folders finds what differs, and nothing that may."""

import json
import shutil
from pathlib import Path

import pytest

from dnal_dist.chaos import campaign, equality

# --- the comparison, without processes


def record(kind: str, global_step: int, **values) -> dict:
    return {"kind": kind, "time": 1.5 * global_step, "global_step": global_step} | values


WHOLE = [
    record("start", 0, world_size=1),
    record("train", 1, step=1, phase="search", loss=1.0, images_per_second=9.0),
    record("receipt", 2, epoch=0, batches=2, samples=8, digest="ab", ordered="cd", skipped=[]),
    record("eval", 2, step=2, phase="search", accuracy=0.75),
    record("end", 2, images=8, seconds=3.0),
]


@pytest.fixture
def whole(tmp_path):
    return made(tmp_path / "whole", WHOLE)


def made(folder: Path, records: list[dict], weights: bytes = b"weights") -> Path:
    (folder / "compact").mkdir(parents=True)
    (folder / "compact" / "weights.safetensors").write_bytes(weights)
    (folder / "compact" / "architecture.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def changed(number: int, **values) -> list[dict]:
    return [one | values if at == number else one for at, one in enumerate(WHOLE)]


def test_equal_runs_may_differ_in_time_and_interruptions(whole, tmp_path):
    records = [one | {"time": 0.0} for one in changed(1, images_per_second=1.0)]
    records[2:2] = [record("start", 1, world_size=2), record("warning", 1, message="a"), record("checkpoint", 1)]
    assert equality.same(made(tmp_path / "run", records), whole) == []


@pytest.mark.parametrize(
    "records, message",
    [
        (changed(1, loss=1.0 + 1e-9), "record 0: train at step 1: loss 1.000000001 for 1.0"),
        (changed(2, ordered="dc"), "record 1: receipt at step 2: ordered 'dc' for 'cd'"),
        (WHOLE[:-1], "3 records of training, expected 4"),
        ([*WHOLE, WHOLE[-1]], "5 records of training, expected 4"),
        ([WHOLE[1], *WHOLE], "record 1: train at step 1: "),
    ],
)
def test_equal_runs_may_not_differ_in_training(whole, tmp_path, records, message):
    (found,) = equality.same(made(tmp_path / "run", records), whole)
    assert found.startswith(message)


def test_differing_weights_and_broken_records_are_found(whole, tmp_path):
    assert equality.same(made(tmp_path / "run", WHOLE, b"weight5"), whole) == [
        "compact/weights.safetensors is not that of the uninterrupted run"
    ]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 6 is no record"):
        equality.training_records(tmp_path / "run")


@pytest.mark.parametrize("line, message", [("{}", "KeyError: 'kind'"), ("3", "TypeError: ")])
def test_a_line_that_is_no_record_fails_the_comparison(whole, tmp_path, line, message):
    run = made(tmp_path / "run", WHOLE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    (finding,) = campaign.compare(run, whole, None)
    assert message in finding


@pytest.mark.parametrize(
    "records, message",
    [
        (changed(1, loss=2.0), None),
        (changed(3, accuracy=0.74), None),
        (changed(3, accuracy=0.7), "accuracy 70.00%, of the uninterrupted run 75.00%"),
        (changed(2, digest="ba"), "the samples and their order are not"),
        (changed(1, step=2), "the recorded steps are not"),
    ],
)
def test_runs_on_different_numbers_of_processes_are_alike(whole, tmp_path, records, message):
    found = equality.alike(made(tmp_path / "run", records), whole, 0.02)
    assert (found == []) if message is None else found[0].startswith(message)
    shutil.rmtree(tmp_path / "run")
