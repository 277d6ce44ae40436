"""The architecture parameters: one flat vector for the whole network. Nothing here knows about networks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Architecture(nn.Module):
    """All architecture parameters of a network, `alpha` of shape (N,), float32, one for each prunable channel, starting at 0.

    hard: gates are 1 where alpha is at least 0, else 0; see taylor.py.
    """

    def __init__(self, num_gates: int, hard: bool = False):
        super().__init__()
        self.hard = hard
        self.alpha = nn.Parameter(torch.zeros(num_gates))

    def gates(self, delta: float) -> Tensor:
        """Gates sigmoid(delta * alpha), shape (N,): 0.5 at the start, 0 or 1 as delta grows. Hard ones pass their gradient on."""
        if self.hard:
            return (self.alpha.detach() >= 0).to(self.alpha.dtype) + (self.alpha - self.alpha.detach())
        return torch.sigmoid(delta * self.alpha)

    def penalty(self, kind: str, delta: float, cost_fraction: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Scalar that pushes gates to close: the sum over channels of sigmoid(alpha) (`sigmoid`, as in the authors' code), the sum
        of the gates (`scaled_sigmoid`), the expected cost as a fraction of the full network's (`expected_macs`), or the mean gate,
        each weighted by the square root of its channel's present cost (`root_macs`). cost_fraction, needed by the last two: gates
        (N,) -> that fraction, differentiable; a channel's cost is its gradient."""
        if kind == "sigmoid":
            return torch.sigmoid(self.alpha).sum()
        if kind == "scaled_sigmoid":
            return self.gates(delta).sum()
        if kind == "expected_macs" and cost_fraction is not None:
            return cost_fraction(self.gates(delta))
        if kind == "root_macs" and cost_fraction is not None:
            gates = self.gates(delta)
            at = gates.detach().requires_grad_()
            weights = torch.autograd.grad(cost_fraction(at), at)[0].clamp_min(1e-12).sqrt()
            return gates @ weights / weights.sum()
        known = "'sigmoid', 'scaled_sigmoid' or, with a cost, 'expected_macs' or 'root_macs'"
        raise ValueError(f"unknown penalty kind {kind!r}: expected {known}")

    @torch.no_grad()
    def keep(self, delta: float, threshold: float) -> Tensor:
        """The keep mask, bool (N,): channels whose gate is above `threshold`."""
        return self.gates(delta) > threshold
