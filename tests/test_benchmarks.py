"""Benchmarks run: one tiny cell of the comparison of learned architectures with their baselines."""

import json
import runpy
import sys

import pytest

CELL = [
    *("--methods", "learned", "taylor", "long", "l1", "l1-long", "--networks", "vgg", "--budgets", "0.5"),
    *("--seeds", "0", "--side", "8", "--epochs", "0.1", "0.2", "0.1", "--images", "320"),
    *("data.global_batch=16", "data.workers=0", "architecture.recalibration_batches=2"),
    # Extras that all methods get.
    *("phases.distillation={weight: 0.5, temperature: 2}", "phases.finetune.ema=0.9", "phases.finetune.label_smoothing=0.1"),
]


def test_a_cell_of_the_pareto_benchmark_meets_its_budget(digits, tmp_path, monkeypatch):
    own = ["pareto.py", *CELL, "--data", str(digits), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*own, "--only", "vgg", "0"])
    monkeypatch.syspath_prepend("benchmarks")
    runpy.run_path("benchmarks/pareto.py", run_name="__main__")
    found = {r["method"]: r for r in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert list(found) == ["learned", "taylor", "long", "l1", "l1-long"]
    assert all(r["milliseconds"]["64"] > 0 and 0 <= r["accuracy"] <= 1 for r in found.values())
    assert all(0.495 * r["full_macs"] <= r["macs"] <= 0.5 * r["full_macs"] for r in found.values())
    assert {r["steps"] for method, r in found.items() if "long" not in method} == {8}
    for method in ("long", "l1-long"):
        assert found[method]["training_macs"] == pytest.approx(found["learned"]["training_macs"], rel=0.06)
    assert found["l1"]["training_macs"] < found["learned"]["training_macs"]
    # All latencies again, side by side.
    monkeypatch.setattr(sys, "argv", [*own, "--time", "0.01"])
    runpy.run_path("benchmarks/pareto.py", run_name="__main__")
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r | {"milliseconds": found[r["method"]]["milliseconds"]} for r in again] == list(found.values())
    assert any(r["milliseconds"] != found[r["method"]]["milliseconds"] for r in again)
