"""Criterion taylor: channels close in rounds, first those with the least mean square of the gate's gradients per unit of cost."""

import itertools
import math

import torch
from torch import Tensor

from dnal_dist.nets import GatedNetwork, masks
from dnal_dist.nets.branches import Branch
from dnal_dist.recipe import ArchitectureSettings
from dnal_dist.search import selection
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.budgets import Budget, reaches

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
    gates = (alpha >= 0).double().requires_grad_()
    (price,) = torch.autograd.grad(target.used(net, image_size, gates), gates)
    return torch.where(alpha >= 0, alpha.double() / price.clamp_min(1e-6 * price.max()), alpha.double())


def barred(net: GatedNetwork, image_size: int, keep: Tensor, ranks: Tensor, target: Budget, number: int, round_to: int) -> Tensor:
    """The channels, bool (N,), of the branches that have left their cells by the end of round `number`, if each cell is to have one
    branch in the end: it has fewer of them with each round, and one from half of the rounds on.

    Those stay whose channels among `keep`, bool (N,), have the largest sum of ranks (N,), as far as `target` can be met with them.
    What has left does not come back.
    """
    ranks, keep = ranks.cpu(), keep.cpu()
    still, kept, every = net.by_site(ranks >= 0), net.by_site(ranks.clamp_min(0) * keep), net.by_site(ranks.clamp_min(0))

    def value(branch: Branch) -> tuple[float, ...]:
        return tuple(sum(float(part[site].sum()) for site in branch.sites) for part in (kept, every))

    cells = [(len(cell), [b for b in cell if all(still[site].any() for site in b.sites)]) for cell in net.cells()]
    staying = {branch.operand for _, branches in cells for branch in branches}
    gone = [branch for cell in net.cells() for branch in cell if branch.operand not in staying]
    for count, branches in cells:
        left = math.ceil(count ** max(0.0, 1 - 2 * number / ROUNDS) - 1e-9)
        if len(branches) > left:
            ranked = sorted(branches, key=value, reverse=True)
            choices = itertools.combinations(range(len(ranked)), left)
            leaving = [[branch for i, branch in enumerate(ranked) if i not in stay] for stay in choices]
            gone += next((some for some in leaving if reaches(net, image_size, target, gone + some, round_to)), leaving[0])
    return masks.of_branches(net, gone)


def due(step: int, steps: int, cycle: int) -> int | None:
    """The round that ends before iteration `step` of a search of `steps` iterations, 1 to ROUNDS - 1; None if none does. Each has a
    whole cycle. Pruning ends the last one."""
    rounds = max(1, min(ROUNDS, steps // cycle))
    number = next((k for k in range(1, rounds) if steps * k // rounds == step), None)
    # A short search has fewer and larger rounds.
    return None if number is None else max(1, ROUNDS * number // rounds)


def select(
    net: GatedNetwork, image_size: int, ranks: Tensor, target: Budget, number: int, settings: ArchitectureSettings
) -> Tensor:
    """The keep mask, bool (N,), at the end of round `number`: the channels with the largest ranks (N,), see `strength`, that cost
    what the whole way to `target` allows by then, which falls by the same factor in each round."""
    now, round_to = target if number == ROUNDS else target.on_the_way(number / ROUNDS), settings.round_to
    if settings.candidates == "one":
        keep = selection.select(net, image_size, ranks, now, round_to, exact=False)
        out = barred(net, image_size, keep, ranks, target, number, round_to)
        ranks = ranks.masked_fill(out.to(ranks.device), -torch.inf)
    return selection.select(net, image_size, ranks, now, round_to, exact=number == ROUNDS)


def close(
    net: GatedNetwork, image_size: int, architecture: Architecture, target: Budget, number: int, settings: ArchitectureSettings
) -> None:
    """End round `number`: all channels but those of `select` close. The sums of those that stay begin again at 0."""
    ranks = strength(net, image_size, architecture, target)
    keep = select(net, image_size, ranks, target, number, settings).to(ranks.device)
    alpha = architecture.alpha.detach()
    closes = (alpha >= 0) & ~keep
    place = ranks.masked_fill(~closes, torch.inf).argsort(stable=True).argsort()
    # Earlier ones move out of (-1, 0), where these come.
    fallen = torch.where(closes, (place + 0.5) / (closes.sum() + 1) - 1, alpha - 1)
    alpha.copy_(torch.where(keep, torch.zeros_like(alpha), fallen.to(alpha.dtype)))
