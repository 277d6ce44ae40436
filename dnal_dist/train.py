"""Train a recipe, from its shards to the compact network and the report.

python -m dnal_dist.train recipes/digits.yaml
python -m dnal_dist.train recipes/digits.yaml architecture.penalty_weight=0.02 seed=3
accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train recipes/digits.yaml
"""

import argparse
import os
import platform
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from dnal_dist import checkpoint, cost, nets, phases, recipe, report
from dnal_dist.architecture import Architecture
from dnal_dist.parallel import Parallel
from dnal_dist.recipe import InputError
from dnal_dist.stream import Shards, Stream
from dnal_dist.track import Track

# What a run writes into its folder, and all that --overwrite removes from it.
PRODUCTS = ("recipe.yaml", "metrics.jsonl", "checkpoints", "compact", "report.html", "wandb")


def main() -> None:
    args = _arguments()
    # SIGTERM is how launchers and clusters say stop: it ends the run the way Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parallel = run = None
    try:
        settings = recipe.load(args.recipe, args.overrides)
        parallel = Parallel(settings.tracking.tracker)
        run = assemble(settings, parallel, args.resume, args.overwrite)
        begun = time.monotonic()
        phases.go(run)
        _end(run, time.monotonic() - begun)
    except InputError as error:
        _stop(run, parallel, error)
    except KeyboardInterrupt:
        _interrupted(run, parallel)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a YAML file such as recipes/digits.yaml; `python -m dnal_dist.recipe --schema` has all keys"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
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
        network = nets.build(settings.model.name, settings.model.num_classes)
    except ValueError as error:
        raise InputError(str(error)) from None
    classes = settings.model.num_classes or network.num_classes
    rank, world_size = parallel.rank, parallel.world_size
    train = Stream(Shards(data.train, "data.train", classes), data, settings.seed, True, rank, world_size)
    val = Stream(Shards(data.val, "data.val", classes), data, settings.seed, False, rank, world_size)
    folder = Path(settings.output)
    saved, faults = open_folder(folder, settings, parallel, resume, overwrite)
    track = Track(folder, settings, parallel, None if saved is None else saved.state["global_step"])
    for fault in faults:
        track.warn(fault)
    supernet = network.to(parallel.device)
    architecture = Architecture(network.num_gates).to(parallel.device)
    run = phases.Run(settings, folder, parallel, track, train, val, supernet, architecture)
    if saved is not None:
        checkpoint.restore(run, saved)
    _tell(run, resumed=saved is not None)
    return run


def open_folder(folder: Path, settings: recipe.Recipe, parallel: Parallel, resume: bool, overwrite: bool):
    """The checkpoint to go on from, or None, and what was found damaged. All processes decide alike, then the main one writes."""
    found = [folder / name for name in PRODUCTS if (folder / name).exists()]
    saved, faults = None, []
    if resume:
        saved, faults = checkpoint.latest(folder / "checkpoints")
    if saved is not None:
        _same_recipe(folder, saved.state["recipe"], settings.model_dump(mode="json"))
    elif found and not overwrite:
        hint = "it has no whole checkpoint to resume from" if resume else "go on with it by --resume"
        raise InputError(
            f"key 'output': {folder} already holds another run; {hint}, or replace it by --overwrite, or name another folder"
        )
    parallel.wait()
    if parallel.main:
        try:
            if saved is None:
                for path in found:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(recipe.dump(settings))
        except OSError as error:
            raise InputError(f"key 'output': {folder} cannot be written ({error.strerror}); name another folder") from None
    return saved, faults


def _same_recipe(folder: Path, old: dict, new: dict) -> None:
    changed = [key for key in _flat(old) | _flat(new) if _flat(old).get(key) != _flat(new).get(key)]
    changed = [key for key in changed if key != "output" and not key.startswith(("tracking.", "data.workers"))]
    if changed:
        told = ", ".join(f"{key}: {_flat(old).get(key)} -> {_flat(new).get(key)}" for key in changed)
        raise InputError(f"{folder}: the recipe has changed since the run began ({told}); undo that, or use --overwrite")


def _flat(tree: dict, head: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return flat


def _tell(run: phases.Run, resumed: bool) -> None:
    parallel, track, train, image_size = run.parallel, run.track, run.train, run.recipe.data.image_size
    full = cost.both_rules(run.supernet, image_size)
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("dnal-dist", "torch", "torchvision", "accelerate", "webdataset")}
    track.global_step = run.global_step
    track.record(
        "start",
        name=run.recipe.name,
        resumed=resumed,
        world_size=parallel.world_size,
        backend=parallel.backend,
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
        f"{run.recipe.data.global_batch} an epoch ({train.dropped} pictures left over); "
        f"{parallel.world_size} process{'es' if parallel.world_size > 1 else ''} on {_device_name(parallel.device)}"
    )
    if resumed:
        track.say(f"resumed in {run.phase} after {run.step} steps ({run.global_step} in all)")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _end(run: phases.Run, seconds: float) -> None:
    track = run.track
    track.global_step = run.global_step
    per_phase = {phase: round(s, 3) for phase, s in run.seconds.items()}
    images = run.global_step * run.recipe.data.global_batch
    track.record("end", seconds=round(sum(run.seconds.values()), 3), phase_seconds=per_phase, images=images)
    track.close()
    if run.parallel.main:
        report.write(run.folder)
        report.print_table(run.folder)
    run.parallel.close()


def _stop(run, parallel, error: InputError) -> None:
    """End with one line that says what was wrong; where all processes of a machine met the same fault, one of them speaks."""
    if run is not None:
        run.track.close()
    if error.local or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if parallel is not None:
        parallel.close()
    sys.exit(2)


def _interrupted(run, parallel) -> None:
    """End after Ctrl-C or SIGTERM: say where the run stands and how to go on."""
    # A second signal, or the launcher's own after Ctrl-C, must not cut this short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ.get("RANK", 0)) == 0:
        if run is None:
            where = "before training began"
        else:
            run.track.close()
            saved, _ = checkpoint.latest(run.folder / "checkpoints")
            where = f"in {run.phase} after {run.step} steps ({run.global_step} in all); "
            where += (
                f"its last checkpoint is at step {saved.state['global_step']}: go on with --resume"
                if saved
                else "no checkpoint yet"
            )
        print(f"\nstopped {where}", file=sys.stderr, flush=True)
    # Without the farewells of the process group, which would wait for processes that are gone.
    sys.stdout.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
