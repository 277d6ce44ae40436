"""Checks of this machine: versions, GPUs, and the limits that loaders come up against."""

import os
import resource
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dnal_dist.common.errors import InputError
from dnal_dist.common.text import short
from dnal_dist.data.shards import OPEN_SHARDS, Shards
from dnal_dist.doctor.case import Case, Finding, fails, many, passes, warns
from dnal_dist.doctor.network import CHECKOUT, gpu_facts

# Batches that each loader has ready (torch's prefetch_factor), and file descriptors that each of them and a loader itself take.
AHEAD, TENSORS, PIPES = 2, 6, 8
# What Python, torch and the trackers have open besides.
OTHERS = 128
SHM = Path("/dev/shm")
BUSY_GPU = 1 << 30


def versions(case: Case) -> Finding:
    """What is installed against what pyproject.toml asks for, and what was tested."""
    asked = [Requirement(line) for line in _requirements()]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    found, wrong = {}, []
    for one in asked:
        try:
            found[one.name] = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing ({one.specifier})")
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            wrong.append(f"{one.name} {found[one.name]} is not {one.specifier}")
    if wrong:
        return fails(", ".join(wrong), "pip install -c constraints.txt -e .")
    tested = _tested()
    others = [f"{name} {v} ({tested[name.lower()]})" for name, v in found.items() if tested.get(name.lower(), v) != v.split("+")[0]]
    told = ", ".join(f"{name} {found[name]}" for name in ("torch", "accelerate", "deepspeed") if name in found)
    if others:
        told += f"; in bounds, but others than were tested: {', '.join(others)}"
    return passes(told)


def _requirements() -> list[str]:
    path = CHECKOUT / "pyproject.toml"
    if path.is_file():
        return tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"]
    return requires("dnal-dist") or []


def _tested() -> dict[str, str]:
    path = CHECKOUT / "constraints.txt"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return {name.lower(): pinned for name, equals, pinned in (line.partition("==") for line in lines) if equals}


def gpus(case: Case) -> Finding:
    """GPUs, CUDA, NCCL and the driver. No context is made on any GPU."""
    if case.cpu:
        return passes("not asked for")
    built, found, seen = torch.version.cuda, gpu_facts(), torch.cuda.device_count()
    if not found and not seen:
        return warns(
            "no GPU here: this looks like a login node, so neither CUDA, NCCL nor a driver were looked at, and steps "
            "are tried on the CPU over gloo",
            "ask again on a node of the job (`srun --gres=gpu:1 ...`), unless the CPU is what you train on",
        )
    names = ", ".join(dict.fromkeys(one["name"] for one in found)) or "unknown"
    driver = found[0]["driver"] if found else "unknown"
    told = f"{many(seen, 'GPU')} ({names}), driver {driver}, torch for CUDA {built or 'no'}"
    if built is None:
        return fails(told, "install the torch of this driver's CUDA (pytorch.org/get-started)")
    if not seen or not torch.cuda.is_available():
        return fails(f"{told}, which does not start", "check CUDA_VISIBLE_DEVICES, and that the driver is as new as torch's CUDA")
    try:
        told += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    except (AttributeError, RuntimeError, ImportError):
        if case.ranks > 1:
            return fails(f"{told}, no NCCL", "install a torch that has NCCL (pytorch.org/get-started)")
    if seen < case.processes:
        return fails(
            f"{told}; {case.processes} processes of this node would leave them alone and run on the CPU",
            f"--processes-per-node {seen}, or more GPUs for a node",
        )
    if busy := [one for one in found if one["used"] > BUSY_GPU]:
        return warns(f"{told}; {len(busy)} in use, {short(busy[0]['used'])} of one", "nvidia-smi tells by whom")
    return passes(told)


def open_files(case: Case) -> Finding:
    """The limit that processes started from here have against what a training process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [len(shards.paths) for shards in case.splits.values() if isinstance(shards, Shards)]
    workers = case.settings.data.workers
    # The main process holds the descriptors of what its loaders have ready, of both sets; without loaders, the shards.
    main = OTHERS + 2 * workers * (AHEAD * TENSORS + PIPES) + (0 if workers else sum(min(OPEN_SHARDS, n) for n in found))
    loader = OTHERS + max((min(OPEN_SHARDS, n) for n in found), default=OPEN_SHARDS)
    needed = max(main, loader)
    told = f"a process may open {soft} files at a time, and one of this run may need {needed}"
    if soft != resource.RLIM_INFINITY and soft < needed:
        higher = f"ulimit -n {max(4096, needed)}"
        return fails(told, higher if hard == resource.RLIM_INFINITY or hard >= needed else f"{higher}, by an administrator")
    return passes(f"no limit, and one process of this run may need {needed}" if soft == resource.RLIM_INFINITY else told)


def shared_memory(case: Case) -> Finding:
    """Through which loaders hand over their batches."""
    data, workers = case.settings.data, case.settings.data.workers
    if not workers:
        return passes("not used, since data.workers is 0")
    if data.global_batch % case.ranks:
        raise InputError(f"key 'data.global_batch': {data.global_batch} is not a multiple of {case.ranks} processes; change it")
    batch = 3 * data.image_size**2 * data.global_batch // case.ranks
    # Of training and of validation, whose loaders wait with theirs; and one that is being taken.
    needed = case.processes * 2 * (workers * AHEAD + 1) * batch
    if not SHM.is_dir():
        return warns(f"no {SHM} here, and loaders need {short(needed)}", "mount a tmpfs there, or data.workers=0")
    found = os.statvfs(SHM)
    free = found.f_bavail * found.f_frsize
    told = f"{short(free)} free in {SHM}; with a node's {case.processes} x {workers} loaders, batches take up to {short(needed)}"
    if needed > free:
        return fails(told, "a larger one (container: --shm-size, or --ipc=host), or lower key 'data.workers'")
    return passes(told)


def cores(case: Case) -> Finding:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("SLURM_CPUS_ON_NODE", "")
    here = min(here, int(allowed)) if allowed.isdigit() else here
    workers, wanted = case.settings.data.workers, case.processes * (1 + case.settings.data.workers)
    told = f"{many(here, 'core')} here; on a node, {case.processes} training {'process' if case.processes == 1 else 'processes'} "
    told += f"with {many(workers, 'loader')} each (data.workers) want {wanted}"
    if here < wanted:
        fitting = max(0, here // case.processes - 1)
        return warns(
            f"{told}; loaders would wait for each other",
            f"{wanted} cores for a node (slurm/submit.py: --cpus-per-node), or data.workers={fitting}",
        )
    return passes(told)
