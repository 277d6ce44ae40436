"""What gated networks are made of: a BatchNorm that takes the gate into its affine, the gates of a forward pass, and a convolution
with its BatchNorm."""

import math
from collections.abc import Callable, Iterable
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GatedBatchNorm(_BatchNorm):
    """BatchNorm over (N, C, ...) whose affine takes a gate g of shape (C,): g * (w * x_hat + b) = (g * w) * x_hat + g * b.

    The product costs C multiplications instead of a pass over the activations, and keeps none of them for the backward pass.
    `gate=None` is plain BatchNorm.
    """

    updates_statistics = True
    """False while the weights rest (see `frozen_statistics`): batch statistics still normalise, the running ones stay."""
    again = False
    """True while activations are computed a second time (see `computing_again`): what the statistics become then is thrown away."""
    across: Callable[..., Tensor] | None = None
    """How to normalise in training, if not with the statistics of this process's batch: a function of what F.batch_norm takes."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor, gate: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """at: the channels that x has, if not all; statistics of others stay."""
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        if at is None:
            self._check_input_dim(x)
        else:
            parts = (weight, bias, running_mean, running_var, gate)
            weight, bias, running_mean, running_var, gate = (t if t is None else t.index_select(0, at) for t in parts)
        if gate is not None:
            weight, bias = (gate, torch.zeros_like(gate)) if weight is None else (weight * gate, bias * gate)
        elif weight is not None and running_mean is not None and running_mean.dtype != weight.dtype:
            weight, bias = weight.to(running_mean.dtype), bias.to(running_mean.dtype)
        momentum, batch = self.momentum, self.training or running_mean is None
        if self.training and not self.updates_statistics:
            running_mean = running_var = None
        elif self.training and self.again and running_mean is not None:
            running_mean, running_var = running_mean.clone(), running_var.clone()
        elif self.training and running_mean is not None:
            self.num_batches_tracked.add_(1)
        if momentum is None:  # a plain mean over all batches
            momentum = 1 / max(1, int(self.num_batches_tracked)) if self.num_batches_tracked is not None else 0.0
        normalise = self.across if self.training and self.across is not None else F.batch_norm
        found = normalise(x, running_mean, running_var, weight, bias, batch, momentum, self.eps)
        if at is not None and self.training and running_mean is not None and not self.again:
            self.running_mean.index_copy_(0, at, running_mean)
            self.running_var.index_copy_(0, at, running_var)
        return found


class Gates:
    """The gates of the forward pass at hand; of a network's copy its own. sizes: gates of each site.

    Nothing is kept between passes: the gates' graph may hold what wraps the network.
    """

    def __init__(self, sizes: list[int]):
        self.sizes = sizes
        self.current: tuple[Tensor, ...] | None = None
        """The gates of each site, and of all, (N + 1,), the last one always open. None: no gates."""

    def __deepcopy__(self, memo: dict) -> "Gates":
        memo[id(self)] = found = Gates(self.sizes)
        return found

    def set(self, gates: Tensor | None) -> None:
        self.current = None if gates is None else (*gates.split(self.sizes), torch.cat([gates, gates.new_ones(1)]))


class frozen_statistics:
    """Context in which no running statistic of `networks` moves, while their BatchNorms normalise as before. May be nested."""

    def __init__(self, *networks: nn.Module):
        self.norms = [m for network in networks for m in network.modules() if isinstance(m, GatedBatchNorm)]

    def __enter__(self) -> None:
        self.before = [norm.updates_statistics for norm in self.norms]
        for norm in self.norms:
            norm.updates_statistics = False

    def __exit__(self, *_) -> None:
        for norm, updates in zip(self.norms, self.before, strict=True):
            norm.updates_statistics = updates


class computing_again:
    """Context in which the forward pass at hand is repeated as it was when this was made, without moving any statistic. The same
    tensors must be saved for the backward pass, so nothing may rest that moved."""

    def __init__(self, *networks: nn.Module):
        self.norms = [m for network in networks for m in network.modules() if isinstance(m, GatedBatchNorm)]
        self.updated = [norm.updates_statistics for norm in self.norms]
        modules = (module for network in networks for module in network.modules())
        self.gates = {gates: gates.current for module in modules if (gates := getattr(module, "_dnal_gates", None)) is not None}

    def __enter__(self) -> None:
        for gates, current in self.gates.items():
            gates.current = current
        self.before = [norm.updates_statistics for norm in self.norms]
        for norm, updates in zip(self.norms, self.updated, strict=True):
            norm.updates_statistics, norm.again = updates, True

    def __exit__(self, *_) -> None:
        for norm, updates in zip(self.norms, self.before, strict=True):
            norm.updates_statistics, norm.again = updates, False
        for gates in self.gates:
            gates.current = None


class ConvBN(nn.Module):
    """Conv2d and its BatchNorm. gated: its output channels have gates. plain: the paper's rule counts it as it stands, whatever
    closes before it, and not its BatchNorm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        bias: bool = False,
        gated: bool = True,
        groups: int = 1,
        eps: float = 1e-5,
        plain: bool = False,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outputs, eps)
        self.gated, self.plain = gated, plain

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def initialise(network: nn.Module) -> None:
    """Weights as in the paper, from torch's global generator."""
    for module in network.modules():
        # On the meta device there is nothing to fill, and torch takes milliseconds for each weight.
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.is_meta:
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size))))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def shared(paths: Iterable[str]) -> str:
    """The module path that all paths begin with."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))


def scaled(channels: list[int], width: float, multiple: int = 2) -> list[int]:
    """Channel counts times `width`, each rounded to a multiple (that a shortcut can pad evenly), at least one of it."""
    return [max(multiple, int(c * width / multiple + 0.5) * multiple) for c in channels]
