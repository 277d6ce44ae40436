"""The loss of a step, where it is more than the cross-entropy with the labels."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common.errors import InputError
from dnal_dist.training import mixing
from dnal_dist.training.run import Run


class Objective(NamedTuple):
    """What a step minimises, summed over its images."""

    label_smoothing: float
    distillation: recipe.Distillation | None
    teacher: Callable[[Tensor], Tensor] | None
    """Images -> logits (n, classes), without gradients; None without distillation."""

    def __call__(self, logits: Tensor, images: Tensor, labels: Tensor, cross_entropy: Tensor) -> Tensor:
        loss = cross_entropy
        if self.label_smoothing:
            loss = mixing.cross_entropy(logits, labels, self.label_smoothing)
        if self.teacher is None:
            return loss
        weight, heat = self.distillation.weight, self.distillation.temperature
        student, taught = ((found / heat).log_softmax(1) for found in (logits, self.teacher(images)))
        # Images that fill a batch up count for nothing.
        counts = (labels >= 0).to(student.dtype) if labels.dim() == 1 else labels.sum(1)
        divergence = (F.kl_div(student, taught, reduction="none", log_target=True).sum(1) * counts).sum()
        return (1 - weight) * loss + weight * heat**2 * divergence


def objective(run: Run, phase: recipe.Phase) -> Objective | None:
    """That of the run's present phase; None: the cross-entropy."""
    distillation = run.recipe.phases.distillation if run.state.phase in ("search", "finetune") else None
    if not phase.label_smoothing and distillation is None:
        return None
    return Objective(phase.label_smoothing, distillation, None if distillation is None else _teacher(run))


def _teacher(run: Run) -> Callable[[Tensor], Tensor]:
    """The network as pretrain left it, from the checkpoint that is kept of it."""
    if run.teacher is None:
        run.writer.settle()
        run.context.wait()
        network = copy.deepcopy(run.supernet)
        if run.state.phase != "search" or run.state.step:
            network.load_state_dict(_after_pretrain(run))
        run.teacher = network.to(run.context.device, memory_format=run.context.memory_format).eval().requires_grad_(False)
    return _Teacher(run.teacher, run.context.device.type, run.context.config.dtype)


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
