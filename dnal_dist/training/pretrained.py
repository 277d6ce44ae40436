"""Initial weights from torchvision, from another run, or from a file."""

import hashlib
import math
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError, reason
from dnal_dist.distributed.context import Context
from dnal_dist.nets import GatedBatchNorm, GatedNetwork
from dnal_dist.nets.libraries import make
from dnal_dist.nets.mobilenet import MobileNetV2, torchvision_mobilenet
from dnal_dist.nets.resnet import BottleneckResNet, torchvision_resnet
from dnal_dist.nets.vgg import VGG, torchvision_vgg
from dnal_dist.recipe import Network as NetworkSettings
from dnal_dist.recipe import Recipe

PUBLISHERS = PREFIX, TIMM = "torchvision:", "timm:"
# Networks by torchvision's name, with ours.
TORCHVISION = {"vgg16_bn": "vgg16_imagenet", "resnet50": "resnet50_imagenet", "mobilenet_v2": "mobilenetv2_imagenet"}
# What wrappers of other programs put before the names of a network's tensors.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema.", "state_dict.", "model_state_dict.", "model_ema.", "network.", "net.")
KEY = "key 'model.init_from'"


class Source(NamedTuple):
    tensors: dict[str, Tensor]
    """Weights and BatchNorm statistics, by our names or by torchvision's."""
    origin: str
    """Description of the source, for messages."""
    warnings: list[str]
    """Warnings about the source."""


def start_from(network: GatedNetwork, settings: Recipe, context: Context) -> Source:
    """Give `network`, on the CPU, the weights and BatchNorm statistics that the recipe's model.init_from names.

    All processes call this, and raise InputError if any of them cannot, or if they do not end with the same weights.
    """
    source = first_of_machine(context, lambda: read(settings))
    warnings = together(context, lambda: fill(network, source, settings.model.name))
    require_same(context, network, KEY, settings.model.init_from)
    return source._replace(warnings=[*source.warnings, *warnings])


def first_of_machine(context: Context, do: Callable):
    """As `together`, but the first process of each machine before the others, which then find what it had to download."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    found = together(context, lambda: do() if first else None)
    return together(context, lambda: found if first else do())


def require_same(context: Context, network: nn.Module, key: str, source: str) -> None:
    """Raise InputError, on all processes, if one has other weights of `source`, which `key` names, than process 0."""
    digests = context.gather([digest(network)]) if context.world_size > 1 else []
    if other := next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None):
        raise InputError(f"{key}: process {other} reads other weights from {source} than process 0; copy the same to every machine")


def together(context: Context, do: Callable):
    """The result of `do` in this process. Raises InputError on all processes if it does on one."""
    found = fault = None
    try:
        found = do()
    except InputError as error:
        fault = str(error)
    faults = context.gather([fault])
    rank = next((rank for rank, fault in enumerate(faults) if fault is not None), None)
    if rank is not None:
        raise InputError(f"process {rank}: {faults[rank]}" if rank else faults[rank])
    return found


def digest(network: nn.Module) -> str:
    """Of all its tensors."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read(settings: Recipe) -> Source:
    """The weights that the recipe's model.init_from names. Raises InputError."""
    source = settings.model.init_from
    if source.startswith(PREFIX):
        return _published(source.removeprefix(PREFIX), settings.model.name)
    if source.startswith(TIMM):
        return _of_timm(source, settings.model)
    # os.path, unlike Path, answers for names that no file can have.
    path = Path(source)
    if os.path.isdir(path):
        return _saved(path, Path(settings.output))
    if not os.path.exists(path):
        known = ", ".join(PREFIX + name for name in TORCHVISION)
        raise InputError(f"{KEY}: there is no {path}; give a run folder, a checkpoint's, a .safetensors file, or one of {known}")
    if path.suffix != ".safetensors":
        raise InputError(f"{KEY}: {path} is no .safetensors file, the only kind that is read; write its state dict as one")
    if not os.path.isfile(path):
        raise InputError(f"{KEY}: {path} is not a regular file; give the .safetensors file itself")
    try:
        return Source(load_file(path), str(path), [])
    except Exception as error:  # what a damaged file makes of its reader is not known beforehand
        raise InputError(f"{KEY}: {path} cannot be read ({reason(error)}); give a whole .safetensors file") from None


def _published(name: str, model: str) -> Source:
    """torchvision's weights of its network `name`, downloaded into its cache unless they are there."""
    # Takes a second to import, so only where it is wanted.
    from torchvision import models
    from torchvision.models import get_model_weights, list_models

    if name not in list_models(module=models):
        raise InputError(f"{KEY}: torchvision has no classifier {name!r}; `torchvision.models.list_models()` names what it has")
    if model not in (TORCHVISION.get(name), PREFIX + name):
        other = TORCHVISION.get(name, PREFIX + name)
        raise InputError(f"{KEY}: {PREFIX}{name} has the weights of {other}, not of {model}; change one of the two")
    weights = get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    found = file.exists()
    try:
        tensors = dict(weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True))
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("not a state dict")
    except Exception as error:
        if found:
            # Its own words may be advice to load the file without care.
            why = f"{file} is not the file that torchvision published ({type(error).__name__}); remove it"
        else:
            why = f"{weights.url} cannot be downloaded ({reason(error)}); put it as {file.name} into {file.parent}"
        raise InputError(f"{KEY}: {why}") from None
    # Auxiliary classifiers belong to another way of training.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}
    return Source(tensors, f"torchvision's {weights}", [])


def _of_timm(source: str, model: NetworkSettings) -> Source:
    """timm's weights of a network, downloaded into its cache unless they are there."""
    if model.name != source:
        raise InputError(f"{KEY}: {source} has weights of its own network, not of {model.name}; change one of the two")
    try:
        network = make(source, None, model.arguments, pretrained=True)
    except InputError:
        raise
    except Exception as error:  # whatever comes of a download
        raise InputError(f"{KEY}: the weights of {source} cannot be downloaded ({reason(error)})") from None
    return Source(network.state_dict(), source, [])


def _saved(path: Path, output: Path) -> Source:
    """The network in a checkpoint's folder, or that of a run folder as pretrain left it."""
    run, faults, where, replaced = path / "checkpoints", [], path.resolve(), output.resolve()
    if where == replaced or replaced / "checkpoints" in (where, *where.parents):
        raise InputError(f"{KEY}: {path} is in the run folder that this run replaces; name another one by key 'output'")
    if os.path.exists(path / "state.json"):
        try:
            saved = checkpoint.read(path)
        except ValueError as error:
            raise InputError(f"{KEY}: {error}; give another") from None
    elif os.path.isdir(run):
        saved, damaged = _of_run(run)
        faults = damaged
        if saved is None:
            raise InputError(f"{KEY}: {faults[0] if faults else f'{run} holds no checkpoint'}; give another run")
    else:
        raise InputError(
            f"{KEY}: {path} is neither a run folder nor a checkpoint's; give runs/NAME or runs/NAME/checkpoints/step-..."
        )
    state, head = saved.state, "network."
    if state.compact is not None:
        raise InputError(
            f"{KEY}: {path} holds a network that is pruned already ({state.phase}); to go on with it, give "
            "phases.search.steps=0, or model.name=compact:RUN to prune it further, or else a checkpoint from before pruning"
        )
    tensors = {name.removeprefix(head): tensor for name, tensor in saved.tensors.items() if name.startswith(head)}
    return Source(tensors, f"{path}, after {state.global_step} iterations", faults)


def _of_run(checkpoints: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The network of a run as its pretrain left it, or, before that, the newest one; and what is wrong with others."""
    damaged = []
    if (path := checkpoint.after_pretrain(checkpoints)) is not None:
        try:
            saved = checkpoint.read(path)
            middle = f"{path} is the first one of the search that is there; pretrain's end was {saved.state.step} steps before"
            return saved, [middle] if saved.state.step else []
        except ValueError as error:
            damaged.append(str(error))
    _, saved, newer = checkpoint.latest(checkpoints)
    warnings = [f"{fault}; it was skipped" for fault in dict.fromkeys([*damaged, *newer.values()])]
    if saved is not None and saved.state.phase == "pretrain":
        warnings.append(f"{checkpoints.parent} was still in its pretrain, at iteration {saved.state.global_step}")
    return saved, warnings


def fill(network: GatedNetwork, source: Source, model: str) -> list[str]:
    """Put the tensors of `source` into `network`, which recipes call `model`, and return warnings.

    A last Linear for another number of classes stays as it is. torchvision's VGG has no BatchNorm behind its hidden Linear layers;
    those of ours then pass values through in evaluation (in training they normalise by the batch). Raises InputError if a name is
    missing or unknown, a shape or kind of number differs, or a value is not finite or a variance negative.
    """
    own = network.state_dict()
    theirs = torchvision_names(network, model)
    source = _without_prefixes(source, own.keys() | theirs.keys())
    by_theirs = len(theirs.keys() & source.tensors.keys()) > len(own.keys() & source.tensors.keys())
    names = theirs if by_theirs else {name: name for name in own}
    # Weights published before PyTorch counted batches lack the counts, which nothing here depends on.
    missing = [name for name in names if name not in source.tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in source.tensors if name not in names]
    if missing or unknown:
        found = [f"{words} {_few(those)}" for words, those in (("lacks", missing), ("has an unknown", unknown)) if those]
        raise InputError(f"{KEY}: {source.origin} {' and '.join(found)}; give weights of the same network as model.name, {model}")
    found = {names[name]: tensor for name, tensor in source.tensors.items()}
    if by_theirs:
        found = _passing(network, own.keys() - theirs.values()) | found
    warnings = source.warnings + _without_other_classes(network, own, found, source.origin)
    for name, tensor in found.items():
        found[name] = _checked(name, tensor, own[name], source.origin)
    network.load_state_dict(own | found)
    return warnings


def _without_prefixes(source: Source, known: Set[str]) -> Source:
    """The source without what other programs put before all names: a wrapper's name, or that of the entry of a larger file."""
    found, removed = source.tensors, ""
    while found and not known & found.keys():
        head = next((head for head in PREFIXES if all(name.startswith(head) for name in found)), None)
        if head is None:
            return source
        found, removed = {name.removeprefix(head): tensor for name, tensor in found.items()}, removed + head
    said = [f"{source.origin}: all names begin with {removed!r}, which is left out"] if removed else []
    return Source(found, source.origin, said)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _passing(network: GatedNetwork, names: set[str]) -> dict[str, Tensor]:
    """Values of `names`, which are those of whole BatchNorms, that make of each the identity in evaluation: it multiplies by
    weight / sqrt(running_var + eps)."""
    found = {}
    for norm in {name.rpartition(".")[0] for name in names}:
        module = network.get_submodule(norm)
        assert isinstance(module, GatedBatchNorm), norm
        ones, zeros = torch.ones(module.num_features), torch.zeros(module.num_features)
        found |= {f"{norm}.weight": ones * math.sqrt(1 + module.eps), f"{norm}.bias": zeros}
        found |= {f"{norm}.running_mean": zeros, f"{norm}.running_var": ones}
    return found


def _without_other_classes(network: nn.Module, own: dict, found: dict, origin: str) -> list[str]:
    """Remove the last layer from `found` if it differs from the network's own in the number of classes alone; return a warning."""
    head = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    weight, classes = found[f"{head}.weight"], len(own[f"{head}.weight"])
    if not weight.dim() or len(weight) == classes or weight.shape[1:] != own[f"{head}.weight"].shape[1:]:
        return []
    for part in ("weight", "bias"):
        found.pop(f"{head}.{part}", None)
    return [f"{origin} has {len(weight)} classes, this network {classes}: its last layer, {head}, begins with random weights"]


def _checked(name: str, tensor: Tensor, own: Tensor, origin: str) -> Tensor:
    """`tensor` in the type of `own`. Raises InputError if it cannot take its place."""
    if tensor.shape != own.shape:
        raise InputError(
            f"{KEY}: {name} of {origin} is of shape {tuple(tensor.shape)}, this network's of {tuple(own.shape)}; "
            "give weights of the same network, or change model.name, model.width or model.num_classes"
        )
    if tensor.is_floating_point() != own.is_floating_point():
        raise InputError(f"{KEY}: {name} of {origin} is of {tensor.dtype}, not {own.dtype}; give weights as they were trained")
    tensor = tensor.to(own.dtype)
    if not tensor.isfinite().all() or (name.endswith("running_var") and (tensor < 0).any()):
        raise InputError(f"{KEY}: {name} of {origin} has values that are not finite, or negative variances; give other weights")
    return tensor


def torchvision_names(network: GatedNetwork, model: str) -> dict[str, str]:
    """Every name of torchvision's state dict of the network that recipes call `model`, and ours of the same tensor. Empty if
    torchvision does not have it."""
    kinds = {VGG: torchvision_vgg, BottleneckResNet: torchvision_resnet, MobileNetV2: torchvision_mobilenet}
    pairs = kinds[type(network.own)](network.own) if model in TORCHVISION.values() else []
    found = {}
    for theirs, ours in pairs:
        found |= {f"{theirs}.{name}": f"{ours}.{name}" for name in network.get_submodule(ours).state_dict()}
    return found
