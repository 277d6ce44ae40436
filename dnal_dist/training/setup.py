"""From a recipe to a run that is ready to train."""

import contextlib
import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from dnal_dist import nets, recipe
from dnal_dist.checkpoint.format import Checkpoint, RunState
from dnal_dist.checkpoint.writer import Writer
from dnal_dist.data import nvjpeg
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Context
from dnal_dist.nets import cost
from dnal_dist.search import budgets
from dnal_dist.search.architecture import Architecture
from dnal_dist.tracking import environment
from dnal_dist.tracking.run_log import RunLog
from dnal_dist.training import finished, mixing, preflight, pretrained, state, teacher
from dnal_dist.training.run import Run
from dnal_dist.training.run_folder import Opened, has_checkpoints, open_folder, private_temp, write_recipe
from dnal_dist.training.stopping import StopPoll


def prepare(
    settings: recipe.Recipe,
    context: Context,
    stops: StopPoll | None = None,
    overwrite: bool = False,
    allowed: Sequence[str] = (),
) -> Run:
    """A run of `settings`, new or resumed, with its folder prepared, ready for phases.train. allowed: keys of the recipe that may
    have changed since it began. Raises InputError."""
    torch.manual_seed(settings.seed)
    network = nets.build(**settings.network, check=True)
    train, val = _streams(settings, network, context)
    preflight.check_search_length(settings, train.steps_per_epoch)
    local_batch = settings.data.global_batch // context.world_size
    preflight.check_images(network, settings.data, local_batch // context.accumulation_steps(settings.data))
    budget = None
    if settings.searches:
        budget = budgets.read(settings.architecture, network, settings.data.image_size, settings.network)
    folder = Path(settings.output)
    # Before the folder is opened: a run that cannot begin must not replace another.
    begins = context.from_main(overwrite or not has_checkpoints(folder))
    source = None
    if begins and not settings.searches:
        source = finished.read(network, settings, context)
    elif begins and settings.model.init_from:
        source = pretrained.start_from(network, settings, context)
    classes = settings.model.num_classes or network.num_classes
    taught_by = teacher.given(settings, classes, context) if begins else None
    opened = open_folder(folder, settings, context, overwrite, allowed)
    try:
        assert begins or opened.saved is not None
        if not begins and opened.saved.state.phase != "done":
            taught_by = teacher.given(settings, classes, context)
        weights = teacher.checked(taught_by, settings, opened.saved, allowed)
        run = _opened_run(settings, context, opened, network, (train, val), budget, source, stops, allowed)
        run.teacher, run.state.teacher = taught_by, weights
        return run
    except BaseException:
        # Whoever catches this may start another run in the folder.
        if opened.lock is not None:
            opened.lock.release()
        raise


def _opened_run(
    settings: recipe.Recipe,
    context: Context,
    opened: Opened,
    network: nets.GatedNetwork,
    streams: tuple[Stream, Stream],
    budget: budgets.Budget | None,
    source: pretrained.Source | finished.Finished | None,
    stops: StopPoll | None,
    allowed: Sequence[str],
) -> Run:
    """The run in its folder, which was opened for it."""
    saved, faults, changed, lock = opened
    context.tune(settings.training, network, saved and (saved.state.memory_format or "contiguous"))
    (train, val), folder = streams, Path(settings.output)
    given = source if isinstance(source, finished.Finished) else None
    if saved is not None and saved.state.phase == "prune" and not settings.searches:
        given = finished.read(network, settings, context)
    is_done = saved is not None and saved.state.phase == "done"
    keep = None if saved is None or is_done else saved.state.records
    run_log = RunLog(folder, settings, context, keep, saved and saved.state.tracker_run)
    if source is not None:
        run_log.print(f"the first weights are those of {source.origin}")
    _warn(run_log, context, [*faults, *(source.warnings if source else ())], [train, val])
    private_temp(folder, context.rank, context.world_size)
    supernet = network.to(context.device)
    hard = settings.architecture.criterion == "taylor"
    architecture = Architecture(network.num_gates, hard).to(context.device)
    writer = Writer(folder / "checkpoints", settings.checkpoint, run_log.warn, run_log.to_disk)
    run = Run(
        recipe=settings,
        folder=folder,
        context=context,
        state=_state(settings, context, _digests(train, val), run_log.tracker_run, saved),
        log=run_log,
        train=train,
        val=val,
        supernet=supernet,
        architecture=architecture,
        budget=budget,
        writer=writer,
        stops=stops or StopPoll(context),
        lock=lock,
        resumed=saved is not None,
        given=given,
    )
    mixing.check(run)
    _draw_apart(settings.seed, context.rank)
    if saved is not None:
        preflight.check_same_shards(run, saved.state.shards, allowed)
        state.restore(run, saved)
        preflight.check_phase_length(run)
        if context.main:
            write_recipe(folder, settings)
    if is_done:
        run_log.print(f"{folder}: this run is finished; nothing is left to train")
    else:
        _record_start(run, changed)
    return run


def _draw_apart(seed: int, rank: int) -> None:
    """First weights are drawn alike by all processes; but dropout and stochastic depth must not fall on the same places in each."""
    if rank:
        torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0]))


def _warn(run_log: RunLog, context: Context, faults: list[str], streams: list[Stream]) -> None:
    """Record `faults`, idle GPUs, and what each process's shards warn of, once."""
    if context.idle_gpus:
        few = f"{context.idle_gpus} GPU for {context.world_size} processes"
        faults.append(f"{few}: they run on the CPU; start fewer by --num_processes")
    own = [line for stream in streams for line in (*stream.shards.warnings, *stream.notes)]
    own += preflight.class_warnings([stream.shards for stream in streams], streams[0].shards.num_classes)
    for fault in (*faults, *dict.fromkeys(context.gather(own))):
        run_log.warn(fault)


def _state(
    settings: recipe.Recipe, context: Context, shards: dict[str, str], tracker_run: str, saved: Checkpoint | None
) -> RunState:
    """The checkpoint's state or a new one, with the facts of the present processes."""
    facts = {"world_size": context.world_size, "backend": context.backend, "shards": shards, "tracker_run": tracker_run}
    facts |= {"memory_format": context.layout, "recipe": settings.model_dump(mode="json")}
    first = "pretrain" if settings.searches else "prune"
    return saved.state.model_copy(update=facts) if saved else RunState(phase=first, step=0, global_step=0, **facts)


def _streams(settings: recipe.Recipe, network: nets.GatedNetwork, context: Context) -> tuple[Stream, Stream]:
    """The training stream and the validation stream, on whose shards all processes agree."""
    data, classes = settings.data, settings.model.num_classes or network.num_classes
    if data.decode == "cuda":
        nvjpeg.require(context.device)

    def stream(key: str, train: bool) -> Stream:
        shards = Shards(getattr(data, key), f"data.{key}", classes, data)
        pin = context.device.type == "cuda"
        return Stream(shards, data, settings.seed, train, context.rank, context.world_size, pin)

    train, val = stream("train", True), stream("val", False)
    for one in (train, val):
        preflight.check_shards_agree(one.shards, context)
    preflight.class_warnings([train.shards, val.shards], classes)
    return train, val


def _digests(train: Stream, val: Stream) -> dict[str, str]:
    found = {"data.train": train.shards.fingerprints(), "data.val": val.shards.fingerprints()}
    return {key: hashlib.sha256("\n".join(lines).encode()).hexdigest() for key, lines in found.items()}


def _record_start(run: Run, changed: dict[str, list]) -> None:
    context, run_log, train, image_size = run.context, run.log, run.train, run.recipe.data.image_size
    accumulation, batch = context.accumulation_steps(run.recipe.data), run.recipe.data.global_batch
    full = cost.both_rules(run.supernet, image_size)
    versions = {"python": platform.python_version()}
    for name in ("dnal-dist", "torch", "torchvision", "accelerate", "simplejpeg"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on PYTHONPATH is not an installed package
            versions[name] = version(name)
    run_log.record(
        "start",
        name=run.recipe.name,
        init_from=run.recipe.model.init_from,
        resumed=run.resumed,
        changed=changed or None,
        tracker_run=run_log.tracker_run,
        world_size=context.world_size,
        backend=context.backend,
        precision=context.precision,
        memory_format=context.layout,
        accumulation=accumulation,
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
    run_log.print(
        f"{run.recipe.name}: {run.recipe.model.name}, {full['exact']['macs'] / 1e6:,.2f} M MACs, "
        f"{run.supernet.num_gates} gates; "
        f"{train.samples} training and {run.val.samples} validation images, {train.steps_per_epoch} steps of "
        f"{batch} an epoch ({train.dropped} images left over); "
        f"{context.world_size} process{'es' if context.world_size > 1 else ''} on {_device_name(context.device)}"
        + (f", {context.backend}" if context.world_size > 1 else "")
        + (f", {context.precision}" if context.precision != "float32" else "")
        + (f", {run.local_batch} images each in {accumulation} micro-batches" if accumulation > 1 else "")
    )
    for shards in (train.shards, run.val.shards):
        if shards.cache is not None:
            run_log.print(
                f"{shards.key}: {shards.remote_bytes / 1e9:,.3g} GB elsewhere, read through copies in {shards.cache.folder}"
            )
    for key, (before, after) in changed.items():
        run_log.print(f"changed: {key}: {before} -> {after}")
    if run.resumed:
        run_log.print(f"resumed in {run.state.phase} after {run.state.step} steps ({run.state.global_step} in all)")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
