"""What every gated network is made of: a BatchNorm that takes the gate into its affine, and a flat gate vector split by site."""

import math
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import NamedTuple

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

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
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
        return normalise(x, running_mean, running_var, weight, bias, batch, momentum, self.eps)


class Gates:
    """The gates of the forward pass at hand, (N + 1,), the last one always open; None: no gates. A network's copy has its own.

    Nothing is kept between passes: the gates' graph may hold what wraps the network.
    """

    current: Tensor | None = None

    def __deepcopy__(self, _) -> "Gates":
        return Gates()


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
        self.gates = {gates: gates.current for module in modules if isinstance(gates := getattr(module, "gates", None), Gates)}

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
    """Conv2d and its BatchNorm; a gate site if `gated`. `forward(x, gate)` returns the normalised, gated output."""

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
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = GatedBatchNorm(outputs, eps)
        self.gated = gated

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.norm(self.conv(x), gate)


class Feed(NamedTuple):
    """The output channels of the layer at path `writer` arrive at another layer's input channels, from `offset` on."""

    writer: str
    offset: int = 0
    around: bool = False
    """It comes along a shortcut."""


class Layer(NamedTuple):
    """One Conv2d or Linear of a gated network, as its cost and its compaction see it."""

    path: str
    """Module path of the Conv2d or Linear. A convolution with groups is depthwise."""
    norm: str | None
    """Module path of the BatchNorm behind it."""
    site: str | None
    """Gate site that decides which of its output channels are needed; None: all of them. It is the layer's own site or, where the
    layer has no gates, that of the depthwise convolution which alone reads it."""
    feeds: tuple[Feed, ...]
    """What writes to its input channels, in forward order; an input channel is alive if any of these is. Empty: all alive."""
    positions: int
    """Output positions, height x width (1 for Linear)."""
    spread: int = 1
    """Input features that one channel becomes: more than one where a Linear reads flattened maps."""
    branch: tuple[str, ...] = ()
    """Sites of the branch it belongs to, in forward order, if the network works without that branch: a shortcut or other
    candidates go around it. One site without any open channel ends what the branch computes."""
    plain: bool = False
    """By the paper's rule it is counted as it stands, whatever closes before it, and its BatchNorm is not."""

    @property
    def gated(self) -> bool:
        """Whether its own outputs have gates."""
        return self.path == f"{self.site}.conv"


class GatedNetwork(nn.Module):
    """A network whose prunable channels can be gated from outside: `net(images, gates)`.

    images (N, 3, H, W); gates flat, float32, (sum of gate_sites,), in the order of gate_sites; None means no gates at all.
    A subclass lists in `units()` its modules that take gates, calls each with its share, and says in `layers()` how channels
    connect.
    """

    gate_sites: dict[str, int]
    """Site name (the module path of a ConvBN) -> channels, in forward order."""

    def finish(self) -> None:
        """To be called at the end of a subclass's __init__: finds the sites and initialises the weights as in the paper."""
        names = {module: name for name, module in self.named_modules()}
        self.gate_sites, self._gates_of_unit = {}, []
        for unit in self.units():
            sites = [module for module in unit.modules() if isinstance(module, ConvBN) and module.gated]
            self.gate_sites |= {names[module]: module.norm.num_features for module in sites}
            self._gates_of_unit.append(len(sites))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size))))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def units(self) -> list[nn.Module]:
        """Modules that take gates, in forward order."""
        raise NotImplementedError

    def layers(self, image_size: int) -> list[Layer]:
        """Every Conv2d and Linear in forward order, for images of `image_size` x `image_size`."""
        raise NotImplementedError

    def shortcuts(self) -> list[str]:
        """Module paths of the blocks with a way around them, in forward order."""
        layers, found = self.layers(1), {}
        branch_of = {layer.path: layer.branch for layer in layers}
        for layer in layers:
            if any(feed.around for feed in layer.feeds):
                last = [site for feed in layer.feeds if not feed.around for site in branch_of[feed.writer]]
                found[shared(last)] = None
        return [block for block in found if block]

    def inner(self, branch: tuple[str, ...]) -> tuple[str, ...]:
        """Sites of which nothing is left when one of a branch is closed; its last writes what is."""
        return branch[:-1]

    def must_have(self) -> list[Tensor] | None:
        """Groups of gates of which one must be open; None where the layers say it."""
        return None

    def ways(self) -> list[list[list[Tensor]]]:
        """For each sum, the ways of which one must be open: groups of gates; nothing where the layers say it."""
        return []

    def streams(self, image_size: int):
        """What costs are computed from (see streams.py); None where the layers say it."""
        return None

    def split(self, gates: Tensor | None) -> list[tuple[Tensor | None, ...]]:
        """One tuple of gates for each unit, views of the flat vector."""
        if gates is None:
            return [(None,) * count for count in self._gates_of_unit]
        parts = iter(gates.split(list(self.gate_sites.values())))
        return [tuple(next(parts) for _ in range(count)) for count in self._gates_of_unit]

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector over all gates (alpha, a keep mask, ...) as site -> its part, views of it."""
        if flat.shape != (self.num_gates,):
            raise ValueError(f"expected one value for each of the {self.num_gates} gates, got shape {tuple(flat.shape)}")
        return dict(zip(self.gate_sites, flat.split(list(self.gate_sites.values())), strict=True))

    @property
    def num_gates(self) -> int:
        return sum(self.gate_sites.values())


def shared(paths: Iterable[str]) -> str:
    """The module path that all paths begin with."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))


def halve(size: int) -> int:
    """Side of the output of a stride-2 convolution with padding kernel // 2."""
    return (size + 1) // 2


def scaled(channels: list[int], width: float, multiple: int = 2) -> list[int]:
    """Channel counts times `width`, each rounded to a multiple (that a shortcut can pad evenly), at least one of it."""
    return [max(multiple, int(c * width / multiple + 0.5) * multiple) for c in channels]


def segments(network: nn.Module) -> list[list[nn.Module]]:
    """The parts of a network whose parameters are gathered, and whose activations are computed again, together: the units of a
    gated network; in a compact one each Sum, or a convolution or Linear with what follows it. In forward order."""
    if isinstance(network, GatedNetwork):
        return [[unit] for unit in network.units()]
    if not isinstance(network, nn.Sequential):
        return [[leaf] for leaf in network.leaves()]
    found: list[list[nn.Module]] = []
    for child in network.children():
        if not found or isinstance(child, nn.Conv2d | nn.Linear) or any(True for _ in child.children()):
            found.append([])
        found[-1].append(child)
    return [segment for segment in found if any(True for module in segment for _ in module.parameters())]
