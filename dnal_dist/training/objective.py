"""The loss of a step, where it is more than the cross-entropy with the labels."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dnal_dist import recipe
from dnal_dist.training import mixing, teacher
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
    return Objective(phase.label_smoothing, distillation, None if distillation is None else teacher.of(run))
