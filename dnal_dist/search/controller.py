"""The closed loop that drives the penalty weight towards a budget."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dnal_dist.recipe import ArchitectureSettings
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.budgets import Budget

# The penalty alone would close the gap between the expected cost and its set point in this fraction of the search, and in no fewer
# architecture steps than the memory of a momentum of 0.9, or the loop would oscillate.
RESPONSE, LEAST_STEPS = 0.05, 10
# Fraction of the search after which the expected cost should have reached the budget; the rest is left to settle.
ARRIVAL = 0.8


class Loop:
    """The penalty weight of a search in closed loop on the expected cost.

    The expected cost is to go from where all gates are 0.5 to the budget, at an even rate in its logarithm. One SGD step of alpha
    by the penalty alone moves it by weight * gain, gain = lr / (1 - momentum) * <grad log cost, grad penalty>, and the growth of
    delta alone by <grad log cost, alpha> for each unit of log delta. Both are known, so the weight that closes the present gap in
    RESPONSE of the search is known too. A sum of past gaps is added, since the cross-entropy pushes as well. Soft gates may all
    shrink together without an effect on the loss; the weight is negative then and pushes them up.
    """

    def __init__(
        self,
        target: Budget,
        settings: ArchitectureSettings,
        cost_fraction: Callable[[Tensor], Tensor],
        architecture: Architecture,
        steps: float,
    ):
        """cost_fraction: gates (N,) -> fraction of the full cost, differentiable; steps: architecture steps of the whole search."""
        self.response = max(LEAST_STEPS, RESPONSE * steps)
        self.hardening = math.log(settings.delta_final / settings.delta_start) / steps
        self.cost_fraction, self.architecture, self.kind = cost_fraction, architecture, settings.penalty
        self.speed = settings.optimizer.lr / (1 - settings.optimizer.momentum)
        with torch.no_grad():
            self.start = math.log(float(cost_fraction(torch.full_like(architecture.alpha, 0.5))))
        self.way = math.log((target.least + target.most) / 2 / target.full) - self.start
        self.pace = self.way / steps / ARRIVAL

    def weight(self, delta: float, progress: float, lag: float) -> tuple[float, float]:
        """The weight of the next architecture step, and the new `lag`: a weighted sum of the gaps so far (0 at first), the only
        state of the loop. progress: fraction of the search that is done, 0 to 1."""
        alpha = self.architecture.alpha
        (push,) = torch.autograd.grad(self.architecture.penalty(self.kind, delta, self.cost_fraction), alpha)
        log_cost = self.cost_fraction(self.architecture.gates(delta)).clamp_min(1e-9).log()
        (slope,) = torch.autograd.grad(log_cost, alpha)
        with torch.no_grad():
            # In one transfer: each would wait for the device.
            values = torch.stack([log_cost, slope @ alpha, alpha.abs().mean(), push.square().mean().sqrt(), push @ slope]).tolist()
        log_cost, drift, size, strength, gain = values
        gap = log_cost - self.start - self.way * min(1.0, progress / ARRIVAL)
        too_slow = drift * self.hardening - (self.pace if progress < ARRIVAL else 0.0)
        # Where all gates are hard no weight would help, so alpha moves by no more than a fraction of its own size. The push counts
        # by its root mean square, since a penalty by cost pushes some channels far more than most.
        limit = 2 * max(size, 1 / delta) / self.response / self.speed / max(strength, 1e-12)
        wanted = ((gap + lag) / self.response + too_slow) / max(self.speed * gain, 1e-12)
        if abs(wanted) < limit or wanted * gap < 0:
            # At the limit the sum is frozen (anti-windup).
            lag += gap / (10 * self.response)
        return max(-limit, min(limit, wanted)), lag
