"""What a run tells of its phases' cost, its gates and the place it took place in."""

import json
import subprocess
from types import SimpleNamespace

import pynvml
import pytest
import torch
from runs import SHORT, arguments, records

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import RunState
from dnal_dist.common import atomic
from dnal_dist.recipe import Keep
from dnal_dist.tracking import environment
from dnal_dist.training import usage
from dnal_dist.training.metrics import total_bytes
from dnal_dist.training.profiling import Breakdown
from dnal_dist.training.stopping import STOPPED


def test_each_phase_and_the_end_record_their_usage(finished):
    recorded = {r["phase"]: r for r in records(finished, "phase")}
    assert list(recorded) == ["pretrain", "search", "prune", "finetune"]
    assert {phase: r["images"] for phase, r in recorded.items()} == {"pretrain": 64, "search": 64, "prune": 0, "finetune": 64}
    for record in recorded.values():
        # One process on a CPU: nothing is sent, and no device tells its energy.
        assert record["device_seconds"] == pytest.approx(record["seconds"], abs=0.002)
        assert record.keys().isdisjoint(("bytes_sent", "energy_kwh"))
    (end,) = records(finished, "end")
    kept = ("seconds", "images", "device_seconds")
    assert end["ledger"] == {phase: {key: r[key] for key in kept} for phase, r in recorded.items()}
    assert end["phase_seconds"] == {phase: r["seconds"] for phase, r in recorded.items()}


def test_gates_are_counted_site_by_site(finished):
    (start,) = records(finished, "start")
    recorded = records(finished, "gates")
    assert recorded
    for record in recorded:
        assert list(record["by_site"]) == list(start["sites"])
        assert {site: sum(counts) for site, counts in record["by_site"].items()} == start["sites"]
        # Two of the 20 bins of all sites together are one of each site's.
        pairs = [a + b for a, b in zip(record["histogram"][::2], record["histogram"][1::2], strict=True)]
        assert [sum(column) for column in zip(*record["by_site"].values(), strict=True)] == pairs


def test_the_start_records_its_environment(finished, monkeypatch):
    (start,) = records(finished, "start")
    assert start["host"] and start["environment"]["os"]
    assert "slurm_job" not in start and "cuda" not in start["environment"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert environment.facts(torch.device("cpu"))["slurm_job"] == "17"


def test_the_code_is_the_commit_of_its_own_checkout(tmp_path):
    def git(*command: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *names, *command], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert environment.code(tmp_path) == commit
    # What lies in a checkout of something else is not that.
    assert environment.code(tmp_path / "package") is None
    (tmp_path / "package" / "code.py").write_text("2")
    assert environment.code(tmp_path) == f"{commit}+"


def test_energy_is_that_of_all_devices_or_absent(monkeypatch):
    device = SimpleNamespace(type="cuda")
    context = SimpleNamespace(device=device, sum_=lambda tensor: 2 * tensor)
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: tensor(values, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: {"GPU-1-2": 5}[name])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: handle * 1_000_000)
    assert usage.joules(context) == 2 * 5_000

    def refuse(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert usage.joules(context) is None


def test_a_clock_continues_the_usage_before_a_resume(monkeypatch):
    recipe = SimpleNamespace(data=SimpleNamespace(global_batch=10))
    state = RunState(phase="search", step=0, global_step=0)
    run = SimpleNamespace(state=state, recipe=recipe, context=SimpleNamespace(world_size=2, device=None), breakdown=Breakdown())
    used, now = iter([1e6, 1e6 + 3.6e6, 5.0, 5.0 + 7.2e6, 0.0, None]), iter([0.0, 10.0, 100.0, 105.0, 200.0, 201.0])
    monkeypatch.setattr(usage, "joules", lambda context: next(used))
    monkeypatch.setattr(usage.time, "monotonic", lambda: next(now))
    clock = usage.Clock(run)
    run.state.step = 3
    clock.record()
    assert usage.summary(run.state, "search") == {
        "seconds": 10,
        "images": 30,
        "device_seconds": 20,
        "energy_kwh": pytest.approx(1.0),
    }
    # Another number of processes, on another machine, with another batch.
    run.context.world_size, recipe.data.global_batch = 4, 20
    clock = usage.Clock(run)
    run.state.step = 5
    clock.record(77)
    spent = {"seconds": 15, "images": 70, "device_seconds": 40, "energy_kwh": pytest.approx(3.0), "bytes_sent": 77}
    assert usage.summary(run.state, "search") == spent
    # What a part of a phase used is not known, so the whole is not.
    clock = usage.Clock(run)
    clock.record()
    assert "energy_kwh" not in usage.summary(run.state, "search") and run.state.seconds["search"] == 16


def test_bytes_are_those_of_all_steps_or_absent():
    assert total_bytes(100, {"weight": 3, "architecture": 1}, {"weight": 20, "architecture": 4, "more": 1}) == 164
    assert total_bytes(0, {}, {}) == 0
    assert total_bytes(0, {"weight": 3}, {}) is None
    assert total_bytes(None, {}, {}) is None


def test_a_checkpoint_of_an_earlier_release_is_resumed(train_here, digits, tmp_path, monkeypatch):
    """It lacks what came later; the phases that it has behind it have no usage, and the one it stands in from its images on."""
    run = tmp_path / "run"
    assert train_here(*arguments(digits, run, *SHORT), "checkpoint.every_steps=1", "--max-time=1s").code == STOPPED
    path, (tensors, state), _ = checkpoint.latest(run / "checkpoints")
    assert state.step > 0 and state.phase == "pretrain"
    atomic.remove(path)
    old = json.loads(state.model_dump_json(exclude={"usage": True, "metrics": {"steps", "sent"}}))
    assert "spent" not in old and "steps" not in old["meter"]
    later = RunState.model_dump_json

    def without(self, **others):
        return later(self, exclude={"usage": True, "metrics": {"steps", "sent"}}, **others)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "model_dump_json", without)
        checkpoint.write(run / "checkpoints", checkpoint.Checkpoint(tensors, RunState(**old)), Keep(last=9, best=0))
    assert '"spent"' not in (path / "state.json").read_text()
    assert train_here(*arguments(digits, run, *SHORT)).code == 0
    assert [r["images"] for r in records(run, "phase")] == [64, 64, 0, 64]
