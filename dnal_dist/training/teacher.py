"""The network that search and finetune distil from: the run's own as its pretrain left it, or a given one."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint
from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.paths import expanded
from dnal_dist.distributed.context import Context
from dnal_dist.nets import libraries
from dnal_dist.training import pretrained
from dnal_dist.training.run import Run

KEY = "key 'phases.distillation.teacher'"


def of(run: Run) -> Callable[[Tensor], Tensor]:
    """Images -> its logits (n, classes), without gradients."""
    if run.teacher is None:
        run.writer.settle()
        run.context.wait()
        network = copy.deepcopy(run.supernet)
        if run.state.phase != "search" or run.state.step:
            network.load_state_dict(_after_pretrain(run))
        run.teacher = network
    run.teacher.to(run.context.device, memory_format=run.context.memory_format).eval().requires_grad_(False)
    return _Teacher(run.teacher, run.context.device.type, run.context.config.dtype)


def given(settings: recipe.Recipe, classes: int, context: Context) -> nn.Module | None:
    """The teacher that the recipe names, on the CPU; None: the run's own. All processes call this, and raise InputError if one
    cannot read it, if it does not give `classes` logits, or if they do not read the same."""
    distillation = settings.phases.distillation
    if distillation is None or distillation.teacher is None:
        return None
    # A resumed run has its random numbers already.
    with torch.random.fork_rng(devices=[]):
        network = pretrained.first_of_machine(context, lambda: _checked(distillation.teacher, settings, classes))
    pretrained.require_same(context, network, KEY, distillation.teacher)
    return network


def checked(network: nn.Module | None, settings: recipe.Recipe, saved: Checkpoint | None, allowed: Sequence[str]) -> str | None:
    """The digest of a given teacher. Raises InputError if its weights are not those that the saved run began with, unless its key
    is `allowed`."""
    before = None if saved is None else saved.state.teacher
    if network is None:
        return before
    found = pretrained.digest(network)
    if before not in (None, found) and not recipe.is_free("phases.distillation.teacher", set(allowed)):
        raise InputError(
            f"{KEY}: the weights of {settings.phases.distillation.teacher} are not those that the run began with; put those "
            "back, or remove the folder to start again (outside of SLURM: --allow-changed phases.distillation.teacher or "
            "--overwrite)"
        )
    return found


def _checked(source: str, settings: recipe.Recipe, classes: int) -> nn.Module:
    size = settings.data.image_size
    try:
        network = _read(source, settings).eval()
        with torch.no_grad():
            found = network(torch.zeros(2, 3, size, size)).shape[-1]
    except InputError as error:
        raise InputError(str(error).replace(pretrained.KEY, KEY).replace(libraries.KEY, KEY)) from None
    except Exception as error:  # whatever comes of a download, or of another's forward pass
        raise InputError(f"{KEY}: {source} cannot be read, or takes no images of {size} pixels ({reason(error)})") from None
    if found != classes:
        raise InputError(f"{KEY}: {source} gives {found} logits an image, but there are {classes} classes")
    return network


def _read(source: str, settings: recipe.Recipe) -> nn.Module:
    library = source.partition(":")[0]
    if library == "compact":
        return libraries.make(source)
    if library in ("torchvision", "timm"):
        network, named = libraries.make(source), settings.model.model_copy(update={"name": source, "arguments": {}})
    else:
        source = expanded(source, f"{KEY}: ")
        if not (Path(source) / "recipe.yaml").exists():
            raise InputError(
                f"{KEY}: {source} is no run folder; give one, compact:FOLDER, torchvision:NAME or timm:NAME with published weights"
            )
        theirs = recipe.load(Path(source) / "recipe.yaml")
        network, named = nets.build(**theirs.network), theirs.model
    model = named.model_copy(update={"init_from": source, "pretrained": False})
    found = pretrained.read(settings.model_copy(update={"model": model}))
    try:
        network.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise InputError(f"{KEY}: {source}: its weights are not of its network ({error!s:.200})") from None
    return network


def _after_pretrain(run: Run) -> dict[str, Tensor]:
    try:
        path = checkpoint.after_pretrain(run.folder / "checkpoints")
        saved = None if path is None else checkpoint.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"key 'phases.distillation': the network as pretrain left it cannot be read ({error})") from None
    if saved is None or saved.state.step:
        raise InputError(
            f"key 'phases.distillation': {run.folder / 'checkpoints'} holds no checkpoint of pretrain's end; put it back, or "
            "remove the folder to start again"
        )
    head = "network."
    return {name.removeprefix(head): tensor for name, tensor in saved.tensors.items() if name.startswith(head)}


class _Teacher(NamedTuple):
    network: nn.Module
    device: str
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(images).float()
