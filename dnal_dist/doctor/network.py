"""Checks of the recipe, of its network, of the memory that it needs and of what its search will see."""

import contextlib
from pathlib import Path

import psutil

from dnal_dist.common.commands import output_of
from dnal_dist.common.errors import InputError
from dnal_dist.common.text import short
from dnal_dist.distributed import estimate
from dnal_dist.distributed.context import accumulation_steps
from dnal_dist.doctor.case import Case, Finding, fails, many, passes, warns
from dnal_dist.report import records
from dnal_dist.search import budgets
from dnal_dist.search.signal import blindness
from dnal_dist.training import preflight
from dnal_dist.training.pretrained import PUBLISHERS

CHECKOUT = Path(__file__).parents[2]


def network(case: Case) -> Finding:
    data, model = case.settings.data, case.settings.model
    # A batch that cannot be divided evenly is reported with the shards.
    images = 2 if data.global_batch % case.ranks else data.global_batch // case.ranks // _accumulation(case)
    preflight.check_images(case.network, data, images)
    if case.settings.searches:
        budgets.read(case.settings.architecture, case.network, data.image_size, case.settings.network)
    weights = model.init_from
    if weights and not weights.startswith(PUBLISHERS) and not Path(weights).exists():
        return fails(
            f"key 'model.init_from': there is no {weights}", "give a run folder, a .safetensors file, torchvision:NAME or timm:NAME"
        )
    start = f", starts from {weights}" if weights else ""
    return passes(
        f"{case.settings.name}: {model.name}, {many(case.network.num_gates, 'gate')}, "
        f"images of {data.image_size}x{data.image_size}, {data.global_batch} a step{start}"
    )


def _accumulation(case: Case) -> int:
    """Micro-batches of a process in one step. Raises InputError."""
    data, steps = case.settings.data, case.config.accumulation if case.config is not None else 1
    return accumulation_steps(data.global_batch // case.ranks, data.per_device_batch_limit, steps)


def memory(case: Case) -> Finding:
    """The estimate of `python -m dnal_dist.plan` for one process against the memory of a device."""
    device, source, own = case.device_memory, "", False
    if device is None and case.cpu:
        device, own = psutil.virtual_memory().total // case.processes, True
        source = f" (this machine's, divided by {case.processes})"
    elif device is None and (gpus := gpu_facts()):
        device, source = min(gpu["memory"] for gpu in gpus), " (this machine's)"
    precision = "bf16" if case.config is not None and case.config.precision in ("bf16", "fp16") else "no"
    backend = "ddp" if case.backend == "single" else case.backend

    def estimated(memory: int | None) -> dict:
        return estimate.plan(case.settings, case.ranks, memory, precision)["backends"][backend]

    # First, since it refuses a batch that cannot be divided.
    plan, steps, local = estimated(None), _accumulation(case), case.settings.data.global_batch // case.ranks
    found = f"{many(local // steps, 'image')} at a time of {local} for a process on {case.backend}"
    if steps == plan["parts"]:
        found += f" take about {short(plan['memory']['total'])}"
    if device is None:
        return warns(f"{found}; there is no device here to compare with", "--device-memory 80GB (of one device)")
    plan = estimated(device)
    found += f"; {'it' if own else 'a device'} has {short(device)}{source}, of which {estimate.USABLE:.0%} are counted on"
    if plan["fits"] and plan["parts"] <= steps:
        return passes(found)
    if own:
        # The job's machines may have more.
        return warns(found, "data.per_device_batch_limit, fewer processes of a node, or nodes with more memory")
    if not plan["fits"]:
        remedy = "more processes, training.activation_checkpointing=true, or fsdp2"
        return fails(f"{found}; one image at a time does not fit", remedy)
    return fails(found, f"data.per_device_batch_limit={plan['images_at_a_time']}, or more processes")


def gpu_facts() -> list[dict]:
    """Name, memory and used memory (bytes), and driver of each GPU that the driver lists."""
    fields = "name,memory.total,memory.used,driver_version"
    answer = output_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 8) or ""
    found = []
    for line in answer.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 4 and words[1].isdigit():
            used = int(words[2]) if words[2].isdigit() else 0
            found.append({"name": words[0], "memory": int(words[1]) << 20, "used": used << 20, "driver": words[3]})
    return found


def signal(case: Case) -> Finding:
    """Whether the search sees what its channels are worth, as far as that is known before it: by records in the run folder, or by
    its learning rate. A test of some 40 batches here would take a CPU minutes."""
    settings = case.settings
    if not settings.searches or settings.architecture.criterion == "taylor":
        return passes("no alphas are learned")
    with contextlib.suppress(InputError):
        last = records.load(case.folder).last("signal")
        if {"significant", "batches"} <= last.keys():
            blind = blindness(settings, last["significant"], last["batches"])
            seen = f"in {case.folder} {last['significant']:.1%} of the gates' gradients stood out of noise"
            return warns(f"the run in {case.folder} saw little: {blind[0]}", ", or ".join(blind[1])) if blind else passes(seen)
    first, rate = settings.phases.pretrain, settings.phases.search.optimizer.lr
    if (first.epochs or first.steps) and 10 * rate <= first.optimizer.lr:
        return warns(
            f"key 'phases.search.optimizer.lr' is {rate:g}, a tenth of pretrain's {first.optimizer.lr:g} or less; with that, "
            "alphas were behind even thinning on CIFAR-10 (docs/pareto.md)",
            f"phases.search.optimizer.lr={first.optimizer.lr:g}, or architecture.criterion=taylor with a target",
        )
    return passes("not known yet; the search tests it in its first 40 architecture steps")
