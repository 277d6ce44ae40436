"""Criterion taylor: channels close in rounds, first those with the least mean square of the gate's gradients per unit of cost."""

import math

import torch
from torch import Tensor

from dnal_dist.nets import GatedNetwork, masks
from dnal_dist.search import selection
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.budgets import Budget

ROUNDS = 8


class Squares:
    """In the place of alpha's optimizer: adds the square of each gradient to the alpha of every open channel."""

    def __init__(self, architecture: Architecture):
        self.alpha = architecture.alpha
        self.param_groups, self.state = [{"params": [self.alpha]}], {}

    @torch.no_grad()
    def step(self) -> None:
        self.alpha += torch.where(self.alpha >= 0, self.alpha.grad.square(), 0)

    def zero_grad(self) -> None:
        self.alpha.grad = None


def strength(net: GatedNetwork, image_size: int, architecture: Architecture, target: Budget) -> Tensor:
    """What ranks the channels, (N,): of open ones alpha for each MAC, parameter or nanosecond that closing this one alone would
    save; of closed ones alpha, which is below 0 and the lower, the earlier they closed."""
    alpha = architecture.alpha.detach()
    # Times have no slope at whole numbers of channels.
    gates = ((alpha >= 0).double() * (1 if target.table is None else 0.999)).requires_grad_()
    (price,) = torch.autograd.grad(target.used(net, image_size, gates), gates)
    return torch.where(alpha >= 0, alpha.double() / price.clamp_min(1e-6 * price.max()), alpha.double())


def barred(net: GatedNetwork, keep: Tensor, ranks: Tensor, number: int) -> Tensor:
    """The channels, bool (N,), of the branches that leave their cells by the end of round `number`, if each cell is to have one
    branch in the end: it has fewer of them with each round, and one from half of the rounds on. Those stay whose channels among
    `keep`, bool (N,), have the largest sum of ranks (N,)."""
    ranks, leaving = ranks.cpu(), []
    # What has left does not come back, even if no gradient came.
    value = net.by_site(torch.where((ranks >= 0) & keep.cpu(), ranks, -torch.finfo(ranks.dtype).tiny))
    for branches in net.cells():
        left = math.ceil(len(branches) ** max(0.0, 1 - 2 * number / ROUNDS) - 1e-9)
        leaving += sorted(branches, key=lambda branch: -sum(float(value[site].sum()) for site in branch.sites))[left:]
    return masks.of_branches(net, leaving)


def due(step: int, steps: int, cycle: int) -> int | None:
    """The round that ends before iteration `step` of a search of `steps` iterations, 1 to ROUNDS - 1; None if none does. Each has a
    whole cycle. Pruning ends the last one."""
    rounds = max(1, min(ROUNDS, steps // cycle))
    number = next((k for k in range(1, rounds) if steps * k // rounds == step), None)
    # A short search has fewer and larger rounds.
    return None if number is None else max(1, ROUNDS * number // rounds)


def select(net: GatedNetwork, image_size: int, architecture: Architecture, target: Budget, number: int, settings) -> Tensor:
    """The keep mask, bool (N,), at the end of round `number`, by a recipe's `architecture` settings: the strongest channels that
    cost what the whole way to `target` allows by then, which falls by the same factor in each round."""
    ranks = strength(net, image_size, architecture, target)
    target = target if number == ROUNDS else target.on_the_way(number / ROUNDS)
    keep = selection.select(net, image_size, ranks, target, settings.round_to)
    if settings.candidates == "one":
        out = barred(net, keep, ranks, number).to(ranks.device)
        keep = selection.select(net, image_size, ranks.masked_fill(out, -torch.inf), target, settings.round_to)
    return keep


def close(net: GatedNetwork, image_size: int, architecture: Architecture, target: Budget, number: int, settings) -> None:
    """End round `number`: all channels but those of `select` close. The sums of those that stay begin again at 0."""
    ranks = strength(net, image_size, architecture, target)
    keep = select(net, image_size, architecture, target, number, settings).to(ranks.device)
    alpha = architecture.alpha.detach()
    closes = (alpha >= 0) & ~keep
    place = ranks.masked_fill(~closes, torch.inf).argsort(stable=True).argsort()
    # Earlier ones move out of (-1, 0), where these come.
    fallen = torch.where(closes, (place + 0.5) / (closes.sum() + 1) - 1, alpha - 1)
    alpha.copy_(torch.where(keep, torch.zeros_like(alpha), fallen.to(alpha.dtype)))
