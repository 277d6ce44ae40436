"""The main job in a reduced form, by every way of starting it, and what it leaves behind."""

import json
import os
from pathlib import Path

import forks
import pytest
import torch
from wandb_read import offline

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common import errors
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.nets import compact
from dnal_dist.report import records as report_records
from dnal_dist.training import phases, setup
from dnal_dist.training.evaluate import evaluate

EPOCHS = {"pretrain": 2, "search": 5, "finetune": 2}
REDUCED = [*(f"phases.{phase}.epochs={epochs}" for phase, epochs in EPOCHS.items()), "architecture.penalty_weight=0.05"]
FEW = ["phases.pretrain.steps=2", "phases.search.steps=4", "phases.finetune.steps=2", "tracking.log_every=1"]
FEW += ["architecture.recalibration_batches=2"]


def given(digits, output, *changes: str) -> list[str]:
    return [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={output}", *changes]


def records(output, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


@pytest.fixture(scope="module")
def demo(train_command, digits, tmp_path_factory):
    """The demo on two processes, with fewer epochs."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    output = tmp_path_factory.mktemp("demo") / "run"
    changes = given(digits, output, *REDUCED, "tracking.tracker=wandb")
    return output, train_command("recipes/digits.yaml", *changes, processes=2, timeout=500, WANDB_MODE="offline")


def test_reduced_demo_learns_a_smaller_network(demo):
    output, process = demo
    assert process.returncode == 0, process.stdout + process.stderr
    found = report_records.summary(output)
    assert found["accuracy"]["finetune"] > 0.90
    assert found["compact"]["exact"]["macs"] < 0.5 * found["full"]["exact"]["macs"]
    assert not found["collapsed"]
    assert records(output, "start")[0]["world_size"] == 2


def test_demo_prints_a_line_for_each_phase_and_the_table(demo):
    lines = demo[1].stdout.splitlines()
    for phase in ("pretrain", "search", "prune", "finetune"):
        # One at its end; in a phase longer than half a minute, others before.
        assert any(line[8:].strip().startswith(phase) and " val " in line for line in lines), phase
    text = demo[1].stdout
    for word in (
        "after pretrain",
        "after search",
        "after pruning",
        "after finetune",
        "MACs",
        "channels kept",
        "report.html",
    ):
        assert word in text, word
    assert "\x1b[" not in text


def test_records_are_complete(demo):
    output, _ = demo
    steps = records(output, "start")[0]["steps_per_epoch"]
    evaluated = [r["phase"] for r in records(output, "eval")]
    assert evaluated == ["pretrain"] * 2 + ["search"] * 5 + ["prune"] + ["finetune"] * 2
    for phase, epochs in EPOCHS.items():
        recorded = [r for r in records(output, "train") if r["phase"] == phase]
        assert recorded[-1]["step"] == recorded[-1]["phase_steps"] == epochs * steps
        for r in recorded:
            assert {"loss", "cross_entropy", "accuracy", "learning_rate", "images_per_second", "data_wait_seconds"} <= r.keys()
            assert ({"delta", "open_share", "expected_macs", "penalty"} <= r.keys()) == (phase == "search")
    gates = records(output, "gates")
    # Also with each record of metrics, since the search is short.
    every = [step for step in range(EPOCHS["search"] * steps + 1) if step % steps == 0 or step % 20 == 0]
    assert [r["step"] for r in gates] == every and gates[0]["histogram"][10] == 448
    assert gates[-1]["delta"] == pytest.approx(10_000)
    hardened = gates[-1]["histogram"]
    assert hardened[0] + hardened[-1] > 0.95 * sum(hardened) == 0.95 * 448
    assert gates[-1]["open"] == records(output, "prune")[0]["kept"]


def test_compact_network_is_the_one_that_was_evaluated(demo, digits):
    output, _ = demo
    net = compact.load(output / "compact")
    settings = recipe.load(output / "recipe.yaml")
    shards = Shards(settings.data.val, "data.val", 10)
    found = evaluate(net, Stream(shards, settings.data, 0, False), settings.data, Context())
    last = records(output, "eval")[-1]
    assert found.accuracy == pytest.approx(last["accuracy"], abs=1e-6)
    assert found.cross_entropy == pytest.approx(last["cross_entropy"], rel=1e-3)
    assert sum(p.numel() for p in net.parameters()) == records(output, "prune")[0]["compact"]["exact"]["params"]


def test_layers_of_the_compact_network_are_torchs_own(demo):
    net = compact.load(demo[0] / "compact")
    assert all(type(module).__module__.startswith("torch.nn") for module in net.modules() if module is not net)


def test_accelerate_launch_without_a_config_file(forks_server, digits, tmp_path):
    words = ["-m", "accelerate.commands.launch", *forks.command("-m", "dnal_dist.train", "recipes/digits.yaml")[1:]]
    words += given(digits, tmp_path / "run", *FEW, "tracking.tracker=none", "tracking.plots=false")
    environment = {**os.environ, **forks_server.environment(), "HF_HOME": str(tmp_path / "hf")}
    launched = forks_server.start(words, environment, Path.cwd())
    _, err = launched.communicate()
    assert launched.returncode == 0, err
    assert report_records.summary(tmp_path / "run")["finished"]


def test_only_the_main_process_logs_to_wandb_the_traffic_of_all(demo):
    found = offline(demo[0])
    assert len(found.ids) == 1
    for name in ("train/comm/bytes_weight_step", "train/comm/bytes_architecture_step"):
        kind, _, key = name.partition("/")
        assert found.series(name) == [r[key] for r in records(demo[0], kind) if key in r] != []
    recorded = {r["phase"]: r for r in records(demo[0], "phase")}
    gates = 4 * sum(records(demo[0], "start")[0]["sites"].values())
    for phase in ("pretrain", "search", "finetune"):
        assert found.series(f"ledger/{phase}/bytes_sent") == [recorded[phase]["bytes_sent"]]
        assert recorded[phase]["device_seconds"] == pytest.approx(2 * recorded[phase]["seconds"], abs=0.01)
    # A weight step and an architecture step in turn.
    last = [r for r in records(demo[0], "train") if r["phase"] == "search"][-1]
    assert last["comm/bytes_architecture_step"] == gates
    steps = last["phase_steps"]
    assert recorded["search"]["bytes_sent"] == (steps + 1) // 2 * last["comm/bytes_weight_step"] + steps // 2 * gates
    assert found.summary["result/bytes_sent"] == sum(r.get("bytes_sent", 0) for r in recorded.values())


def run_here(digits, output, *changes: str):
    """A run of the demo's recipe in this process, ready to go."""
    return setup.prepare(recipe.load("recipes/digits.yaml", given(digits, output, "tracking.tracker=none", *changes)), Context())


def test_frozen_weights_stay_equal_through_the_whole_search(digits, tmp_path):
    """weight_steps: 0 is the authors' own way: nothing of the network moves while the architecture does."""
    run = run_here(digits, tmp_path, *FEW, "phases.search.weight_steps=0")
    batches = phases.training_batches(run)
    phases.pretrain(run, batches)
    before = {name: tensor.clone() for name, tensor in run.supernet.state_dict().items()}
    momentum = {name: tensor.clone() for name, tensor in run.momentum.items()}
    phases.search(run, batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.supernet.state_dict().items())
    assert momentum and all(torch.equal(momentum[name], tensor) for name, tensor in run.momentum.items())
    assert run.architecture.alpha.abs().min() > 0


def test_momentum_goes_on_from_pretrain_into_the_search(digits, tmp_path):
    run = run_here(digits, tmp_path, *FEW)
    phases.pretrain(run, phases.training_batches(run))
    search = run.context.wrap(run.network, run.recipe.phases.search.optimizer, run.momentum, run.recipe.training)
    with search.gathered() as momentum:
        assert momentum.keys() == run.momentum.keys() == dict(run.supernet.named_parameters()).keys()
        assert all(torch.equal(momentum[name], buffer) for name, buffer in run.momentum.items())


def test_collapse_is_stopped_at_the_floor_with_a_warning(digits, tmp_path):
    run = run_here(
        digits, tmp_path, "phases.pretrain.steps=4", "phases.search.epochs=1", "phases.finetune.steps=4",
        "architecture.penalty_weight=5.0", "architecture.min_macs=0.05",
    )  # fmt: skip
    phases.train(run)
    found = report_records.summary(tmp_path)
    assert found["collapsed"]
    assert found["macs_ratio"] >= 0.05
    assert any("the penalty is frozen" in warning for warning in found["warnings"])
    assert any("the architecture collapsed" in warning for warning in found["warnings"])


@pytest.mark.parametrize("often", ["tracking.log_every=1", "tracking.log_every=1000", "checkpoint.every_steps=1"])
def test_divergence_stops_the_run_before_it_is_saved(digits, tmp_path, often):
    changes = ["phases.pretrain.epochs=4", often, "phases.pretrain.optimizer.lr=1e30"]
    run = run_here(digits, tmp_path, *changes)
    with pytest.raises(
        errors.InputError,
        match=r"diverged in pretrain after \d+ steps: .* not finite; lower phases\.pretrain\.optimizer\.lr \(1e\+30\)",
    ):
        phases.train(run)
    run.writer.settle()
    _, saved, _ = checkpoint.latest(tmp_path / "checkpoints")
    assert saved.state.global_step <= 1
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_search_too_short_for_an_architecture_step_is_refused(digits, tmp_path):
    with pytest.raises(errors.InputError, match=r"'phases\.search\.weight_steps'.*only 4 iterations"):
        run_here(digits, tmp_path, *FEW, "phases.search.weight_steps=4")


def test_fewer_gpus_than_processes_leave_it_to_the_cpu(digits, tmp_path, monkeypatch):
    """NCCL takes one GPU for each process; two processes on a machine with one GPU run on the CPU, and say so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run = run_here(digits, tmp_path, *FEW)
    assert run.context.device.type == "cpu"
    assert any("1 GPU for" in warning for warning in report_records.summary(tmp_path)["warnings"])
