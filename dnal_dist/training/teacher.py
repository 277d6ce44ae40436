"""The network that search and finetune distil from: the run's own as its pretrain left it, or a given one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded
from dnal_dist.distributed.context import Context
from dnal_dist.nets import libraries
from dnal_dist.training.pretrained import digest, together
from dnal_dist.training.run import Run

KEY = "key 'phases.distillation.teacher'"


def of(run: Run) -> Callable[[Tensor], Tensor]:
    """Images -> its logits (n, classes), without gradients."""
    if run.teacher is None:
        run.writer.settle()
        run.context.wait()
        network = copy.deepcopy(run.supernet)
        if run.state.phase != "search" or run.state.step:
            network.load_state_dict(_network_of(_after_pretrain(run.folder, "key 'phases.distillation'")))
        run.teacher = network
    run.teacher.to(run.context.device, memory_format=run.context.memory_format).eval().requires_grad_(False)
    return _Teacher(run.teacher, run.context.device.type, run.context.config.dtype)


def given(settings: recipe.Recipe, classes: int, context: Context) -> nn.Module | None:
    """The teacher that the recipe names, on the CPU; None: the run's own. All processes call this, and raise InputError if one
    cannot read it, if it does not give `classes` logits, or if they do not read the same."""
    distillation = settings.phases.distillation
    if distillation is None or distillation.teacher is None:
        return None
    network, size = together(context, lambda: _read(distillation.teacher)).eval(), settings.data.image_size
    try:
        with torch.no_grad():
            found = tuple(network(torch.zeros(2, 3, size, size)).shape)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"{KEY}: {distillation.teacher} cannot take images of {size} pixels ({error!s:.200})") from None
    if found != (2, classes):
        raise InputError(f"{KEY}: {distillation.teacher} gives {found[-1]} logits an image, but there are {classes} classes")
    if len(set(context.gather([digest(network)]))) > 1:
        raise InputError(f"{KEY}: processes read different weights from {distillation.teacher}; copy the same to every machine")
    return network


def _read(source: str) -> nn.Module:
    if source.partition(":")[0] in ("torchvision", "timm", "compact"):
        return libraries.make(source, pretrained=not source.startswith("compact:"))
    folder = Path(expanded(source, f"{KEY}: "))
    if not (folder / "recipe.yaml").exists():
        raise InputError(
            f"{KEY}: {folder} is no run folder; give one, compact:FOLDER, torchvision:NAME or timm:NAME with published weights"
        )
    network = nets.build(**recipe.load(folder / "recipe.yaml").network)
    try:
        network.load_state_dict(_network_of(_after_pretrain(folder, KEY)))
    except RuntimeError as error:
        raise InputError(f"{KEY}: {folder}: its checkpoint is not of the network in its recipe ({error!s:.200})") from None
    return network


def _after_pretrain(run: Path, key: str) -> checkpoint.Checkpoint:
    try:
        path = checkpoint.after_pretrain(run / "checkpoints")
        saved = None if path is None else checkpoint.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: the network as pretrain left it cannot be read ({error})") from None
    if saved is None or saved.state.step:
        raise InputError(
            f"{key}: {run / 'checkpoints'} holds no checkpoint of pretrain's end; put it back, or remove the folder to start again"
        )
    return saved


def _network_of(saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
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
