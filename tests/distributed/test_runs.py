"""Whole runs under `accelerate launch`, on the configs that ship."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launching import launch, succeed
from runs import records

from data_tools import make_shards

pytestmark = pytest.mark.timeout(1000)

SHORT = (
    "tracking.tracker=none", "tracking.plots=false", "tracking.log_every=4",
    "phases.pretrain.steps=8", "phases.search.steps=16", "phases.finetune.steps=8",
    "architecture.penalty_weight=0.05", "architecture.optimizer.lr=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_shards.digits(folder)
    return [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar"]


@pytest.fixture(scope="module")
def on(shards, tmp_path_factory):
    """The run folder of a backend's short run, each made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(backend: str, *changes: str):
        if (backend, changes) not in done:
            out = folder / str(len(done))
            script = "tests/distributed/runs_on_ranks.py"
            succeed(launch(backend, 2, script, "recipes/digits.yaml", f"output={out}", *shards, *SHORT, *changes))
            done[backend, changes] = out
        return done[backend, changes]

    return run


@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_tells_the_same_on_every_backend(on, backend):
    ours, reference = records(on(backend)), records(on("ddp"))
    assert ours[0]["backend"] == backend and reference[0]["backend"] == "ddp"
    assert [r["kind"] for r in ours] == [r["kind"] for r in reference]
    for a, b in zip(ours, reference, strict=True):
        if a["kind"] == "prune":
            assert (a["mask"], a["kept"]) == (b["mask"], b["kept"])
        for key in ("loss", "cross_entropy", "penalty", "accuracy"):
            assert a.get(key) == (None if b.get(key) is None else pytest.approx(b[key], rel=1e-4, abs=1e-6)), (a, b)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_tells_what_a_step_communicates(on, backend):
    told = [r for r in records(on(backend), "train") if r["phase"] == "search"][-1]
    gates = 4 * sum(records(on(backend), "start")[0]["sites"].values())
    weights = told["comm/bytes_weight_step"]
    assert weights >= 4 * 289_194
    if backend in ("ddp", "zero1", "zero2"):
        assert told["comm/bytes_architecture_step"] == gates
    else:
        assert gates < told["comm/bytes_architecture_step"] < weights


def test_parts_of_a_batch_are_chosen_by_what_a_device_holds(on):
    found = on("ddp", "data.per_device_batch_limit=10")
    assert records(found, "start")[0]["accumulation"] == 4
    assert len(records(found, "end")) == 1


def test_a_process_that_is_killed_takes_the_job_down(shards, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml"]
    command += ["-m", "dnal_dist.train", "recipes/digits.yaml", f"output={tmp_path}/run", *shards, "tracking.tracker=none"]
    command += ["phases.pretrain.epochs=1000", "tracking.log_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as job:
        path = tmp_path / "run/metrics.jsonl"
        until = time.monotonic() + 300
        while not (path.exists() and '"step": 5,' in path.read_text()):
            assert time.monotonic() < until and job.poll() is None, job.communicate()
            time.sleep(0.1)
        everyone = psutil.Process(job.pid).children(recursive=True)
        ranks = [p for p in everyone if p.environ().get("RANK") == "1" and "dnal_dist.train" in " ".join(p.cmdline())]
        killed = min(ranks, key=lambda p: p.create_time())
        os.kill(killed.pid, signal.SIGKILL)
        said, _ = job.communicate(timeout=240)
    assert job.returncode != 0
    assert "SIGKILL" in said and "after" in said, said[-3000:]
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_what_goes_into_a_wrap_comes_out_of_it(backend):
    found = succeed(launch(backend, 2, "tests/distributed/wraps_on_ranks.py", precision="bf16"))
    assert all(f"rank {rank} done" in found.stdout for rank in (0, 1))


@pytest.fixture(scope="module")
def accuracy(shards, tmp_path_factory):
    """Of the digits recipe, a little shorter, by backend and precision; each run once."""
    folder, done = tmp_path_factory.mktemp("precision"), {}
    epochs = ("phases.pretrain.epochs=6", "phases.search.epochs=8", "phases.finetune.epochs=12", "tracking.tracker=none")

    def find(backend: str, precision: str) -> float:
        if (backend, precision) not in done:
            out = folder / f"{backend}-{precision}"
            command = ["-m", "dnal_dist.train", "recipes/digits.yaml", *shards, *epochs, f"output={out}"]
            succeed(launch(backend, 2, *command, precision=precision))
            done[backend, precision] = records(out, "eval")[-1]["accuracy"]
            assert records(out, "start")[0]["precision"] == {"no": "float32", "bf16": "bfloat16"}[precision]
        return done[backend, precision]

    return find


@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_bfloat16_learns_the_digits_as_well(accuracy, backend):
    """Within 1 % of float32, which is the same on every backend."""
    assert accuracy(backend, "bf16") == pytest.approx(accuracy("ddp", "no"), abs=0.01)


def test_float16_with_loss_scaling_follows_float32(on, shards, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "dnal_dist.train", "recipes/digits.yaml", f"output={out}", *shards, *SHORT]
    succeed(launch("ddp", 2, *command, precision="fp16"))
    pairs = zip(records(out, "train"), records(on("ddp"), "train"), strict=True)
    assert records(out, "start")[0]["precision"] == "float16"
    for half, full in list(pairs)[:3]:
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05), (half, full)


def test_float16_goes_with_ddp_only(shards, tmp_path):
    command = ["-m", "dnal_dist.train", "recipes/digits.yaml", f"output={tmp_path}/run", *shards]
    found = launch("zero2", 1, *command, precision="fp16")
    assert found.returncode != 0 and "mixed_precision fp16, which only goes with DDP here; choose bf16" in found.stderr
