"""The doctor's checks of shards, run folder and disk, each with a fault that it must find."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from examining import found
from faulty import samples, truncate, write_tar
from filelock import FileLock
from runs import SHORT
from servers import FileServer, without_proxies

from dnal_dist.doctor import data, disk, network

TAYLOR = ("architecture.criterion=taylor", "architecture.target.macs=0.5x")


@pytest.fixture
def copy(digits, tmp_path):
    return Path(shutil.copytree(digits, tmp_path / "copy"))


# --- data


def test_intact_shards_pass(case_of):
    found(data.train_shards, case_of(), "pass", "4 shards, 1 442 samples, 22 steps of 64 an epoch, with their index")
    found(data.val_shards, case_of(nodes=2, processes=4), "pass", "2 shards, 355 samples")
    found(data.labels, case_of(), "pass", "train: 10 of 10 classes, labels 0 to 9, in 512 samples read")
    found(data.images, case_of(), "pass", "train: 32 decoded to 8x8")
    found(data.cache, case_of(), "pass", "no remote shards")


def test_missing_shards_fail_once_by_cause(case_of, tmp_path):
    case = case_of(f"data.train={tmp_path}/*.tar")
    found(data.train_shards, case, "fail", "key 'data.train': no shard matches", "correct the pattern")
    found(data.labels, case, "fail", "shards of data.train", "correct key 'data.train'")
    found(data.images, case, "fail", "shards of data.train", "correct key 'data.train'")


@pytest.mark.parametrize(
    ("change", "facts", "words", "remedy"),
    [
        ("data.global_batch=5000", {}, "a step takes 5000 images, but 'data.train' holds 1442", "lower it or add shards"),
        (
            "data.global_batch=64",
            {"nodes": 3, "processes": 8},
            "64 images cannot be divided evenly among 24",
            "nearest that can is 72",
        ),
        ("phases.search.weight_steps=2000", {}, "no gate would ever move", "lower it"),
    ],
)
def test_too_few_samples_for_a_step_fail(case_of, change, facts, words, remedy):
    found(data.train_shards, case_of(change, **facts), "fail", words, remedy)


def test_more_loaders_than_batches_warn(case_of):
    found(
        data.train_shards, case_of("data.global_batch=400", "data.workers=8"), "warn", "fewer than loader", "'data.workers' from 8"
    )


def test_shards_without_an_index_warn(case_of, folder):
    found(
        data.train_shards,
        case_of(f"data.train={folder}/train-0.tar", "data.global_batch=8"),
        "warn",
        "no index",
        "data_tools.index",
    )


def test_a_truncated_shard_fails(case_of, copy):
    path = copy / "train-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    found(data.train_shards, case_of(f"data.train={copy}/train-*.tar"), "fail", "samples are lost", "copy it again")


def test_a_shard_longer_than_its_index_fails(case_of, copy):
    with (copy / "train-000001.tar").open("ab") as file:
        file.write(b"more")
    found(data.train_shards, case_of(f"data.train={copy}/train-*.tar"), "fail", "index.json says", "make or copy the shard again")


def test_labels_out_of_range_fail_or_warn_by_the_tolerated_fraction(case_of, folder):
    found(
        data.labels,
        case_of("model.num_classes=5"),
        "fail",
        "names 10 classes, the network has 5",
        "'model.num_classes' to 10",
    )
    # Without names in an index, by the labels themselves.
    few = (f"data.train={folder}/train-0.tar", f"data.val={folder}/val-0.tar", "data.global_batch=8")
    found(data.labels, case_of(*few, "model.num_classes=5"), "fail", "is out of range", "raise key 'model.num_classes' above 4")
    found(data.labels, case_of(*few), "pass", "10 of 10 classes")
    tolerant = case_of(*few, "model.num_classes=5", "data.max_bad_fraction=1")
    found(data.labels, tolerant, "warn", "is out of range", "model.num_classes")


def test_an_unusable_image_fails(case_of, folder):
    write_tar(folder / "train-0.tar", samples(_15_png=b"no image"))
    few = (f"data.train={folder}/train-0.tar", f"data.val={folder}/val-0.tar", "data.global_batch=8")
    found(data.images, case_of(*few), "fail", f"{folder}/train-0.tar at byte", "data_tools.verify --decode")
    truncate(folder / "val-0.tar", "15.png", 520)
    write_tar(folder / "train-0.tar", samples())
    found(data.images, case_of(*few), "fail", "data.val: one of 1 images is unusable", "data.max_bad_fraction")


def test_remote_shards_are_read_in_part_and_not_copied(case_of, tmp_path, digits, monkeypatch):
    without_proxies(monkeypatch)
    with FileServer() as server:
        server.files = {path.name: path.read_bytes() for path in digits.iterdir()}
        wanted = [f"data.{key}={server.url}/{key}-*.tar" for key in ("train", "val")]
        case = case_of(*wanted, f"data.cache={tmp_path}/cache")
        found(data.train_shards, case, "pass", "1 442 samples")
        found(data.images, case, "pass", "train: 4 decoded")
        found(data.cache, case, "pass", f"in {tmp_path}/cache, 0 B are there")
        assert not (tmp_path / "cache").exists()
        assert all(sent < len(server.files[path]) / 4 for path, sent in server.sent.items() if path.endswith(".tar"))


# --- the run folder and its disk


@pytest.mark.parametrize(
    ("changes", "record", "status", "words", "remedy"),
    [
        ((), None, "pass", "not known yet", ""),
        ((), {"batches": 40, "significant": 0.5}, "pass", "50.0% of the gates", ""),
        ((), {"batches": 40, "significant": 0.07}, "warn", "saw little: the gradients of 7.0%", "criterion=taylor"),
        (("phases.search.optimizer.lr=0.005",), None, "warn", "'phases.search.optimizer.lr' is 0.005", "optimizer.lr=0.05"),
        (("phases.search.optimizer.lr=0.005", "phases.pretrain.epochs=0"), None, "pass", "not known yet", ""),
        (TAYLOR, {"batches": 40, "significant": 0.07}, "pass", "no alphas", ""),
    ],
)
def test_a_search_that_would_see_little_warns(case_of, changes, record, status, words, remedy):
    case = case_of(*changes)
    if record is not None:
        case.folder.mkdir(parents=True)
        line = {"kind": "signal", "time": 1.0, "phase": "search", "step": 80, "global_step": 80, **record}
        (case.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found(network.signal, case, status, words, remedy)


def test_a_new_run_folder_passes_and_is_not_created(case_of, tmp_path):
    before = sorted(tmp_path.rglob("*")), tmp_path.stat().st_mtime_ns
    for check, words in ((disk.run_folder, "starts there"), (disk.disk, "are free")):
        found(check, case_of(), "pass", words)
    assert before == (sorted(tmp_path.rglob("*")), tmp_path.stat().st_mtime_ns)
    found(disk.saving, case_of(), "pass", "to write and to read back")
    assert before[0] == sorted(tmp_path.rglob("*"))


def test_an_output_that_cannot_be_written_fails(case_of, tmp_path):
    (tmp_path / "file").touch()
    found(disk.run_folder, case_of(f"output={tmp_path}/file"), "fail", "is not a folder", "key 'output'")
    for place in (f"{tmp_path}/file/run", "/proc/run"):
        found(disk.run_folder, case_of(f"output={place}"), "fail", "cannot be written", "key 'output'")


def test_a_run_folder_is_read_and_left_unchanged(case_of, digits, short):
    own = [f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar", f"output={short}", *SHORT]
    found(disk.run_folder, case_of(*own), "warn", "holds this run, finished", "remove the folder (outside of SLURM: --over")
    found(
        disk.run_folder,
        case_of(*own, "seed=4"),
        "fail",
        "the recipe has changed since the run began: - seed: 0 + seed: 4",
        "--overwrite",
    )
    shutil.rmtree(short / "checkpoints" / "step-00000012-done")
    found(disk.run_folder, case_of(*own), "pass", "resumes in finetune after 0 of its steps")
    found(disk.run_folder, case_of(*own, "seed=4"), "fail", "the recipe has changed", "--overwrite")
    (short / "stop").touch()
    found(disk.run_folder, case_of(*own), "fail", "would stop at its first step", f"rm {short}/stop")
    (short / "stop").write_text("asked for by job 12_3\n")
    found(disk.run_folder, case_of(*own), "pass", "resumes in finetune")
    (short / "stop").unlink()
    before = {path: path.stat().st_mtime_ns for path in (short, *short.rglob("*"))}
    with FileLock(short / ".lock"):
        found(disk.run_folder, case_of(*own), "fail", "another process trains", "wait for its end")
    found(disk.saving, case_of(*own), "pass", "")
    assert before == {path: path.stat().st_mtime_ns for path in (short, *short.rglob("*"))}
    (short / "metrics.jsonl").unlink()
    found(disk.run_folder, case_of(*own), "fail", "it may not be a run's", "name another folder")


def test_a_full_disk_fails(case_of, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        found(disk.disk, case_of(f"output={small}/run"), "fail", "1.05 MB are free", "checkpoint.keep.last")
        found(disk.saving, case_of(f"output={small}/run"), "fail", "no room for two checkpoints", "make room")
        assert not any(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_checkpoint_time_is_compared_with_the_time_limit(case_of, monkeypatch):
    found(disk.saving, case_of(seconds=30), "fail", "the time limit is 30.0 s: too little to start", "--time of more than")
    found(disk.saving, case_of(seconds=1200), "warn", "loses up to 15 minutes", "checkpoint.every_minutes=2")
    found(disk.saving, case_of(seconds=36_000), "pass", "the time limit is 10 h 00 min")
    found(disk.saving, case_of("checkpoint.every_minutes=1e-6"), "warn", "one every 1e-06 minutes", "checkpoint.every_minutes=1")
    found(disk.saving, case_of("checkpoint.every_minutes=null"), "warn", "a kill loses up to an epoch", "set key")
    found(disk.saving, case_of(grace=300), "pass", "to write and to read back")
    monkeypatch.setattr(disk, "MEASURED", 1 << 20)
    found(disk.saving, case_of(), "pass", "MB of a checkpoint's 2.32 MB took")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    found(disk.saving, case_of(), "fail", "too little to start", "--time")


@pytest.mark.parametrize(
    ("grace", "seconds", "status"), [(300, 130, "pass"), (300, 140, "fail"), (40, 12, "pass"), (40, 13, "fail")]
)
def test_the_grace_has_room_for_two_checkpoints(case_of, grace, seconds, status):
    """Less what the batch script keeps: 30 s, of a short grace a quarter."""
    found = disk.within_limits(case_of(grace=grace), seconds, "one")
    assert found.status == status and ("too little" in found.found) == (status == "fail"), found
    if status == "fail":
        least = int(found.remedy.split()[1].rstrip(","))
        assert found.remedy.startswith("--grace ") and disk.within_limits(case_of(grace=least), seconds, "one").status == "pass"
