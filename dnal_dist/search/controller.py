"""The closed loop that drives the penalty weight towards a budget."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dnal_dist.search.architecture import Architecture
from dnal_dist.search.selection import Budget

# The penalty alone would close the gap between the expected cost and where it should be in this part of the search, and in no fewer
# architecture steps than a momentum of 0.9 remembers, or the loop would swing.
RESPONSE, LEAST_STEPS = 0.05, 10
# Part of the search after which the expected cost should have arrived; the rest is left to settle.
ARRIVAL = 0.8


class Loop:
    """The penalty weight of a search in closed loop on the expected cost.

    The expected cost is to go from where all gates are 0.5 to the budget, at an even rate in its logarithm. One SGD step of alpha
    by the penalty alone moves it by weight * gain, gain = lr / (1 - momentum) * <grad log cost, grad penalty>, and the growth of
    delta alone by <grad log cost, alpha> for each unit of log delta. Both are known, so the weight that closes the present gap in
    RESPONSE of the search is known too. A sum of past gaps is added, since the cross-entropy pushes as well. Soft gates may all
    shrink together without any say in the loss; the weight is negative then and pushes them up.
    """

    def __init__(self, target: Budget, settings, share: Callable[[Tensor], Tensor], architecture: Architecture, steps: float):
        """settings: the recipe's `architecture`; share: gates (N,) -> share of the full cost, differentiable; steps: architecture
        steps of the whole search."""
        self.response = max(LEAST_STEPS, RESPONSE * steps)
        self.hardening = math.log(settings.delta_final / settings.delta_start) / steps
        self.share, self.architecture, self.kind = share, architecture, settings.penalty
        self.speed = settings.optimizer.lr / (1 - settings.optimizer.momentum)
        with torch.no_grad():
            self.start = math.log(float(share(torch.full_like(architecture.alpha, 0.5))))
        self.way = math.log((target.least + target.most) / 2 / target.full) - self.start
        self.pace = self.way / steps / ARRIVAL

    def weight(self, delta: float, progress: float, lag: float) -> tuple[float, float]:
        """The weight of the next architecture step, and the new `lag`, a weighted sum of the gaps so far (0 at first), which is all
        of the loop's state. progress: part of the search that lies behind, 0 to 1."""
        alpha = self.architecture.alpha
        (push,) = torch.autograd.grad(self.architecture.penalty(self.kind, delta, self.share), alpha)
        log_cost = self.share(self.architecture.gates(delta)).clamp_min(1e-9).log()
        (slope,) = torch.autograd.grad(log_cost, alpha)
        with torch.no_grad():
            # In one look: each would wait for the device.
            told = torch.stack([log_cost, slope @ alpha, alpha.abs().mean(), push.square().mean().sqrt(), push @ slope]).tolist()
        log_cost, drift, size, strength, gain = told
        gap = log_cost - self.start - self.way * min(1.0, progress / ARRIVAL)
        too_slow = drift * self.hardening - (self.pace if progress < ARRIVAL else 0.0)
        # Where all gates are hard no weight would help, so alpha moves by no more than a part of its own size. The push counts by
        # its root mean square, since a penalty by cost pushes some channels far more than most.
        limit = 2 * max(size, 1 / delta) / self.response / self.speed / max(strength, 1e-12)
        asked = ((gap + lag) / self.response + too_slow) / max(self.speed * gain, 1e-12)
        if abs(asked) < limit or asked * gap < 0:
            # At the limit the sum rests, or it would have to be worked off later.
            lag += gap / (10 * self.response)
        return max(-limit, min(limit, asked)), lag
