"""The two steps. Each moves one parameter group and leaves the other, its gradients and its optimiser exactly as they were."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.architecture import Architecture
from dnal_dist.nets import resting_statistics


class Outcome(NamedTuple):
    """Of this process's part of the batch, as tensors on the device: summed cross-entropy, correct answers, penalty added."""

    cross_entropy: Tensor
    correct: Tensor
    penalty: Tensor | None = None


def _forward(network: nn.Module, images: Tensor, labels: Tensor, gates: Tensor | None) -> Outcome:
    logits = network(images) if gates is None else network(images, gates)
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return Outcome(cross_entropy, (logits.detach().argmax(1) == labels).sum())


def weight_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch: int,
    backward: Callable[[Tensor], None],
    gates: Tensor | None = None,
) -> Outcome:
    """One step of the weights on images (n, 3, H, W), with the gates (N,) as constants.

    network: as wrapped for training, so that `backward` synchronises its gradients. batch: what the summed loss is divided by, this
    process's share of the global batch; the mean over processes is then the gradient of the mean over the global batch.
    """
    network.train()
    found = _forward(network, images, labels, None if gates is None else gates.detach())
    backward(found.cross_entropy / batch)
    optimizer.step()
    optimizer.zero_grad()
    return Outcome(found.cross_entropy.detach(), found.correct)


def architecture_step(
    network: nn.Module,
    architecture: Architecture,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch: int,
    delta: float,
    penalty: str,
    penalty_weight: float,
    average_: Callable[[Tensor], Tensor],
    share: Callable[[Tensor], Tensor] | None = None,
) -> Outcome:
    """One step of alpha on images (n, 3, H, W).

    network: the bare module, since nothing of its weights is to be synchronised, nor is any gradient of them computed. Its
    BatchNorms normalise with batch statistics; the running ones rest. average_: mean over processes in place, called once. share:
    what the penalties `expected_macs` and `root_macs` are made of (see Architecture.penalty).
    """
    network.train()
    with resting_statistics(network):
        found = _forward(network, images, labels, architecture.gates(delta))
    weighted = penalty_weight * architecture.penalty(penalty, delta, share)
    (gradient,) = torch.autograd.grad(found.cross_entropy / batch + weighted, architecture.alpha)
    architecture.alpha.grad = average_(gradient)
    optimizer.step()
    optimizer.zero_grad()
    return Outcome(found.cross_entropy.detach(), found.correct, weighted.detach())
