"""Benchmarks run: one tiny cell of the comparison of learned architectures with their baselines."""

import json
import runpy
import sys

CELL = [
    *("--networks", "vgg", "--budgets", "0.5", "--seeds", "0", "--methods", "learned", "l1", "--only", "vgg", "0"),
    *("phases.pretrain.steps=2", "phases.search.steps=4", "phases.finetune.steps=2", "data.global_batch=32", "data.workers=0"),
    *("architecture.recalibration_batches=2", "tracking.plots=false"),
]


def test_a_cell_of_the_pareto_benchmark_meets_its_budget(digits, tmp_path, monkeypatch):
    shards = [f"data.{split}={digits}/{split}-*.tar" for split in ("train", "val")]
    monkeypatch.setattr(sys, "argv", ["pareto.py", *CELL, *shards, "--output", str(tmp_path)])
    monkeypatch.syspath_prepend("benchmarks")
    runpy.run_path("benchmarks/pareto.py", run_name="__main__")
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in results] == ["full", "learned", "l1"]
    assert {r["steps"] for r in results} == {8} and all(0 <= r["accuracy"] <= 1 for r in results)
    assert all(0.495 * r["full_macs"] <= r["macs"] <= 0.5 * r["full_macs"] for r in results[1:])
