"""Whole runs on the Accelerate configs that ship."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from runs import records

pytestmark = pytest.mark.timeout(1000)

JOB = "runs_on_ranks:train"
SHORT = (
    "tracking.tracker=none", "tracking.plots=false", "tracking.log_every=4", "architecture.recalibration_batches=2",
    "phases.pretrain.steps=4", "phases.search.steps=12", "phases.finetune.steps=4",
    "architecture.penalty_weight=0.05", "architecture.optimizer.lr=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(digits):
    return [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar"]


@pytest.fixture(scope="module")
def trained(ranks, once, shards):
    """The run folder of the digits recipe with these changes, on two processes of a backend; each trained once."""

    def run(backend: str, *changes: str, precision: str = "no"):
        name = hashlib.sha256(repr((backend, precision, changes)).encode()).hexdigest()[:12]
        given = ["recipes/digits.yaml", *shards, *changes]
        return once(name, lambda out: ranks.run(backend, 2, JOB, *given, f"output={out}", precision=precision, timeout=600))

    return run


@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_records_the_same_on_every_backend(trained, backend):
    ours, reference = records(trained(backend, *SHORT)), records(trained("ddp", *SHORT))
    assert ours[0]["backend"] == backend and reference[0]["backend"] == "ddp"
    assert [r["kind"] for r in ours] == [r["kind"] for r in reference]
    for a, b in zip(ours, reference, strict=True):
        if a["kind"] == "prune":
            assert (a["mask"], a["kept"]) == (b["mask"], b["kept"])
        for key in ("loss", "cross_entropy", "penalty", "accuracy"):
            assert a.get(key) == (None if b.get(key) is None else pytest.approx(b[key], rel=1e-4, abs=1e-6)), (a, b)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_records_what_a_step_communicates(trained, backend):
    run = trained(backend, *SHORT)
    last = [r for r in records(run, "train") if r["phase"] == "search"][-1]
    gates = 4 * sum(records(run, "start")[0]["sites"].values())
    weights = last["comm/bytes_weight_step"]
    assert weights >= 4 * 289_194
    if backend in ("ddp", "zero1", "zero2"):
        assert last["comm/bytes_architecture_step"] == gates
    else:
        assert gates < last["comm/bytes_architecture_step"] < weights


@pytest.mark.xdist_group("ddp")
def test_accumulation_steps_follow_from_the_limit_of_a_device(trained):
    found = trained("ddp", *SHORT, "data.per_device_batch_limit=10")
    assert records(found, "start")[0]["accumulation"] == 4
    assert len(records(found, "end")) == 1


@pytest.mark.xdist_group("launches")
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
        output, _ = job.communicate(timeout=240)
    assert job.returncode != 0
    assert "SIGKILL" in output and "after" in output, output[-3000:]
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_wrap_keeps_weights_and_momentum_in_float32(ranks, backend):
    ranks.run(backend, 2, "wraps_on_ranks:wraps", precision="bf16")


@pytest.mark.parametrize(("backend", "precision"), [("ddp", "float16"), ("ddp", "bfloat16"), ("zero2", "bfloat16")])
def test_low_precision_follows_float32(trained, backend, precision):
    """float16 with loss scaling. A narrow network, since both are slow on most CPUs."""
    narrow = (*SHORT, "model.width=0.25")
    out = trained(backend, *narrow, precision={"float16": "fp16", "bfloat16": "bf16"}[precision])
    pairs = zip(records(out, "train"), records(trained("ddp", *narrow), "train"), strict=True)
    assert records(out, "start")[0]["precision"] == precision
    for half, full in list(pairs)[:3]:
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05), (half, full)
