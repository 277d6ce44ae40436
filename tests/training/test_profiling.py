"""The time breakdown of a phase adds up, and a trace shows the spans of a run."""

import gzip
import json
import threading
import time

import pytest
from runs import SHORT, SMALL, arguments, records

from dnal_dist.common.span import attached, span
from dnal_dist.training.profiling import Breakdown

PARTS = {"data_wait", "forward", "backward", "sync", "optimizer", "logging", "evaluation", "checkpoint", "other"}


def test_nested_parts_are_counted_once():
    breakdown = Breakdown()
    with attached(breakdown):
        began = time.perf_counter()
        breakdown.start()
        with span("evaluation"):
            time.sleep(0.02)
            with span("logging"):
                time.sleep(0.04)
            time.sleep(0.02)
        with span("weight step"):
            time.sleep(0.01)
        found, passed = breakdown.so_far(), time.perf_counter() - began
    assert found.keys() == PARTS
    assert found["evaluation"] >= 0.04 and found["logging"] >= 0.04 and found["other"] >= 0.01
    assert sum(found.values()) == pytest.approx(passed, abs=0.01)


def test_other_threads_do_not_count():
    breakdown = Breakdown()

    def write():
        with span("checkpoint"):
            time.sleep(0.05)

    with attached(breakdown):
        writer = threading.Thread(target=write)
        writer.start()
        writer.join()
    found = breakdown.so_far()
    assert found["checkpoint"] == 0 and found["other"] >= 0.05


def test_the_breakdown_covers_a_phase(train_here, digits, tmp_path):
    changes = [*SMALL, *(f"phases.{phase}.epochs=1" for phase in ("pretrain", "search", "finetune"))]
    ended = train_here(*arguments(digits, tmp_path / "run", *changes), report=True)
    assert ended.code == 0, ended.err
    phases = records(tmp_path / "run", "phase")
    assert [record["phase"] for record in phases] == ["pretrain", "search", "prune", "finetune"]
    table = (tmp_path / "run" / "report.md").read_text().partition("| phase | data wait | forward | backward |")[2]
    assert all(f"\n| {record['phase']} | " in table for record in phases)
    for record in phases:
        parts = record["breakdown"]
        assert parts.keys() == PARTS and min(parts.values()) >= 0
        named = sum(parts.values()) - parts["other"]
        assert named <= record["seconds"] + 0.01, record
        if record["phase"] != "prune":
            assert named > 0.6 * record["seconds"], record
            assert min(parts[part] for part in ("data_wait", "forward", "backward", "optimizer", "evaluation")) > 0
        assert (parts["sync"] > 0) <= (record["phase"] == "search")


def test_a_trace_of_each_phase_shows_its_spans(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), "--profile", "2")
    assert ended.code == 0, ended.err
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{phase}-rank0.json.gz" for phase in ("finetune", "pretrain", "search")
    ]
    for path in folder.iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
        assert names.count("data wait") == 2 and names.count("forward") == 2, path
        assert {"backward", "optimizer"} <= set(names) and ({"architecture step", "sync"} <= set(names)) == (
            path.name == "search-rank0.json.gz"
        )
        assert any(event.get("cat") == "cpu_op" for event in events)
