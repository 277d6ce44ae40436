"""The compact network of a finished run, to be finetuned on: where a recipe has no search."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.distributed.context import Context
from dnal_dist.nets import GatedNetwork, compact, masks
from dnal_dist.nets.libraries import with_classes
from dnal_dist.training.pretrained import KEY, require_same, together


class Finished(NamedTuple):
    keep: Tensor
    """The keep mask, bool (N,)."""
    network: nn.Module
    """On the CPU."""
    origin: str
    """Description of the source, for messages."""
    warnings: list[str]


def read(full: GatedNetwork, settings: recipe.Recipe, context: Context) -> Finished:
    """The compact network of the run that model.init_from names, a last layer for other classes drawn; without init_from, `full`
    with all that it has, which is a compact network already (compact:RUN). All processes call this, and raise InputError if one
    cannot, or if they do not end with the same weights."""
    if settings.model.init_from is None:
        keep = masks.all_open(full)
        return Finished(keep, compact.compact(full, keep).cpu(), settings.model.name, [])
    found = together(context, lambda: _read(full, settings))
    require_same(context, found.network, KEY, settings.model.init_from)
    return found


def _read(full: GatedNetwork, settings: recipe.Recipe) -> Finished:
    given = Path(settings.model.init_from)
    run = given.parent if given.name in ("compact", "export") and (given.parent / "recipe.yaml").exists() else given
    if run.resolve() == Path(settings.output).resolve():
        raise InputError(f"{KEY}: {given} is the run folder that this run replaces; name another one by key 'output'")
    if (run / "manifest.json").exists():
        return _exported(run, full, settings)
    _, saved, damaged = checkpoint.latest(run / "checkpoints") if (run / "checkpoints").is_dir() else (None, None, {})
    if saved is None or saved.state.compact is None or saved.state.mask is None:
        if (given / "manifest.json").exists():
            return _exported(given, full, settings)
        why = next(iter(damaged.values()), f"{run} holds no pruned network")
        raise InputError(
            f"{KEY}: {why}; phases.search has no iterations, so give the folder of a finished run, or model.name=compact:FOLDER"
        )
    _check_same_network(saved.state.recipe, settings, run)
    tensors = {name.removeprefix("network."): t for name, t in saved.tensors.items() if name.startswith("network.")}
    try:
        network, keep = compact.restored(saved.state.compact, tensors), masks.unpack(saved.state.mask, full.num_gates)
    except ValueError as error:
        raise InputError(f"{KEY}: {run}: {error}") from None
    warnings = [*damaged.values(), *_other_classes(network, settings, run)]
    return Finished(keep, network, f"{run}, pruned, after {saved.state.global_step} iterations", warnings)


def _exported(folder: Path, full: GatedNetwork, settings: recipe.Recipe) -> Finished:
    """Of an export without its run."""

    def refused(error: Exception) -> InputError:
        return InputError(f"{KEY}: {folder} is no export that can be finetuned ({reason(error)}); export the run again")

    try:
        names = ("manifest.json", "architecture.json")
        manifest, shape = (json.loads(read_regular(folder / name, compact.MOST_BYTES)) for name in names)
        theirs, mask = dict(manifest["provenance"]["recipe"]), shape["mask"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(error) from None
    _check_same_network(theirs, settings, folder)
    if mask is None:
        raise InputError(
            f"{KEY}: {folder} has layers merged or widened for deployment, which would train as such; give its run's folder, or "
            f"model.name=compact:{folder} without --init-from"
        )
    try:
        network, keep = compact.load(folder).train(), masks.unpack(mask, full.num_gates)
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise ValueError("its weights are no numbers")
        _check_mask(network, keep, full)
    except (ValueError, TypeError) as error:
        raise refused(error) from None
    return Finished(keep, network, f"the export {folder}", _other_classes(network, settings, folder))


def _check_mask(network: nn.Module, keep: Tensor, full: GatedNetwork) -> None:
    """Raises ValueError if `network` is not what `full` is with the channels of `keep`, but for the last layer."""
    shapes = [[tuple(tensor.shape) for tensor in one.state_dict().values()] for one in (network, compact.compact(full, keep))]
    if len(shapes[0]) != len(shapes[1]) or sum(a != b for a, b in zip(*shapes, strict=True)) > 2:
        raise ValueError("its mask is not that of its layers")


def _other_classes(network: nn.Module, settings: recipe.Recipe, source: Path) -> list[str]:
    """A warning if the network gets a last layer for other classes."""
    layer, classes = with_classes(network, settings.model.num_classes), settings.model.num_classes
    if layer is None:
        return []
    return [f"{source} has other classes, this run {classes}: its last layer, {layer}, begins with random weights"]


def _check_same_network(theirs: dict, settings: recipe.Recipe, run: Path) -> None:
    """Raises InputError if the run's network is not the recipe's, but for the classes and the images."""
    own = recipe.flat(settings.model_dump(mode="json"))
    other = recipe.flat(theirs)
    for key in ("model.name", "model.width", "architecture.streams"):
        if key in other and other[key] != own[key]:
            raise InputError(
                f"key '{key}': {own[key]} here, {other[key]} in {run}, whose network is to be finetuned; give the same"
            )
