"""The penalty of a search's architecture steps: its weight, and the guard against a collapse of the architecture."""

import torch
from torch import Tensor

from dnal_dist.nets import GatedNetwork, cost
from dnal_dist.recipe import ArchitectureSettings, SearchPhase
from dnal_dist.search.architecture import Architecture
from dnal_dist.search.budgets import Budget
from dnal_dist.search.controller import Loop

# Cycles of the search between two evaluations of the collapse guard.
GUARD_EVERY = 10


class Penalty:
    """The penalty weight of each architecture step: the recipe's, or driven towards `budget` in closed loop."""

    def __init__(
        self,
        settings: ArchitectureSettings,
        phase: SearchPhase,
        steps: int,
        net: GatedNetwork,
        image_size: int,
        architecture: Architecture,
        budget: Budget | None,
    ):
        """steps: iterations of the whole search."""
        self.settings, self.phase, self.steps = settings, phase, steps
        self.net, self.image_size, self.architecture = net, image_size, architecture
        self.budget, self.macs = budget, cost.count(net, image_size).macs
        self.loop: Loop | None = None
        if budget is not None:
            self.loop = Loop(budget, settings, self.cost_fraction, architecture, steps * phase.architecture_steps / phase.cycle)

    def cost_fraction(self, gates: Tensor) -> Tensor:
        """Expected cost at gates (N,), as a fraction of the full network's; a differentiable scalar."""
        if self.budget is None:
            return cost.expected(self.net, self.image_size, gates).macs / self.macs
        return (self.budget.spent(self.net, self.image_size, gates) / self.budget.full).to(gates.dtype)

    def driven(self, delta: float, step: int, lag: float) -> tuple[float, float]:
        """The weight in the search's iteration `step` and the new lag of the closed loop (0 at first). Only with a budget."""
        assert self.loop is not None
        return self.loop.weight(delta, step / self.steps, lag)

    @torch.no_grad()
    def collapsing(self, delta: float) -> float | None:
        """The fraction of MACs left if hardened gates leave less than the recipe's floor, else None.

        Soft gates are no evidence: all of them may be small together, since the next BatchNorm rescales.
        """
        gates = self.architecture.gates(delta)
        hardened = float((4 * gates * (1 - gates)).mean()) < 0.1
        fraction = float(self.cost_fraction(gates))
        return fraction if hardened and fraction < self.settings.min_macs else None

    def guard_is_due(self, step: int) -> bool:
        return (step // self.phase.cycle) % GUARD_EVERY == 0
