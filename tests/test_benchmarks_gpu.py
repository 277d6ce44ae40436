"""The benchmark of steps on the CPU at tiny sizes: its parts write rows, and the published formulation computes what ours does."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets import cost

sys.path.append("benchmarks")
import stepping
import tables
from formulation import Formulation, Trainer
from subject import Case, Subject


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits", "supernet_digits", "mobilenetv2_cifar", "resnet50_imagenet"])
def test_the_published_formulation_computes_what_ours_does(name):
    subject = Subject(Case(name, 4, 16, 0.25))
    assert max(subject.difference.values()) < 1e-9
    macs = [cost.count(subject.network, 16, keep).macs for keep in (subject.keep, None)]
    # At this width what has no gates is a quarter of ResNet50's.
    assert 0.1 < macs[0] / macs[1] <= (0.3 if name == "resnet50_imagenet" else 0.15)


def test_a_formulation_that_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr("formulation.Unit.delta", 1.5)
    monkeypatch.setattr(Formulation, "set_gates", lambda self, gates, delta=1.0: [setattr(u, "gates", gates) for u in self.sites])
    with pytest.raises(ValueError, match="differ"):
        Subject(Case("vgg_digits", 4, 8, 0.25))


def test_a_step_of_the_formulation_moves_one_group():
    torch.manual_seed(0)
    for step, moving in (
        ("pretrain", "weights"),
        ("search weights", "weights"),
        ("architecture", "alphas"),
        ("finetune", "weights"),
    ):
        network = Formulation(nets.build("vgg_digits", width=0.25))
        before = {group: [p.detach().clone() for p in getattr(network, group)()] for group in ("weights", "alphas")}
        Trainer(network, step)(torch.randn(4, 3, 8, 8), torch.arange(4))
        for group, old in before.items():
            same = [torch.equal(a, b) for a, b in zip(old, getattr(network, group)(), strict=True)]
            assert not any(same) if group == moving else all(same)


def test_a_failure_costs_one_row_with_its_reason(monkeypatch):
    # A contender sets them for its process.
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    rows: list[dict] = []
    subject = Subject(Case("vgg_digits", 4, 8, 0.25))
    ways = [stepping.Way(precision="fp32", layout="contiguous"), stepping.Way(layout="diagonal"), stepping.Way(mode="graphs")]
    stepping.measure(subject, "pretrain", ways, rows.append, "cpu", 0.01, 1)
    wrong, graphs, good = rows
    assert "diagonal" in wrong["traceback"] and wrong["failed"] and graphs["failed"] == "needs a GPU"
    assert good["images_per_second"] > 0 and good["steps"] == 2


def test_the_table_has_fractions_of_the_machine_and_names_what_failed(tmp_path):
    case = {"network": "proxyless_supernet", "batch": 96, "image_size": 224, "width": 1.0, "step": "finetune"}
    ours = {**case, "who": "ours", "precision": "bf16", "layout": "channels_last", "mode": "eager", "cudnn_benchmark": False}
    theirs = {**ours, "who": "formulation", "precision": "tf32", "layout": "contiguous"}
    files = {
        "machine": [
            {"what": "copy on the device", "bytes_per_second": 4e12},
            {"what": "matrix product", "precision": "bf16", "macs_per_second": 4e14},
        ],
        "work": [{**case, "who": "ours", "activations_each": 10**9, "others": 10**9, "macs_each": 10**9}],
        "steps": [
            {**ours, "ms": 100.0, "memory_bytes": 10**9},
            {**theirs, "ms": 300.0},
            {**ours, "mode": "graphs", "failed": "RuntimeError: a | b", "traceback": "Traceback\n  why"},
        ],
        "loader": [{"workers": 1, "stream_images_per_second": 5.0}, {"workers": 2, "failed": "needs a GPU"}],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"device": "X"}, "rows": rows}))
    done = {"status": "done", "seconds": 1.0}
    results = {
        "steps": done,
        "loader": done,
        "gone": {"status": "failed", "errors": "Segmentation fault"},
        "late": {"status": "not run"},
    }
    tables.write_results(tmp_path, results)
    text = (tmp_path / "results.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if "| 100.0 |" in line]
    # (2 * 96e9 + 4e9) bytes and 96e9 MACs in 0.1 s.
    assert row[8:12] == ["100.0", "1.00", "3.0", "49%"]
    assert "RuntimeError: a / b" in text and "  why" in text and "needs a GPU" in text and "Segmentation fault" in text


def test_parts_run_in_processes_of_their_own_and_write_their_results(tmp_path):
    command = ["benchmarks/gpu.py", "--device", "cpu", "--minutes", "1.5", str(tmp_path), "--only", "cifar"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cifar.json").read_text())["rows"]
    timed = [row for row in rows if "ms" in row]
    assert {row["who"] for row in timed} == {"ours", "formulation"} and {row["step"] for row in timed} == set(stepping.STEPS)
    assert all(row["difference"] < 1e-9 for row in timed)
    text = (tmp_path / "results.md").read_text()
    assert "x published" in text and "Whole schedules" in text and "needs a GPU" in text
