"""The passes of a gated network through its open channels only, as of slimmable networks (arXiv 1812.08928): parameters and running
statistics stay whole, and each layer takes the part of them that is open."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets.checking import apart, revealing
from dnal_dist.nets.gated import GatedBatchNorm
from dnal_dist.nets.gated_modules import Gated, GatedConv2d, GatedLinear
from dnal_dist.nets.graph import name_of
from dnal_dist.nets.layer_rules import argument_of
from dnal_dist.nets.modules import Channels, Place
from dnal_dist.nets.narrow import Narrow
from dnal_dist.nets.narrowing import Narrowing

if TYPE_CHECKING:
    from dnal_dist.nets.gate import GatedNetwork

# Largest relative difference in float32: an error in what is connected is hundreds of times as large.
TOLERANCE = 1e-3


class Part(nn.Module):
    """A part of a parameter: its entries `at`, by dimension."""

    def __init__(self, own: nn.Parameter, at: dict[int, Tensor]):
        super().__init__()
        self.own, self.at = own, at
        self.last = own.dim() == 4 and own.is_contiguous(memory_format=torch.channels_last)

    def forward(self, gate: Tensor | None = None) -> Tensor:
        found = self.own
        if gate is not None:  # in the type of the weight: gates are float32, whatever the weights are in
            found = (found * gate.view(-1, *(1,) * (found.dim() - 1))).to(found.dtype)
        for dim, those in self.at.items():
            found = found.index_select(dim, those)
        return found.contiguous(memory_format=torch.channels_last) if self.last else found


class PartOfLayer(nn.Module):
    """A part of the convolution or Linear `own`; like: a narrow one of its shape."""

    def __init__(self, own: nn.Conv2d | nn.Linear, like: nn.Module, parts: dict[str, Part]):
        super().__init__()
        self.own, self.like, self.parts = own, like, nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.own._dnal_gate if isinstance(self.own, Gated) else None
        weight, bias = (self.parts[name](gate) if name in self.parts else None for name in ("weight", "bias"))
        return self.like._conv_forward(x, weight, bias) if isinstance(self.own, nn.Conv2d) else F.linear(x, weight, bias)


class PartOfNorm(nn.Module):
    """A part of the BatchNorm `own`: its channels `at`."""

    def __init__(self, own: GatedBatchNorm, at: Tensor):
        super().__init__()
        self.own, self.at = own, at

    def forward(self, x: Tensor) -> Tensor:
        return GatedBatchNorm.forward(self.own, x, self.own._dnal_gate if isinstance(self.own, Gated) else None, self.at)


class Rest(nn.Module):
    """What a BatchNorm gives, (1, channels, 1, 1), behind a convolution whose inputs are all closed; bias: what that one adds."""

    def __init__(self, norm: PartOfNorm, bias: Part | None):
        super().__init__()
        self.norm, self.bias = norm, bias

    def forward(self) -> Tensor:
        zeros = self.norm.own.running_mean.new_zeros(2, len(self.norm.at), 1, 1)
        return self.norm(zeros if self.bias is None else zeros + self.bias().view(1, -1, 1, 1))[:1]


class Slim(nn.Module):
    """The passes of `net` through the channels of `keep`, bool (N,). Raises ValueError where a layer is of a kind that is not
    handled."""

    def __init__(self, net: "GatedNetwork", keep: Tensor):
        super().__init__()
        self.narrowing, used = Narrowing(net.graph, net, net.gating, keep.cpu()), set()
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights
            found = self.narrowing.build()
        self.device = next(net.parameters()).device
        layers = {}
        for step in found.steps:
            if step.kind in ("module", "tensor") and step.target not in layers:
                layers[step.target] = self._part(net, step.target, found.called(step), used)
        steps = [step._replace(kind="module") if step.kind == "tensor" else step for step in found.steps]
        self.narrow = Narrow(steps, layers, {}, found.image_size)
        self.others = [p for p in net.parameters() if p.requires_grad and id(p) not in used]
        """Parameters of which nothing is open."""
        del self.narrowing

    def _part(self, net: "GatedNetwork", path: str, made: nn.Module | Tensor, used: set[int]) -> nn.Module:
        if isinstance(made, Place | Channels):
            return made.to(self.device)
        if path in self.narrowing.constants:
            return self._rest(net, path, used)
        if isinstance(made, Tensor):
            return self._of(path, made, used)
        try:
            own = net.get_submodule(path)
        except AttributeError:
            own = None
        parts = {name: self._of(f"{path}.{name}", parameter, used) for name, parameter in made.named_parameters()}
        if isinstance(own, GatedBatchNorm) and isinstance(made, _BatchNorm) and made.track_running_stats:
            return PartOfNorm(own, self._cuts(f"{path}.running_mean", made.running_mean)[0])
        if type(own) in (nn.Conv2d, nn.Linear, GatedConv2d, GatedLinear) and isinstance(own, type(made)):
            return PartOfLayer(own, made.to("meta"), parts)
        raise ValueError(f"{path} is a {type(made).__name__} of its own kind")

    def _rest(self, net: "GatedNetwork", name: str, used: set[int]) -> Rest:
        graph, node = self.narrowing.graph, self.narrowing.constants[name]
        behind, path = self.narrowing.nodes.reads[node][0], graph.where(node)
        if [name_of(node), name_of(behind)] != ["batch_norm", "conv2d"] or behind.meta["val"].dim() != 4:
            raise ValueError(f"{name} is what several operations leave")
        made = {key: self.narrowing.cut(f"{path}.{key}") for key in ("weight", "bias", "running_mean")}
        at = self._cuts(f"{path}.running_mean", made["running_mean"])[0]
        for key in ("weight", "bias"):
            self._of(f"{path}.{key}", made[key], used)
        bias = graph.tensor_of(argument_of(behind, "bias"))
        return Rest(
            PartOfNorm(net.get_submodule(path), at), None if bias is None else self._of(bias, self.narrowing.cut(bias), used)
        )

    def _of(self, name: str, made: Tensor, used: set[int]) -> Part:
        own = self.narrowing.named.get(name)
        if not isinstance(own, nn.Parameter):
            raise ValueError(f"{name} is no parameter")
        used.add(id(own))
        cuts = {dim: at for dim, at in self._cuts(name, made).items() if len(at) < own.shape[dim] or bool((at.diff() != 1).any())}
        return Part(own, cuts)

    def _cuts(self, name: str, made: Tensor) -> dict[int, Tensor]:
        """By dimension, the entries of a tensor that are open."""
        own, labels = self.narrowing.named[name], self.narrowing.graph.tensors.get(name, {})
        found = {dim: self.narrowing.order(those).to(self.device) for dim, those in labels.items()}
        shape = [len(found[dim]) if dim in found else size for dim, size in enumerate(own.shape)]
        if shape != list(made.shape):
            raise ValueError(f"{name} is not a part of what it is called after")
        return found

    def forward(self, images: Tensor) -> Tensor:
        logits = self.narrow(images)
        # They have a gradient of 0, as where their channels are computed and closed.
        return logits + sum(p.flatten()[:0].sum() for p in self.others) if self.others and torch.is_grad_enabled() else logits


@torch.no_grad()
def is_exact(net: "GatedNetwork", keep: Tensor) -> bool:
    """Whether the passes through the open channels `keep` of `net` give what all channels with closed gates give, as tried on two
    images, and draw no random numbers."""
    generator = torch.Generator().manual_seed(0)
    tried, gates = revealing(net, generator, torch.float32), keep.cpu().float()
    images = torch.randn(2, 3, net.image_size, net.image_size, generator=generator)
    try:
        tried.slim_to(keep)
        found = tried(images, gates)
    except (ValueError, RuntimeError):  # of a kind that is not handled
        return False
    tried.slim_to(torch.ones_like(keep))
    same = apart(tried(images, gates), found) < TOLERANCE
    before = torch.get_rng_state()
    tried.train()(images, gates)
    quiet = torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return same and quiet
