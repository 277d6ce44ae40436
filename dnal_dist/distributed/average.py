"""An exponential moving average of a network's weights and running statistics, in the shares that a process holds of them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    """The moving average of `trained`, a wrapped network, which begins with its present weights.

    Like the weights of the optimiser it is in float32, and divided among processes as they are, so that an update sends nothing.
    """

    def __init__(self, trained, decay: float, start: dict[str, Tensor], statistics: Tensor | None):
        """start: the average so far by parameter name, whole; {}: the present weights. statistics: as of flat_statistics.

        All processes must call this."""
        self.trained, self.decay = trained, decay
        self.weights = [share.clone() for share in trained.held()]
        self.statistics = [buffer.clone() for buffer in trained.statistics()]
        if start:
            with torch.no_grad():
                for name in trained.parameters:
                    trained.put(name, start[name].to(trained.options.device))
                # The averages are where the weights were; the weights' copies go back.
                self._exchange(self.weights, trained.held())
        if statistics is not None:
            sizes = [buffer.numel() for buffer in self.statistics]
            for own, values in zip(self.statistics, statistics.to(trained.options.device).split(sizes), strict=True):
                own.copy_(values.view_as(own))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights behind iteration `step` of the phase, from 1 on. Of the first ones it is nearly the plain mean."""
        weight = 1 - min(self.decay, step / (9 + step))
        for own, now in ((self.weights, self.trained.held()), (self.statistics, self.trained.statistics())):
            if own:
                torch._foreach_lerp_(own, now, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the average is where the weights and statistics of the trained copy are."""
        self._exchange(self.weights, self.trained.held())
        self._exchange(self.statistics, self.trained.statistics())
        try:
            yield
        finally:
            self._exchange(self.weights, self.trained.held())
            self._exchange(self.statistics, self.trained.statistics())

    def whole(self) -> dict[str, Tensor]:
        """The average by parameter name. All processes must call this."""
        with self.in_place(), torch.no_grad():
            return {name: self.trained.weight(name).clone() for name in self.trained.parameters}

    def flat_statistics(self) -> Tensor:
        """Those of this process, one after the other."""
        return torch.cat([torch.zeros(0, device=self.trained.options.device), *(one.flatten() for one in self.statistics)])

    @torch.no_grad()
    def _exchange(self, own: list[Tensor], theirs: list[Tensor]) -> None:
        for one, other in zip(own, theirs, strict=True):
            before = other.clone()
            other.copy_(one)
            one.copy_(before)


def pooled(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, (n,), over all processes from those of each, (world size, n), by the law of total variance."""
    mean = means.mean(0)
    return mean, ((variances + means**2).mean(0) - mean**2).clamp_min(0)


def combined(every: Tensor, network: nn.Module) -> Tensor:
    """The averaged buffers of all processes (world size, numbers) as those of one."""
    sizes = {name: buffer.numel() for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    parts = dict(zip(sizes, every.double().split(list(sizes.values()), dim=1), strict=True))
    found = []
    for name, part in parts.items():
        spread = name.endswith("running_var")
        found.append(pooled(parts[name.removesuffix("var") + "mean"], part)[1] if spread else part.mean(0))
    return torch.cat(found).to(every.dtype)
