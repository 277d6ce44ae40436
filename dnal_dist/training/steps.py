"""The two steps. Each moves one parameter group and leaves the other, its gradients and its optimiser exactly as they were."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.common.span import span, spanned
from dnal_dist.distributed.wrapper import Trained
from dnal_dist.nets import frozen_statistics
from dnal_dist.search.architecture import Architecture
from dnal_dist.training import mixing


class Outcome(NamedTuple):
    """Sums over the local batch, as tensors on the device: the loss whose gradient is taken, the cross-entropy, correct answers,
    and the weighted penalty; and the mean over processes of the loss's gradient of alpha, (N,), times the loss scale."""

    loss: Tensor
    cross_entropy: Tensor
    correct: Tensor
    penalty: Tensor | None = None
    gradient: Tensor | None = None


@spanned("forward")
def _forward(trained: Trained, network: nn.Module, images: Tensor, labels: Tensor, gates: Tensor | None) -> Outcome:
    logits = trained.forward(network, images, gates)
    cross_entropy = mixing.cross_entropy(logits, labels)
    loss = cross_entropy if trained.objective is None else trained.objective(logits, images, labels, cross_entropy)
    return Outcome(loss, cross_entropy.detach(), mixing.correct(logits.detach(), labels))


def _micro_batches(images: Tensor, labels: Tensor, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True))


def _sum(outcomes: list[Outcome], *of_alpha: Tensor) -> Outcome:
    loss, cross_entropy = sum(o.loss.detach() for o in outcomes), sum(o.cross_entropy for o in outcomes)
    return Outcome(loss, cross_entropy, sum(o.correct for o in outcomes), *of_alpha)


@spanned("weight step")
def weight_step(
    trained: Trained, images: Tensor, labels: Tensor, batch: int, gates: Tensor | None = None, accumulation: int = 1
) -> Outcome:
    """One step of the weights on images (n, 3, H, W), with the gates (N,) as constants.

    batch: the local batch, by which the summed loss is divided; the mean over processes is then the gradient of the mean over the
    global batch. accumulation: number of micro-batches, taken one after the other and synchronised once.
    """
    gates = None if gates is None else gates.detach()
    micro_batches = [(*micro_batch, gates) for micro_batch in _micro_batches(images, labels, accumulation)]
    return _sum(trained.step(functools.partial(_forward, trained), micro_batches, batch))


def _passes(trained: Trained, batch: int, images: Tensor, labels: Tensor, gates: Tensor) -> Outcome:
    """Of an architecture step: the sums over the images, and the gradient of the gates, (N,), in place of alpha's."""
    gates = gates.detach().requires_grad_()
    with frozen_statistics(trained.module):
        outcome = _forward(trained, trained.module, images, labels, gates)
    with span("backward"):
        (gradient,) = torch.autograd.grad(trained.options.scaler.scale(outcome.loss / batch), gates)
    return outcome._replace(loss=outcome.loss.detach(), gradient=gradient)


@spanned("architecture step")
def architecture_step(
    trained: Trained,
    architecture: Architecture,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch: int,
    delta: float,
    penalty: str,
    penalty_weight: float,
    average_: Callable[[Tensor], Tensor],
    cost_fraction: Callable[[Tensor], Tensor] | None = None,
    accumulation: int = 1,
    clip_norm: float | None = None,
) -> Outcome:
    """One step of alpha on images (n, 3, H, W).

    No weight gradient is computed or synchronised. BatchNorms normalise with batch statistics; the running ones are frozen.
    average_: mean over processes in place, called once. cost_fraction: for the penalties `expected_macs` and `root_macs` (see
    Architecture.penalty). clip_norm: largest norm of the gradient of alpha.
    """
    alpha, scaler = architecture.alpha, trained.options.scaler
    weighted = penalty_weight * architecture.penalty(penalty, delta, cost_fraction)
    with span("backward"):
        (pushed,) = torch.autograd.grad(scaler.scale(weighted), alpha)
    outcomes, gradient = [], pushed
    # With micro-batches weight steps have no graphs, whose memory these would take beside them.
    passes = trained.passes if accumulation == 1 else functools.partial(Trained.passes, trained)
    for micro_batch in _micro_batches(images, labels, accumulation):
        gates = architecture.gates(delta)
        found = passes(functools.partial(_passes, trained, batch), batch, (*micro_batch, gates.detach()))
        # As a sum: given a gradient to begin with, torch would import sympy first, half a second.
        gradient = gradient + torch.autograd.grad((gates * found.gradient).sum(), alpha)[0]
        outcomes.append(found)
    with span("sync"):
        # Together, so that alpha stays the same bit for bit on processes whose penalties round differently, as on GPUs.
        alpha.grad = average_(gradient)
        gradient = alpha.grad - pushed
    with span("optimizer"):
        scaler.unscale_(optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([alpha], clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return _sum(outcomes, weighted.detach(), gradient)
