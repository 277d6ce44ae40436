"""The doctor's checks of the network, the machine and the cluster, each with a fault that it must find."""

import resource
import time
from types import SimpleNamespace

import pytest
from examining import found

from dnal_dist.doctor import cluster, machine, network
from dnal_dist.doctor.case import bounded


def test_networks_that_cannot_train_fail(case_of):
    found(network.network, case_of(), "pass", "digits: vgg_digits, 448 gates, images of 8x8, 64 a step")
    found(network.network, case_of("model.name=vgg17"), "fail", "no network is called 'vgg17'", "there are")
    found(network.network, case_of("data.image_size=2"), "fail", "cannot take images of 2x2", "key 'model.name'")
    found(network.network, case_of("architecture.target={macs: 1}"), "fail", "architecture.target", "")
    found(network.network, case_of("model.init_from=runs/none"), "fail", "there is no runs/none", ".safetensors")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_weights_that_a_library_publishes_pass(case_of, name):
    pytest.importorskip(name.partition(":")[0])
    case = case_of(f"model.name={name}", "model.pretrained=true", "data.image_size=32")
    found(network.network, case, "pass", f"64 a step, starts from {name}")


def test_device_memory_limits_the_images_at_a_time(case_of):
    found(network.memory, case_of(device_memory=80 * 10**9), "pass", "a device has 80 GB")
    found(network.memory, case_of(device_memory=10**6), "fail", "one image at a time does not fit", "more processes")
    case = case_of(device_memory=5 * 10**6)
    limit = network.memory(case).remedy.partition(",")[0]
    assert limit.startswith("data.per_device_batch_limit=")
    found(network.memory, case_of(limit, device_memory=5 * 10**6), "pass", "images at a time of 64")


def test_a_job_without_gpus_is_compared_with_this_machine_s_memory(case_of, monkeypatch):
    found(machine.gpus, case_of(cpu=True), "pass", "not used")
    # GPUs of this machine do not count.
    monkeypatch.setattr(network, "gpu_facts", lambda: [{"memory": 10**6}])
    monkeypatch.setattr(network.psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * 10**9))
    found(network.memory, case_of(cpu=True, processes=2), "pass", "it has 8 GB (this machine's, divided by 2)")
    monkeypatch.setattr(network.psutil, "virtual_memory", lambda: SimpleNamespace(total=5 * 10**6))
    found(network.memory, case_of(cpu=True), "warn", "it has 5 MB", "nodes with more memory")
    found(network.memory, case_of(cpu=True, device_memory=10**6), "fail", "one image at a time does not fit", "more processes")


def test_versions_out_of_bounds_fail(case_of, monkeypatch):
    found(machine.versions, case_of(), "pass", "torch ")
    monkeypatch.setattr(
        machine, "requirements", lambda: ["torch>=99", "no-package-of-this-name>=1", 'tomli>=2; python_version<"3"']
    )
    found(machine.versions, case_of(), "fail", "is not >=99, no-package-of-this-name is missing (>=1)", "constraints.txt")


def test_low_limits_of_the_machine_fail(case_of):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    case = case_of("data.workers=8")
    assert case.splits
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        found(machine.open_files, case, "fail", "may open 300 files at a time, and one of this run may need 448", "ulimit -n 4096")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found(machine.shared_memory, case_of("data.workers=0"), "pass", "data.workers is 0")
    large = case_of("data.workers=64", "data.image_size=40000", "data.global_batch=4096")
    found(machine.shared_memory, large, "fail", "free in /dev/shm", "--shm-size")
    found(
        machine.cores,
        case_of("data.workers=5000"),
        "warn",
        "1 training process with 5 000 loaders each (data.workers) need 5001",
        "",
    )


def test_a_login_is_needed_online_only(case_of, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "https://127.0.0.1")
    online = ("tracking.tracker=wandb", "tracking.mode=online")
    found(cluster.wandb, case_of(), "pass", "not used")
    found(cluster.wandb, case_of("tracking.tracker=wandb", "tracking.mode=offline"), "pass", "offline; runs are kept")
    found(cluster.wandb, case_of(*online), "fail", "not logged in to 127.0.0.1", "wandb login")
    # W&B reads its settings once a process.
    pytest.importorskip("wandb").teardown()
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {'k' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    found(cluster.wandb, case_of(*online), "warn", "is not reached from here", "tracking.mode=offline")


SINFO = """echo 'gpu|1-00:00:00|2|up'; echo 'short|30:00|8|up'; echo 'old|infinite|4|down'
case "$*" in *--all*) echo 'secret|2-00:00:00|1|up';; esac"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands with SLURM's names and short answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(**answers: str) -> None:
        for name in cluster.COMMANDS:
            (folder / name).write_text(f"#!/bin/sh\n{answers.get(name, 'true')}\n")
            (folder / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("facts", "status", "words", "remedy"),
    [
        ({"partition": "gpu", "nodes": 2, "seconds": 86_400.0}, "pass", "partition gpu", ""),
        ({}, "pass", "partitions gpu, short, old", ""),
        ({"partition": "gpus"}, "fail", "there is no partition gpus", "one of gpu, short, old"),
        ({"partition": "secret"}, "pass", "partition secret", ""),
        ({"partition": "old,short,gpu", "nodes": 2, "seconds": 86_400.0}, "pass", "partition old or short or gpu", ""),
        ({"partition": "gpu,gpus,gone"}, "fail", "there is no partition gpus, gone", "one of gpu, short, old"),
        ({"partition": "gpu,short", "nodes": 8, "seconds": 3600.0}, "fail", "gpu,short gives 30 min 00 s", "--time 0:30:00"),
        ({"partition": "gpu,old", "nodes": 4}, "fail", "the largest partition has 2", "--nodes 2"),
        ({"partition": "old"}, "fail", "partition old is down", "another of"),
        ({"partition": "gpu", "nodes": 3}, "fail", "the largest partition has 2", "--nodes 2"),
        ({"partition": "short", "seconds": 3600.0}, "fail", "short gives 30 min 00 s", "--time 0:30:00"),
    ],
)
def test_partition_nodes_and_time_are_checked(case_of, slurm, facts, status, words, remedy):
    slurm(sinfo=SINFO)
    found(cluster.slurm, case_of(**facts), status, words, remedy)


def test_slurm_without_an_answer_warns_or_fails(case_of, slurm, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "ANSWER", 0.3)
    slurm(sinfo="exec sleep 60")
    found(cluster.slurm, case_of(), "warn", "does not answer", "scontrol ping")
    monkeypatch.setenv("PATH", str(tmp_path))
    found(cluster.slurm, case_of(), "pass", "not needed")
    found(cluster.slurm, case_of(partition="gpu"), "fail", "commands are not installed here", "--partition")


def test_a_check_that_hangs_or_breaks_fails(case_of):
    hung = bounded(lambda case: time.sleep(30), case_of(), 0.1)
    assert hung.status == "fail" and "no answer within" in hung.found
    broken = bounded(lambda case: 1 // 0, case_of(), 5)
    assert broken.status == "fail" and "ZeroDivisionError" in broken.found
