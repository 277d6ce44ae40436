"""Train a recipe, from its shards to the compact network and the report.

python -m dnal_dist.train recipes/digits.yaml
python -m dnal_dist.train recipes/digits.yaml architecture.penalty_weight=0.02 seed=3 output=runs/other
python -m dnal_dist.train recipes/resnet50_imagenet.yaml --init-from torchvision:resnet50 phases.pretrain.steps=0
accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train recipes/digits.yaml

The same command again goes on where the run stopped, on any number of processes and any backend. SIGTERM, Ctrl-C, SIGUSR1 or a file
named `stop` in the run folder end it politely: it saves and exits with 75, "try again". Other codes: 0 done, 2 something that was
given is wrong (the last line says what), 3 trained, but the target was missed, 130 a second Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dnal_dist import ending, initial, nets, phases, recipe, refusals, saving, stopping
from dnal_dist.checkpoint.writer import Saver
from dnal_dist.common.errors import InputError
from dnal_dist.data import nvjpeg
from dnal_dist.data.pipeline import Stream
from dnal_dist.data.shards import Shards
from dnal_dist.distributed.context import Parallel
from dnal_dist.folder import has_checkpoints, open_folder, private_temp, write_recipe
from dnal_dist.nets import cost
from dnal_dist.run import Run
from dnal_dist.search import selection
from dnal_dist.search.architecture import Architecture
from dnal_dist.stopping import Edges
from dnal_dist.tracking import environment, values
from dnal_dist.tracking.run_log import CLOSE_SECONDS, Track

# Exit code of a run that trained to its end, but whose network does not meet the recipe's target.
MISSED = 3


def main() -> None:
    args = _arguments()
    signals = stopping.Signals(_interrupt)
    parallel = run = None
    try:
        # As JSON, since YAML would make something else of some names.
        given = [] if args.init_from is None else [f"model.init_from={json.dumps(args.init_from, ensure_ascii=False)}"]
        settings = recipe.load(args.recipe, [*args.overrides, *given])
        until = stopping.limit(args.max_time)
        values.require(settings.tracking.tracker)
        parallel = Parallel(settings.tracking.tracker, settings.output)
        # To let go of a tracker that hangs takes four seconds more.
        leaving = 0.0 if settings.tracking.tracker == "none" else CLOSE_SECONDS + 5.0
        edges = Edges(parallel, signals, Path(settings.output) / "stop", until, leaving)
        run = assemble(settings, parallel, edges, args.overwrite, args.allow_changed)
        signals.training = True
        phases.go(run)
        missed = ending.finish(run)
        if missed and parallel.main:
            ending.say_why(f"error: {missed}")
        run.close()
        parallel.leave(MISSED if missed else 0)
        if missed:
            sys.exit(MISSED)
    except stopping.Stopped as stopped:
        ending.leave(run, signals, str(stopped))
    except InputError as error:
        ending.refuse(run, parallel, signals, error)
    except KeyboardInterrupt:
        ending.interrupted(run, signals)
    except RuntimeError as error:
        # Where all is being stopped, a peer or a loader may be gone before the signal to this process comes.
        loader_died = "DataLoader worker" in str(error)
        stopping_all = isinstance(error.__context__, KeyboardInterrupt)
        if stopping_all or ((loader_died or (parallel is not None and parallel.world_size > 1)) and ending.signalled(signals)):
            ending.interrupted(run, signals)
        if not loader_died:
            raise
        why = str(error).splitlines()[0].rstrip(". ")
        told = f"key 'data.workers': a loader process died ({why}); lower it, or give the machine more (shared) memory"
        ending.refuse(run, parallel, signals, InputError(told, local=True))
    finally:
        if run is not None:
            run.close()


def _interrupt() -> None:
    # The same signal may have ended loaders too. Torch would raise an error for each, whatever this process is doing by then.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # At once: a loader that is left in the middle of handing over a batch prints a traceback.
    for loader in multiprocessing.active_children():
        loader.kill()
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a YAML file such as recipes/digits.yaml; `python -m dnal_dist.recipe --schema` has all keys"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument(
        "--init-from",
        metavar="SOURCE",
        help="weights to begin with, the same as model.init_from=SOURCE: torchvision:resnet50 (or vgg16_bn, mobilenet_v2), a run "
        "folder, a folder of its checkpoints, or a .safetensors file; phases.pretrain.steps=0 begins the search with them",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint: what is done anyway")
    folder.add_argument("--overwrite", action="store_true", help="remove the run that the run folder holds and start anew")
    parser.add_argument(
        "--allow-changed",
        metavar="KEY",
        action="append",
        default=[],
        help="go on although this key of the recipe (or those under it) has changed since the run began; may be given again",
    )
    parser.add_argument(
        "--max-time",
        metavar="TIME",
        help="save and exit with 75 in time to be over after so long (3h30m, 90m); a SLURM job's own end is heeded anyway",
    )
    # Options may stand between overrides.
    return parser.parse_intermixed_args()


def assemble(
    settings: recipe.Recipe,
    parallel: Parallel,
    edges: Edges | None = None,
    overwrite: bool = False,
    allowed: Sequence[str] = (),
) -> Run:
    """Everything that a run of `settings` needs, its folder prepared, ready for phases.go. allowed: keys of the recipe that may
    have changed since it began. Raises InputError."""
    torch.manual_seed(settings.seed)
    network = refusals.build_network(settings.model)
    train, val = _streams(settings, network, parallel)
    for stream in (train, val):
        refusals.shards_that_differ(stream.shards, parallel)
    _refuse(settings, network, train, parallel)
    folder = Path(settings.output)
    # Before the folder is opened: a run that cannot begin must not replace another.
    begins = parallel.from_main(overwrite or not has_checkpoints(folder))
    given = initial.start_from(network, settings, parallel) if begins and settings.model.init_from else None
    saved, faults, changed, lock = open_folder(folder, settings, parallel, overwrite, allowed)
    assert begins or saved is not None
    finished = saved is not None and saved.state.phase == "done"
    keep = None if saved is None or finished else saved.state.records
    track = Track(folder, settings, parallel, keep, saved and saved.state.tracker_run)
    if parallel.idle_gpus:
        few = f"{parallel.idle_gpus} GPU for {parallel.world_size} processes"
        faults.append(f"{few}: they run on the CPU; start fewer by --num_processes")
    if given is not None:
        faults += given.warnings
        track.say(f"the first weights are those of {given.origin}")
    for fault in (*faults, *dict.fromkeys(parallel.gather([*train.shards.warnings, *val.shards.warnings]))):
        track.warn(fault)
    private_temp(folder, parallel.rank, parallel.world_size)
    supernet = network.to(parallel.device)
    architecture = Architecture(network.num_gates).to(parallel.device)
    saver = Saver(folder / "checkpoints", settings.checkpoint, track)
    run = Run(
        settings,
        folder,
        parallel,
        track,
        train,
        val,
        supernet,
        architecture,
        saver,
        edges or Edges(parallel),
        lock,
        _digests(train, val),
        saved is not None,
    )
    if saved is not None:
        refusals.other_shards(run, saved.state.shards, allowed)
        saving.restore(run, saved)
        refusals.shorter_phase(run)
        if parallel.main:
            write_recipe(folder, settings)
    if finished:
        track.say(f"{folder}: this run is finished; nothing is left to train")
    else:
        _tell(run, saved is not None, changed)
    return run


def _streams(settings: recipe.Recipe, network: nets.GatedNetwork, parallel: Parallel) -> tuple[Stream, Stream]:
    """Of training and of validation."""
    data, classes = settings.data, settings.model.num_classes or network.num_classes
    if data.decode == "cuda":
        nvjpeg.require(parallel.device)

    def stream(key: str, train: bool) -> Stream:
        shards = Shards(getattr(data, key), f"data.{key}", classes, data.cache, data.cache_gb)
        pin = parallel.device.type == "cuda"
        return Stream(shards, data, settings.seed, train, parallel.rank, parallel.world_size, pin)

    return stream("train", True), stream("val", False)


def _refuse(settings: recipe.Recipe, network: nets.GatedNetwork, train: Stream, parallel: Parallel) -> None:
    """Raise InputError for what would only fail in training."""
    refusals.search_without_architecture(settings, train.steps_per_epoch)
    share = settings.data.global_batch // parallel.world_size // parallel.parts(settings.data)
    refusals.unfit_pictures(network, settings.data, share)
    # Raises if the target is out of reach.
    selection.budget(settings.architecture, network, settings.data.image_size)


def _digests(train: Stream, val: Stream) -> dict[str, str]:
    found = {"data.train": train.shards.fingerprints(), "data.val": val.shards.fingerprints()}
    return {key: hashlib.sha256("\n".join(lines).encode()).hexdigest() for key, lines in found.items()}


def _tell(run: Run, resumed: bool, changed: dict[str, list]) -> None:
    parallel, track, train, image_size = run.parallel, run.track, run.train, run.recipe.data.image_size
    parts, batch = parallel.parts(run.recipe.data), run.recipe.data.global_batch
    full = cost.both_rules(run.supernet, image_size)
    versions = {"python": platform.python_version()}
    for name in ("dnal-dist", "torch", "torchvision", "accelerate", "simplejpeg"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on PYTHONPATH is not an installed package
            versions[name] = version(name)
    track.global_step = run.global_step
    track.record(
        "start",
        name=run.recipe.name,
        init_from=run.recipe.model.init_from,
        resumed=resumed,
        changed=changed or None,
        tracker_run=track.tracker_run,
        world_size=parallel.world_size,
        backend=parallel.backend,
        precision=parallel.precision,
        accumulation=parts,
        device=_device_name(parallel.device),
        train_samples=train.samples,
        val_samples=run.val.samples,
        steps_per_epoch=train.steps_per_epoch,
        dropped_per_epoch=train.dropped,
        sites=run.supernet.gate_sites,
        shortcuts=run.supernet.shortcuts(),
        full=full,
        versions=versions,
        **(environment.facts(parallel.device) if parallel.main else {}),
    )
    track.say(
        f"{run.recipe.name}: {run.recipe.model.name}, {full['exact']['macs'] / 1e6:,.2f} M multiply-adds, "
        f"{run.supernet.num_gates} gates; "
        f"{train.samples} training and {run.val.samples} validation pictures, {train.steps_per_epoch} steps of "
        f"{batch} an epoch ({train.dropped} pictures left over); "
        f"{parallel.world_size} process{'es' if parallel.world_size > 1 else ''} on {_device_name(parallel.device)}"
        + (f", {parallel.backend}" if parallel.world_size > 1 else "")
        + (f", {parallel.precision}" if parallel.precision != "float32" else "")
        + (f", {batch // parallel.world_size} pictures each in {parts} parts" if parts > 1 else "")
    )
    for shards in (train.shards, run.val.shards):
        if shards.cache is not None:
            track.say(f"{shards.key}: {shards.remote_bytes / 1e9:,.3g} GB elsewhere, read through copies in {shards.cache.folder}")
    for key, (before, after) in changed.items():
        track.say(f"changed: {key}: {before} -> {after}")
    if resumed:
        track.say(f"resumed in {run.phase} after {run.step} steps ({run.global_step} in all)")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
