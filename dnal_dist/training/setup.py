"""From a recipe to a run that is ready to train."""

import contextlib
import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dnal_dist import nets, recipe
from dnal_dist.checkpoint.writer import Writer
from dnal_dist.data import nvjpeg
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.nets import cost
from dnal_dist.search import selection
from dnal_dist.search.architecture import Architecture
from dnal_dist.tracking import environment
from dnal_dist.tracking.run_log import RunLog
from dnal_dist.training import preflight, pretrained, state
from dnal_dist.training.run import Run
from dnal_dist.training.run_folder import has_checkpoints, open_folder, private_temp, write_recipe
from dnal_dist.training.stopping import Edges


def assemble(
    settings: recipe.Recipe,
    context: Context,
    edges: Edges | None = None,
    overwrite: bool = False,
    allowed: Sequence[str] = (),
) -> Run:
    """Everything that a run of `settings` needs, its folder prepared, ready for phases.go. allowed: keys of the recipe that may
    have changed since it began. Raises InputError."""
    torch.manual_seed(settings.seed)
    network = preflight.build_network(settings.model)
    train, val = _streams(settings, network, context)
    for stream in (train, val):
        preflight.shards_that_differ(stream.shards, context)
    budget = _refuse(settings, network, train, context)
    folder = Path(settings.output)
    # Before the folder is opened: a run that cannot begin must not replace another.
    begins = context.from_main(overwrite or not has_checkpoints(folder))
    given = pretrained.start_from(network, settings, context) if begins and settings.model.init_from else None
    saved, faults, changed, lock = open_folder(folder, settings, context, overwrite, allowed)
    assert begins or saved is not None
    finished = saved is not None and saved.state.phase == "done"
    keep = None if saved is None or finished else saved.state.records
    run_log = RunLog(folder, settings, context, keep, saved and saved.state.tracker_run)
    if context.idle_gpus:
        few = f"{context.idle_gpus} GPU for {context.world_size} processes"
        faults.append(f"{few}: they run on the CPU; start fewer by --num_processes")
    if given is not None:
        faults += given.warnings
        run_log.say(f"the first weights are those of {given.origin}")
    for fault in (*faults, *dict.fromkeys(context.gather([*train.shards.warnings, *val.shards.warnings]))):
        run_log.warn(fault)
    private_temp(folder, context.rank, context.world_size)
    supernet = network.to(context.device)
    architecture = Architecture(network.num_gates).to(context.device)
    writer = Writer(folder / "checkpoints", settings.checkpoint, run_log.warn, run_log.to_disk)
    run = Run(
        settings,
        folder,
        context,
        run_log,
        train,
        val,
        supernet,
        architecture,
        writer,
        edges or Edges(context),
        lock,
        budget,
        _digests(train, val),
        saved is not None,
    )
    if saved is not None:
        preflight.other_shards(run, saved.state.shards, allowed)
        state.restore(run, saved)
        preflight.shorter_phase(run)
        if context.main:
            write_recipe(folder, settings)
    if finished:
        run_log.say(f"{folder}: this run is finished; nothing is left to train")
    else:
        _tell(run, saved is not None, changed)
    return run


def _streams(settings: recipe.Recipe, network: nets.GatedNetwork, context: Context) -> tuple[Stream, Stream]:
    """Of training and of validation."""
    data, classes = settings.data, settings.model.num_classes or network.num_classes
    if data.decode == "cuda":
        nvjpeg.require(context.device)

    def stream(key: str, train: bool) -> Stream:
        shards = Shards(getattr(data, key), f"data.{key}", classes, data.cache, data.cache_gb)
        pin = context.device.type == "cuda"
        return Stream(shards, data, settings.seed, train, context.rank, context.world_size, pin)

    return stream("train", True), stream("val", False)


def _refuse(settings: recipe.Recipe, network: nets.GatedNetwork, train: Stream, context: Context) -> selection.Budget | None:
    """Raise InputError for what would only fail in training; return the budget, if the recipe has one."""
    preflight.search_without_architecture(settings, train.steps_per_epoch)
    share = settings.data.global_batch // context.world_size // context.parts(settings.data)
    preflight.unfit_images(network, settings.data, share)
    return selection.budget(settings.architecture, network, settings.data.image_size)


def _digests(train: Stream, val: Stream) -> dict[str, str]:
    found = {"data.train": train.shards.fingerprints(), "data.val": val.shards.fingerprints()}
    return {key: hashlib.sha256("\n".join(lines).encode()).hexdigest() for key, lines in found.items()}


def _tell(run: Run, resumed: bool, changed: dict[str, list]) -> None:
    context, run_log, train, image_size = run.context, run.log, run.train, run.recipe.data.image_size
    parts, batch = context.parts(run.recipe.data), run.recipe.data.global_batch
    full = cost.both_rules(run.supernet, image_size)
    versions = {"python": platform.python_version()}
    for name in ("dnal-dist", "torch", "torchvision", "accelerate", "simplejpeg"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on PYTHONPATH is not an installed package
            versions[name] = version(name)
    run_log.global_step = run.global_step
    run_log.record(
        "start",
        name=run.recipe.name,
        init_from=run.recipe.model.init_from,
        resumed=resumed,
        changed=changed or None,
        tracker_run=run_log.tracker_run,
        world_size=context.world_size,
        backend=context.backend,
        precision=context.precision,
        accumulation=parts,
        device=_device_name(context.device),
        train_samples=train.samples,
        val_samples=run.val.samples,
        steps_per_epoch=train.steps_per_epoch,
        dropped_per_epoch=train.dropped,
        sites=run.supernet.gate_sites,
        shortcuts=run.supernet.shortcuts(),
        full=full,
        versions=versions,
        **(environment.facts(context.device) if context.main else {}),
    )
    run_log.say(
        f"{run.recipe.name}: {run.recipe.model.name}, {full['exact']['macs'] / 1e6:,.2f} M MACs, "
        f"{run.supernet.num_gates} gates; "
        f"{train.samples} training and {run.val.samples} validation images, {train.steps_per_epoch} steps of "
        f"{batch} an epoch ({train.dropped} images left over); "
        f"{context.world_size} process{'es' if context.world_size > 1 else ''} on {_device_name(context.device)}"
        + (f", {context.backend}" if context.world_size > 1 else "")
        + (f", {context.precision}" if context.precision != "float32" else "")
        + (f", {batch // context.world_size} images each in {parts} parts" if parts > 1 else "")
    )
    for shards in (train.shards, run.val.shards):
        if shards.cache is not None:
            run_log.say(
                f"{shards.key}: {shards.remote_bytes / 1e9:,.3g} GB elsewhere, read through copies in {shards.cache.folder}"
            )
    for key, (before, after) in changed.items():
        run_log.say(f"changed: {key}: {before} -> {after}")
    if resumed:
        run_log.say(f"resumed in {run.phase} after {run.step} steps ({run.global_step} in all)")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
