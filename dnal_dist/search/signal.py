"""Whether the gates' gradients say anything: a t-test over the first architecture steps of a search."""

import torch
from torch import Tensor

from dnal_dist.recipe import Recipe

# Batches of the test; fewer than LEAST are no ground for a warning.
BATCHES, LEAST = 40, 20
# By chance 5 % of the gates have such a t, in absolute value. With 5 to 17 % alphas chose worse than criterion taylor
# (docs/pareto.md); where weights have not converged it is half of them and more.
HIGH = 2.0
BLIND = 0.2


def add(sums: Tensor | None, gradient: Tensor, counts: Tensor | None = None) -> Tensor:
    """`sums` (3, N), float32: number, mean, and sum of the squared distances from the mean, of the gradients (N,) so far; with one
    more, of the gates that it `counts` for, bool (N,). A gradient that is not finite, of a step that is skipped, does not count."""
    sums = torch.zeros(3, len(gradient), device=gradient.device) if sums is None else sums
    number, mean, spread = sums[0] + 1, sums[1], sums[2]
    off = gradient.float() - mean
    more = torch.stack([number, mean + off / number, spread + off * (off - off / number)])
    finite = gradient.isfinite().all()
    return torch.where(finite if counts is None else finite & counts, more, sums)


def share(sums: Tensor) -> float:
    """Share of the gates whose mean gradient is more than HIGH standard errors from 0."""
    number, mean, spread = sums
    error = (spread / (number - 1).clamp_min(1) / number).sqrt()
    return float((mean.abs() > HIGH * error).float().mean())


def blindness(settings: Recipe, significant: float, batches: int) -> tuple[str, list[str]] | None:
    """What a search by alpha does not see, given the test's share of the gates and number of batches, and what helps; None where it
    sees enough, cannot tell, or does not need it."""
    if significant >= BLIND or batches < LEAST or settings.architecture.criterion == "taylor":
        return None
    first, rate = settings.phases.pretrain, settings.phases.search.optimizer.lr
    remedies = ["use architecture.criterion=taylor with a target"]
    if rate < first.optimizer.lr:
        remedies.append(f"give key 'phases.search.optimizer.lr' ({rate:g}) the full rate of pretrain ({first.optimizer.lr:g})")
    if first.epochs or first.steps:
        remedies.append("shorten key 'phases.pretrain'")
    found = f"the gradients of {significant:.1%} of the gates stand out of noise over {batches} batches, 5% would by chance"
    return f"{found}, as where the weights have converged", remedies
