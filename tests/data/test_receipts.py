"""Receipts of epochs: equal on any topology and across stops; an audit that sees whatever is not right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import png, samples, write_tar

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.data.receipts import Receipt, tally, without
from dnal_dist.training.audit import Taken, audit

SHORT = ("phases.pretrain.steps=17", "phases.search.epochs=1", "phases.finetune.steps=20")
SHORT += ("tracking.tracker=none", "data.global_batch=48", "tracking.plots=false", "architecture.recalibration_batches=2")


def receipts(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k != "time"} for one in found if one["kind"] == "receipt"]


@pytest.fixture
def proven(capsys, monkeypatch):
    """The audit's exit code and what it prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(folder: Path) -> tuple[int, str]:
        capsys.readouterr()
        return audit(folder), capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory) -> tuple[str, ...]:
    """Half of the digits, with two samples of train-000002 that cannot be used, as overrides of a recipe."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(digits, folder, dirs_exist_ok=True)
    with (folder / "train-000002.tar").open("r+b") as file:
        for offset in json.loads((folder / "index.json").read_text())["shards"][2]["offsets"][10:12]:
            file.seek(offset + 512)
            file.write(b"no PNG any more")
    return f"data.train={folder}/train-00000[02].tar", f"data.val={folder}/val-000000.tar", "data.max_bad_fraction=0.01"


@pytest.fixture(scope="module")
def run(data, train_here, tmp_path_factory) -> Path:
    """A run of 52 iterations: three epochs of 15 and half of one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = train_here("recipes/digits.yaml", *data, *SHORT, f"output={folder}")
    assert ended.code == 0, ended.err
    return folder


def test_each_epoch_has_a_receipt(run):
    found = receipts(run)
    assert [(one["epoch"], one["batches"]) for one in found] == [(0, 15), (1, 15), (2, 15), (3, 7)]
    for one in found[:3]:
        # 721 samples, of which an epoch leaves one over.
        assert one["samples"] + len(one["skipped"]) == 720 and len(one["skipped"]) in (1, 2)
        assert all(shard == "train-000002.tar" and reason for _, shard, _, _, reason in one["skipped"])
    assert len({one["ordered"] for one in found}) == 4
    # Once, since later epochs have the same.
    assert [("class_counts" in one) for one in found] == [True, False, False, False]
    assert len(found[0]["class_counts"]) == 10 and sum(found[0]["class_counts"]) == found[0]["samples"]


def test_two_processes_and_other_workers_give_the_same_receipts(run, data, train_command, tmp_path):
    ended = train_command("recipes/digits.yaml", *data, *SHORT, f"output={tmp_path}/run", "data.workers=1", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert receipts(tmp_path / "run") == receipts(run)


def test_a_run_that_was_stopped_and_resumed_gives_the_same_receipts(run, data, train_command, tmp_path, proven):
    """Stopped in the search, in the middle of an epoch that the pretrain began; resumed on two processes from what was saved."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newest, *checkpoints = checkpoint.found(folder / "checkpoints")
    position = checkpoint.read(checkpoints[0]).state.global_step
    assert position % 15, "the checkpoint is to be in the middle of an epoch"
    shutil.rmtree(newest)
    ended = train_command("recipes/digits.yaml", *data, *SHORT, f"output={folder}", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert receipts(folder) == receipts(run)
    assert proven(folder)[0] == 0


def test_the_audit_proves_each_sample_once(run):
    command = [sys.executable, "-m", "dnal_dist.stream", "--audit", str(run)]
    proof = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=300)
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert proof.stdout.count("each sample once, in its turn") == 4
    assert "52 batches of 48, 1 samples left over in each epoch; no sample twice, none missing" in proof.stdout
    assert "2 samples were skipped" in proof.stdout and "train-000002.tar" in proof.stdout


def test_the_audit_proves_images_that_come_several_times(data, train_here, tmp_path, proven):
    """With those that cannot be used among them: of class 0 and others, which have a tenth of the share."""
    index = json.loads((Path(data[0].partition("=")[2]).parent / "index.json").read_text())
    bad = set(index["shards"][2]["labels"][10:12])
    shares = [1.0 if number in bad else 0.1 for number in range(10)]
    several = (f"data.sampling={shares}", "data.augmentation.repeats=2", f"output={tmp_path}/run", "data.max_bad_fraction=1")
    assert train_here("recipes/digits.yaml", *data[:2], *SHORT, *several, "phases.pretrain.steps=20", "--until=pretrain").code == 0
    (first, *_) = receipts(tmp_path / "run")
    assert first["samples"] + len(first["skipped"]) == 720 and len(first["skipped"]) > 2
    assert min(first["class_counts"][number] for number in bad) > 2 * max(first["class_counts"][n] for n in set(range(10)) - bad)
    code, said = proven(tmp_path / "run")
    assert code == 0 and "no sample too often, none missing" in said


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda r: [r[0], r[2], r[3]], "expected the receipt of epoch 1"),
        (lambda r: [r[0], r[0], *r[2:]], "expected the receipt of epoch 1"),
        (lambda r: [r[0], r[1] | {"digest": r[2]["digest"]}, *r[2:]], "other samples than the epoch's"),
        (lambda r: [r[0] | {"ordered": r[1]["ordered"]}, *r[1:]], "in another order"),
        (lambda r: [r[0] | {"samples": r[0]["samples"] - 1}, *r[1:]], "samples and"),
        (lambda r: [r[0] | {"skipped": r[0]["skipped"][1:]}, *r[1:]], "samples and"),
        (lambda r: [r[0] | {"skipped": [[7, "train-000000.tar", 7, "x", "y"], *r[0]["skipped"]]}, *r[1:]], "samples and"),
        (lambda r: [r[0] | {"skipped": [[9999, "x.tar", 7, "x", "y"], *r[0]["skipped"]]}, *r[1:]], "samples and"),
        (lambda r: r[:3], "the receipts of the last 7 iterations are missing"),
        (lambda r: r[:1], "the receipts of the last 37 iterations are missing"),
        (lambda r: [r[0] | {"batches": 14}, *r[1:]], "14 batches, expected 15"),
    ],
)
def test_the_audit_finds_every_fault(run, tmp_path, proven, fault, message):
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    others = [one for one in records if one["kind"] != "receipt"]
    changed = others + fault([one for one in records if one["kind"] == "receipt"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
    code, said = proven(tmp_path)
    assert code == 1 and message in said


@pytest.mark.parametrize(
    "changes", [{"batches": "5"}, {"batches": None}, {"skipped": None}, {"skipped": [[1]]}, {"digest": 3}, {"global_step": "x"}]
)
def test_a_damaged_record_is_one_line(run, tmp_path, changes):
    shutil.copy(run / "recipe.yaml", tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [one | changes if one["kind"] == "receipt" else one for one in records]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
    with pytest.raises(InputError, match=r"metrics\.jsonl: not a run's record \("):
        audit(tmp_path)


def test_shards_and_keys_of_one_name_are_distinguished(tmp_path, train_here, proven):
    """Two folders of shards with the same names and keys, one bad sample in each, and a key that would be markup to a terminal."""
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", samples(16, _03_png=b"") | {"q[/b].png": png(number), "q[/b].cls": b"1"})
    write_tar(tmp_path / "val.tar", samples())
    given = (f"data.train='{tmp_path}/a/x.tar {tmp_path}/b/x.tar'", f"data.val={tmp_path}/val.tar", f"output={tmp_path}/run")
    ended = train_here(
        "recipes/digits.yaml",
        *given,
        *SHORT[1:],
        "data.global_batch=17",
        "data.max_bad_fraction=1",
        "phases.pretrain.steps=3",
        "phases.finetune.steps=3",
    )
    assert ended.code == 0, ended.err
    (first, *_) = receipts(tmp_path / "run")
    assert (first["samples"], len(first["skipped"])) == (32, 2)
    assert proven(tmp_path / "run")[0] == 0


def test_the_audit_of_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.yaml: no such recipe"):
        audit(tmp_path)
    for name in ("recipe.yaml", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            audit(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(Path("recipes/digits.yaml").read_text() if name == "recipe.yaml" else "[" * 9000)
    with pytest.raises(InputError, match=r"metrics\.jsonl: holds no record yet"):
        audit(tmp_path)


def test_digests_add_up_over_processes_and_positions_matter():
    names, places = [f"s.tar/{i}" for i in range(10)], list(range(10))
    whole, part = Receipt(), [Receipt(), Receipt(), Receipt()]
    whole.take(tally(map(Taken, names, places)), 10, [])
    for i, one in enumerate(part):
        one.take(tally(map(Taken, names[i::3], places[i::3])), len(names[i::3]), [])
    packed = [one.packed() for one in part]
    part[0].settle(lambda _: packed, True, 10, 10)
    whole.settle(lambda own: own, True, 10, 10)
    assert part[0] == whole
    plain, ordered = tally(map(Taken, names, places))
    swapped = tally(map(Taken, [names[1], names[0], *names[2:]], places))
    twice = tally(map(Taken, [names[0], names[0], *names[2:]], places))
    assert swapped[0] == plain and swapped[1] != ordered
    assert twice[0] != plain
    assert without((plain, ordered), [Taken(names[3], 3)]) == tally(map(Taken, names[:3] + names[4:], places[:3] + places[4:]))
