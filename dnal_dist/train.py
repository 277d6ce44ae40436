"""Train a recipe, from its shards to the compact network and the report.

python -m dnal_dist.train recipes/digits.yaml
python -m dnal_dist.train recipes/digits.yaml architecture.penalty_weight=0.02 seed=3
python -m dnal_dist.train recipes/resnet50_imagenet.yaml --init-from torchvision:resnet50 phases.pretrain.steps=0
accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train recipes/digits.yaml
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dnal_dist import budget, checkpoint, cost, initial, nets, nvjpeg, phases, recipe, report
from dnal_dist.architecture import Architecture
from dnal_dist.folder import has_checkpoints, open_folder
from dnal_dist.parallel import Parallel
from dnal_dist.recipe import InputError
from dnal_dist.shards import Shards
from dnal_dist.stream import Stream
from dnal_dist.track import Track

# How long a process that lost its peers, or leaves it to another to say what is wrong, waits to be ended by the launcher.
PATIENCE_SECONDS = 20
# Exit code of a run that trained to its end, but whose network does not meet the recipe's target.
MISSED = 3


def main() -> None:
    args = _arguments()
    # SIGTERM is how launchers and clusters say stop: it ends the run the way Ctrl-C does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parallel = run = None
    try:
        # As JSON, since YAML would make something else of some names.
        given = [] if args.init_from is None else [f"model.init_from={json.dumps(args.init_from, ensure_ascii=False)}"]
        settings = recipe.load(args.recipe, [*args.overrides, *given])
        parallel = Parallel(settings.tracking.tracker)
        run = assemble(settings, parallel, args.resume, args.overwrite)
        phases.go(run)
        missed = _end(run)
        if missed and parallel.main:
            _say_why(f"error: {missed}")
        parallel.leave(MISSED if missed else 0)
        if missed:
            sys.exit(MISSED)
    except InputError as error:
        _stop(run, parallel, error)
    except KeyboardInterrupt:
        _interrupted(run)
    except RuntimeError as error:
        # Where all is being stopped, a peer or a loader may be gone before the signal to this process comes.
        loader_died = "DataLoader worker" in str(error)
        stopping = isinstance(error.__context__, KeyboardInterrupt)
        if stopping or ((loader_died or (parallel is not None and parallel.world_size > 1)) and _signalled()):
            _interrupted(run)
        if not loader_died:
            raise
        why = str(error).splitlines()[0].rstrip(". ")
        told = f"key 'data.workers': a loader process died ({why}); lower it, or give the machine more (shared) memory"
        _stop(run, parallel, InputError(told, local=True))


def _interrupt(*_) -> None:
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
    folder.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint, if it has one")
    folder.add_argument("--overwrite", action="store_true", help="remove the run that the run folder holds and start anew")
    # Options may stand between overrides.
    return parser.parse_intermixed_args()


def assemble(settings: recipe.Recipe, parallel: Parallel, resume: bool = False, overwrite: bool = False) -> phases.Run:
    """Everything that a run of `settings` needs, its folder prepared, ready for phases.go. Raises InputError."""
    torch.manual_seed(settings.seed)
    data = settings.data
    try:
        network = nets.build(settings.model.name, settings.model.num_classes, settings.model.width)
    except ValueError as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"key 'model.width': the network cannot be built ({why}); lower it or model.num_classes") from None
    classes = settings.model.num_classes or network.num_classes
    rank, world_size = parallel.rank, parallel.world_size
    pin = parallel.device.type == "cuda"
    if data.decode == "cuda":
        nvjpeg.require(parallel.device)
    cache = (data.cache, data.cache_gb)
    train = Stream(Shards(data.train, "data.train", classes, *cache), data, settings.seed, True, rank, world_size, pin)
    val = Stream(Shards(data.val, "data.val", classes, *cache), data, settings.seed, False, rank, world_size, pin)
    for shards in (train.shards, val.shards):
        _same_shards(shards, parallel)
    _refuse_search_without_architecture(settings, train.steps_per_epoch)
    parts = parallel.parts(data)
    _try_network(network, data, data.global_batch // world_size // parts)
    # Raises if the target is out of reach.
    budget.budget(settings.architecture, network, data.image_size)
    folder = Path(settings.output)
    # Before the folder is opened: a run that cannot begin must not replace another.
    begins = parallel.from_main(overwrite or not has_checkpoints(folder))
    given = initial.start_from(network, settings, parallel) if begins and settings.model.init_from else None
    saved, faults = open_folder(folder, settings, parallel, resume, overwrite)
    assert begins or saved is not None
    finished = saved is not None and saved.state["phase"] == "done"
    track = Track(folder, settings, parallel, None if saved is None or finished else saved.state["records"])
    if parallel.idle_gpus:
        faults = [
            *faults,
            f"{parallel.idle_gpus} GPU for {world_size} processes: they run on the CPU; start fewer by --num_processes",
        ]
    if given is not None:
        faults = [*faults, *given.warnings]
        track.say(f"the first weights are those of {given.origin}")
    for fault in (*faults, *dict.fromkeys(parallel.gather([*train.shards.warnings, *val.shards.warnings]))):
        track.warn(fault)
    supernet = network.to(parallel.device)
    architecture = Architecture(network.num_gates).to(parallel.device)
    run = phases.Run(settings, folder, parallel, track, train, val, supernet, architecture)
    if saved is not None:
        checkpoint.restore(run, saved)
    if finished:
        track.say(f"{folder}: this run is finished; nothing is left to train")
    else:
        _tell(run, resumed=saved is not None)
    return run


def _same_shards(shards: Shards, parallel: Parallel) -> None:
    """Raise InputError, on all processes, if one of them finds other shards than the main process."""
    first, *others = parallel.gather([shards.fingerprints()])
    for rank, other in enumerate(others, 1):
        if other != first:
            one, two = next((a, b) for a, b in itertools.zip_longest(first, other, fillvalue="nothing more") if a != b)
            raise InputError(
                f"key '{shards.key}': process {rank} finds other shards than process 0 ({two}; not {one}); "
                f"copy the same files, with their index, to every machine"
            )


def _refuse_search_without_architecture(settings: recipe.Recipe, per_epoch: int) -> None:
    phase = settings.phases.search
    if phase.iterations(per_epoch) <= phase.weight_steps:
        raise InputError(
            f"key 'phases.search.weight_steps': a cycle begins with {phase.weight_steps} weight steps, but the search has only "
            f"{phase.iterations(per_epoch)} iterations, so no gate would ever move; lower it or lengthen the search"
        )


def _try_network(network: nets.GatedNetwork, data: recipe.Data, share: int) -> None:
    """Raise InputError if pictures of the recipe's size, or so few of them in each process, cannot pass through `network`."""
    size = data.image_size
    with torch.no_grad(), nets.resting_statistics(network.train()):
        try:
            network(torch.zeros(2, 3, size, size))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"key 'data.image_size': the network cannot take pictures of {size}x{size} pixels "
                f"({str(error).splitlines()[0]}); change it or key 'model.name'"
            ) from None
        try:
            if share == 1:
                network(torch.zeros(1, 3, size, size))
        except ValueError as error:
            raise InputError(
                f"key 'data.global_batch': {data.global_batch} leaves one picture to a process at a time, too few for BatchNorm "
                f"({error}); raise it, or key 'data.per_device_batch_limit' if that is what divides it"
            ) from None


def _tell(run: phases.Run, resumed: bool) -> None:
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
        full=full,
        versions=versions,
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
    if resumed:
        track.say(f"resumed in {run.phase} after {run.step} steps ({run.global_step} in all)")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _end(run: phases.Run) -> str | None:
    """Close the run and write its report. Returns, on all processes, what to say if the network misses the recipe's target."""
    track = run.track
    track.global_step = run.global_step
    if not track.ended:
        per_phase = {phase: round(s, 3) for phase, s in run.seconds.items()}
        images = run.global_step * run.recipe.data.global_batch
        track.record("end", seconds=round(sum(run.seconds.values()), 3), phase_seconds=per_phase, images=images)
    track.close()
    if run.parallel.main:
        try:
            report.write(run.folder)
        except OSError as error:
            print(
                f"warning: {run.folder / 'report.html'} cannot be written ({error.strerror}); later: "
                f"python -m dnal_dist.report {run.folder}",
                file=sys.stderr,
            )
        report.print_table(run.folder)
    missed = run.parallel.from_main(_missed(run) if run.parallel.main else None)
    run.parallel.close()
    return missed


def _missed(run: phases.Run) -> str | None:
    target = budget.budget(run.recipe.architecture, run.supernet, run.recipe.data.image_size)
    if target is None:
        return None
    found = report.summary(run.folder)["compact"]["exact"][target.unit]
    return None if found in target else target.missed(found)


def _stop(run, parallel, error: InputError) -> None:
    """End with one line that says what was wrong; where all processes of a machine met the same fault, one of them speaks."""
    # The launcher ends all processes as soon as one has ended: the one that speaks must not be cut short by those that do not.
    if error.local or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif _signalled():
        sys.exit(2)
    if run is not None:
        run.track.abandon()
    _say_why(f"error: {error}")
    if run is not None:
        run.track.close()
    if parallel is not None:
        if not error.local:
            parallel.close()
        parallel.leave(2)
    sys.exit(2)


def _say_why(line: str) -> None:
    """On stderr, and on the page about the process that failed first with which a launcher ends."""
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = str(int(time.time()))
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": now}}}))


def _signalled() -> bool:
    """Whether Ctrl-C or SIGTERM comes within PATIENCE_SECONDS."""
    try:
        time.sleep(PATIENCE_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _interrupted(run) -> None:
    """End after Ctrl-C or SIGTERM: say where the run stands and how to go on."""
    # A second signal, or the launcher's own after Ctrl-C, must not cut this short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ.get("RANK", 0)) == 0:
        if run is not None:
            run.track.abandon()
        print(f"\nstopped {_where(run)}", file=sys.stderr, flush=True)
        if run is not None:
            run.track.close()
    # Without the farewells of the process group, which would wait for processes that are gone.
    sys.stdout.flush()
    os._exit(130)


def _where(run) -> str:
    if run is None:
        return "before training began"
    where = f"in {run.phase} after {run.step} steps ({run.global_step} in all); "
    saved, _ = checkpoint.latest(run.folder / "checkpoints")
    if saved is None:
        return where + "no checkpoint yet: --resume begins anew"
    return where + f"its last checkpoint is at step {saved.state['global_step']}: go on with --resume"


if __name__ == "__main__":
    main()
