"""Checks of this machine: versions, GPUs, and the limits that loaders reach."""

import os
import resource
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dnal_dist.common.cores import cores as common_cores
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import short
from dnal_dist.data import loader
from dnal_dist.data.files import OPEN_SHARDS
from dnal_dist.doctor.case import Case, Finding, fails, many, passes, warns
from dnal_dist.doctor.network import CHECKOUT, gpu_facts

# Batches that each loader prepares, torch's prefetch_factor.
PREFETCHED = 2
SHM = Path("/dev/shm")
BUSY_GPU = 1 << 30


def versions(case: Case) -> Finding:
    """Installed versions against those that pyproject.toml requires."""
    found, wrong = {}, []
    for one in map(Requirement, requirements()):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found[one.name] = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing ({one.specifier})")
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            wrong.append(f"{one.name} {found[one.name]} is not {one.specifier}")
    if wrong:
        return fails(", ".join(wrong), "pip install -c constraints.txt -e .")
    return passes(", ".join(f"{name} {found[name]}" for name in ("torch", "accelerate", "deepspeed") if name in found))


def requirements() -> list[str]:
    """Of the checkout, which may be newer than what was installed from it."""
    path = CHECKOUT / "pyproject.toml"
    if path.is_file():
        return tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"]
    return requires("dnal-dist") or []


def gpus(case: Case) -> Finding:
    """GPUs, CUDA, NCCL and the driver. No context is created on any GPU."""
    if case.cpu:
        return passes("not used, by --cpu")
    listed, visible = gpu_facts(), torch.cuda.device_count()
    if not listed and not visible:
        return warns(
            "no GPU here: this is probably a login node, so CUDA, NCCL and the driver were not checked, and steps run on the CPU "
            "over gloo",
            "run the doctor on a node of the job (`srun --gres=gpu:1 ...`), unless you train on the CPU",
        )
    names = ", ".join(dict.fromkeys(one["name"] for one in listed)) or "unknown"
    driver = listed[0]["driver"] if listed else "unknown"
    found = f"{many(visible, 'GPU')} ({names}), driver {driver}, torch for CUDA {torch.version.cuda or 'no'}"
    if torch.version.cuda is None:
        return fails(found, "install the torch of this driver's CUDA (pytorch.org/get-started)")
    if not visible or not torch.cuda.is_available():
        return fails(f"{found}, which does not start", "check CUDA_VISIBLE_DEVICES, and that the driver is as new as torch's CUDA")
    try:
        found += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    except (AttributeError, RuntimeError, ImportError):
        if case.ranks > 1:
            return fails(f"{found}, no NCCL", "install a torch that has NCCL (pytorch.org/get-started)")
    if visible < case.processes:
        return fails(
            f"{found}; too few for {case.processes} processes of this node, which would run on the CPU instead",
            f"--processes-per-node {visible}, or more GPUs for a node",
        )
    if busy := [one for one in listed if one["used"] > BUSY_GPU]:
        return warns(f"{found}; {len(busy)} in use, {short(busy[0]['used'])} of one", "nvidia-smi lists the processes")
    return passes(found)


def open_files(case: Case) -> Finding:
    """The limit for processes started from here against the files that a training process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = [min(OPEN_SHARDS, len(split.paths)) for split in case.usable]
    workers = case.settings.data.workers
    # The main process has the descriptors of the prefetched batches of both splits; without loaders, the shards.
    main = loader.OTHERS + loader.EACH * workers + (0 if workers else sum(shards))
    needed = max(main, loader.OTHERS + max(shards, default=OPEN_SHARDS))
    if soft == resource.RLIM_INFINITY:
        return passes(f"no limit, and one process of this run may need {needed}")
    found = f"a process may open {soft} files at a time, and one of this run may need {needed}"
    if soft >= needed:
        return passes(found)
    remedy = f"ulimit -n {max(4096, needed)}"
    return fails(found, remedy if hard == resource.RLIM_INFINITY or hard >= needed else f"{remedy}, by an administrator")


def shared_memory(case: Case) -> Finding:
    """Where loaders put their batches."""
    data, workers = case.settings.data, case.settings.data.workers
    if not workers:
        return passes("not used, since data.workers is 0")
    if data.global_batch % case.ranks:
        raise InputError(f"key 'data.global_batch': {data.global_batch} is not a multiple of {case.ranks} processes; change it")
    batch = 3 * data.image_size**2 * data.global_batch // case.ranks
    # Prefetched batches of training and of validation, whose loaders stay, and the batch in use.
    needed = case.processes * 2 * (workers * PREFETCHED + 1) * batch
    if not SHM.is_dir():
        return warns(f"no {SHM} here, and loaders need {short(needed)}", "mount a tmpfs there, or data.workers=0")
    stat = os.statvfs(SHM)
    free = stat.f_bavail * stat.f_frsize
    found = f"{short(free)} free in {SHM}; batches of a node's {case.processes} x {workers} loaders take up to {short(needed)}"
    if needed > free:
        return fails(found, "a larger one (container: --shm-size, or --ipc=host), or lower key 'data.workers'")
    return passes(found)


def cores(case: Case) -> Finding:
    allowed = os.environ.get("SLURM_CPUS_ON_NODE", "")
    here = min(common_cores(), int(allowed)) if allowed.isdigit() else common_cores()
    workers, wanted = case.settings.data.workers, case.processes * (1 + case.settings.data.workers)
    found = f"{many(here, 'core')} here; on a node, {case.processes} training {'process' if case.processes == 1 else 'processes'} "
    found += f"with {many(workers, 'loader')} each (data.workers) need {wanted}"
    if here >= wanted:
        return passes(found)
    return warns(
        f"{found}; loaders would wait for each other",
        f"{wanted} cores for a node (slurm/submit.py: --cpus-per-node), or data.workers={max(0, here // case.processes - 1)}",
    )
