"""Checks of the recipe and of the network that it names: what a run would be refused for, and what it needs of a device."""

from pathlib import Path

import psutil

from dnal_dist.common import text
from dnal_dist.distributed import estimate as distributed_estimate
from dnal_dist.distributed.estimate import USABLE
from dnal_dist.doctor.case import Case, Finding, fails, many, output_of, passes, warns
from dnal_dist.search import selection
from dnal_dist.training import preflight
from dnal_dist.training.pretrained import PREFIX

CHECKOUT = Path(__file__).parents[2]


def network(case: Case) -> Finding:
    settings, net = case.settings, case.network
    data, model = settings.data, settings.model
    # What cannot be divided evenly is told with the shards.
    share = 2 if data.global_batch % case.ranks else data.global_batch // case.ranks // _parts(case)
    preflight.unfit_images(net, data, share)
    selection.budget(settings.architecture, net, data.image_size)
    given = model.init_from
    if given and not given.startswith(PREFIX) and not Path(given).expanduser().exists():
        return fails(f"key 'model.init_from': there is no {given}", f"give a run folder, a .safetensors file, or {PREFIX}resnet50")
    begins = f", begins with {given}" if given else ""
    return passes(
        f"{settings.name}: {model.name}, {many(net.num_gates, 'gate')}, images of {data.image_size}x{data.image_size}, "
        f"{data.global_batch} a step{begins}"
    )


def _parts(case: Case) -> int:
    """In how many parts a process will take its share: see Context.parts."""
    data = case.settings.data
    share = data.global_batch // case.ranks
    if case.config is not None and case.config.accumulation > 1:
        return case.config.accumulation
    limit = data.per_device_batch_limit or share
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= limit)


def memory(case: Case) -> Finding:
    """What plan.py estimates of one process against the memory of a device."""
    device, told = case.device_memory, ""
    if device is None and case.cpu:
        device, told = psutil.virtual_memory().total // case.processes, f" (its share of this machine's, by {case.processes})"
    elif device is None and (gpus := gpu_facts()):
        device, told = min(gpu["memory"] for gpu in gpus), " (this machine's)"
    precision = "bf16" if case.config is not None and case.config.precision in ("bf16", "fp16") else "no"
    backend = "ddp" if case.backend == "single" else case.backend
    # First, since it refuses what cannot be divided.
    found = distributed_estimate.plan(case.settings, case.ranks, None, precision)["backends"][backend]
    parts, share = _parts(case), case.settings.data.global_batch // case.ranks
    kept = distributed_estimate.plan(case.settings, case.ranks, device, precision)["backends"][backend] if device else found
    needs = found["memory"]["total"] if parts == found["parts"] else None
    at_a_time = share // parts
    words = f"{many(at_a_time, 'picture')} at a time of {share} for a process on {case.backend}"
    estimate = f"{words} take about {text.short(needs)}" if needs else words
    if device is None:
        return warns(f"{estimate}; there is no device here to compare with", "--device-memory 80GB (of one device)")
    own = case.cpu and case.device_memory is None
    told = f"{estimate}; {'it' if own else 'a device'} has {text.short(device)}{told}, of which {USABLE:.0%} are counted on"
    if own and not (kept["fits"] and kept["parts"] <= parts):
        # The job's machines may have more.
        return warns(told, "data.per_device_batch_limit, fewer processes of a node, or nodes with more memory")
    if not kept["fits"]:
        return fails(
            f"{told}; one image at a time does not fit", "more processes, training.activation_checkpointing=true, or fsdp2"
        )
    if kept["parts"] > parts:
        return fails(told, f"data.per_device_batch_limit={kept['pictures_at_a_time']}, or more processes")
    return passes(told)


def gpu_facts() -> list[dict]:
    """Name, memory and used memory (bytes), and driver of each GPU that the driver tells of."""
    fields = "name,memory.total,memory.used,driver_version"
    told = output_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 8) or ""
    found = []
    for line in told.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 4 and words[1].isdigit():
            used = int(words[2]) if words[2].isdigit() else 0
            found.append({"name": words[0], "memory": int(words[1]) << 20, "used": used << 20, "driver": words[3]})
    return found


def code(case: Case) -> Finding:
    """The version of the code, so that a result can be traced to it."""
    # A virtual environment may lie in a checkout of something else; and looking at one must not write to it.
    git = ["git", "--no-optional-locks", "-C", str(CHECKOUT)]
    commit = output_of([*git, "rev-parse", "--short=12", "HEAD"]) if (CHECKOUT / ".git").exists() else None
    if commit is None:
        return _installed()
    changed = output_of([*git, "status", "--porcelain", "--untracked-files=no"], 8)
    if changed is None:
        return warns(f"commit {commit}; whether it was changed could not be found out", "git status")
    if changed:
        return warns(f"commit {commit}, with {many(len(changed.splitlines()), 'changed file')}", "git commit, or git stash")
    return passes(f"commit {commit}, unchanged")


def _installed() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return passes(f"release {version('dnal-dist')}, not a git checkout")
    except PackageNotFoundError:
        return warns(f"{CHECKOUT} is neither a git checkout nor installed", "pip install -e . in a git clone")
