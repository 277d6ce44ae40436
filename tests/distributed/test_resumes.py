"""On every backend, saving changes nothing and a resumed run is the uninterrupted one, bit for bit; from one backend and number of
processes to another it is so within rounding."""

import json

import pytest
import torch
from runs import records, training_records
from safetensors.torch import load_file

from dnal_dist.checkpoint import format as checkpoint

pytestmark = pytest.mark.timeout(1000)

# Four iterations an epoch, so that phases begin and end within epochs.
TINY = (
    "data.global_batch=90", "tracking.log_every=3", "tracking.tracker=none", "tracking.plots=false",
    "architecture.recalibration_batches=2",
    "phases.pretrain.steps=5", "phases.search.epochs=2", "phases.finetune.steps=6", "architecture.penalty_weight=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(digits):
    return [f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar"]


def tensors(run) -> dict[str, torch.Tensor]:
    return load_file(run / "compact" / "weights.safetensors")


def receipts(run) -> list[tuple]:
    return [(r["epoch"], r["batches"], r["samples"], r["digest"], r["ordered"]) for r in records(run, "receipt")]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_saving_and_resuming_change_nothing(ranks, shards, tmp_path, backend):
    changes = [*TINY, "phases.pretrain.ema=0.8", "phases.finetune.ema=0.8", "phases.finetune.optimizer={kind: adamw, lr: 0.01}"]
    changes += ["phases.search.optimizer={kind: rmsprop, lr: 0.001}"]
    changes = [*changes, "data.per_device_batch_limit=15" if backend in ("ddp", "zero2") else "data.per_device_batch_limit=45"]
    # Two numbers have one sum; with three it depends on the order, and so on how a backend arranges what it sends.
    # And ZeRO-3 divides few parameters evenly among three.
    processes = 3 if backend in ("ddp", "zero3") else 2
    # Pairs: of 90 images, three processes have 30 each, two 45.
    changes += ["phases.finetune.mixup=0.2"] if processes == 3 else []
    changes += ["model.name=user_networks:Dropping"] if backend in ("ddp", "fsdp2", "zero1") else []
    ranks.run(backend, processes, "resumes_on_ranks:every", tmp_path, [*shards, *changes])
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    assert not list((never / "checkpoints").glob("step-*"))
    # At the start, where the search, pruning, the finetune and the end begin, and at each stop.
    assert len(records(stopped, "checkpoint")) >= 1 + 4 + 3
    assert [r["resumed"] for r in records(stopped, "start")] == [False, True, True, True]
    assert without_traffic(stopped) == without_traffic(never)
    assert receipts(stopped) == receipts(never)
    # What they drop is not the same on all processes.
    assert len(checkpoint.latest(stopped / "checkpoints")[1].tensors["ranks.random"].unique(dim=0)) == processes
    ours, reference = tensors(stopped), tensors(never)
    assert ours.keys() == reference.keys() and all(ours[key].equal(reference[key]) for key in ours)


def without_traffic(run) -> list[dict]:
    """What the very first steps of a wrap communicate is not what later ones do, and there are more wraps in a run that stopped."""
    return [{key: value for key, value in record.items() if not key.startswith("comm/")} for record in training_records(run)]


def test_a_run_resumes_on_another_backend_and_number_of_processes(ranks, shards, tmp_path):
    """Stopped in the pretraining, twice in the search and in the finetune; normalised with the statistics of the whole batch."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    # With this network and seed no ReLU after step 3 reads a value so near zero that rounding decides on its side: one such value
    # among 46 080 changes a gradient by 0.4 %, and after ten steps the signs of small alphas.
    changes = [*shards, *TINY, "model.name=resnet_digits", "training.sync_batchnorm=true", "architecture.recalibration_batches=0"]
    changes = [*changes, "phases.finetune.ema=0.8", "data.augmentation.policy=trivial_augment"]
    ranks.run("single", 1, "resumes_on_ranks:until", 0, reference, changes)
    for backend, processes, step in (("single", 1, 3), ("fsdp2", 2, 8), ("zero2", 2, 10), ("zero3", 2, 15), ("ddp", 1, 0)):
        ranks.run(backend, processes, "resumes_on_ranks:until", step, run, changes)
    started = [(r["backend"], r["world_size"], r["resumed"]) for r in records(run, "start")]
    assert started == [("single", 1, False), ("fsdp2", 2, True), ("zero2", 2, True), ("zero3", 2, True), ("single", 1, True)]
    assert receipts(run) == receipts(reference)
    ours, theirs = training_records(run), training_records(reference)
    assert [(r["kind"], r["global_step"]) for r in ours] == [(r["kind"], r["global_step"]) for r in theirs]
    (mask,), (other) = ({r["mask"] for r in records(one, "prune")} for one in (run, reference))
    assert {mask} == other
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "cross_entropy", "penalty"):
            if b.get(key) is not None:
                # They are written with six digits behind the point.
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=2e-6), (a, b)
    found, expected = tensors(run), tensors(reference)
    whole = torch.cat([tensor.flatten().double() for tensor in expected.values()]).norm()
    for key, tensor in expected.items():
        off = (found[key].double() - tensor.double()).norm()
        assert off <= 1e-5 * (tensor.double().norm() + 0.1 * whole), f"{key}: off by {off:.1e} of {tensor.double().norm():.1e}"
    assert json.loads((run / "compact" / "architecture.json").read_text())["network"]
