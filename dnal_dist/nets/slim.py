"""The passes of a gated network through its open channels only, as of slimmable networks (arXiv 1812.08928): parameters and running
statistics stay whole, and each layer takes the part of them that is open."""

import copy
import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets.checking import FAULTS, apart
from dnal_dist.nets.convolution import Conv2d
from dnal_dist.nets.gated import GatedBatchNorm
from dnal_dist.nets.gated_modules import GatedConv2d, GatedLinear
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
        gate = getattr(self.own, "_dnal_gate", None)
        weight, bias = (self.parts[name](gate) if name in self.parts else None for name in ("weight", "bias"))
        return self.like._conv_forward(x, weight, bias) if isinstance(self.own, nn.Conv2d) else F.linear(x, weight, bias)


class PartOfNorm(nn.Module):
    """A part of the BatchNorm `own`: its channels `at`."""

    def __init__(self, own: GatedBatchNorm, at: Tensor):
        super().__init__()
        self.own, self.at = own, at

    def forward(self, x: Tensor) -> Tensor:
        return GatedBatchNorm.forward(self.own, x, getattr(self.own, "_dnal_gate", None), self.at)


class ConstantNorm(nn.Module):
    """What a BatchNorm gives, (1, channels, 1, 1), behind a convolution whose inputs are all closed; bias: what that one adds."""

    def __init__(self, norm: PartOfNorm, bias: Part | None):
        super().__init__()
        self.norm, self.bias = norm, bias

    def forward(self) -> Tensor:
        own = self.norm.own
        zeros = own.running_mean.new_zeros(2, len(self.norm.at), 1, 1)
        found = self.norm(zeros if self.bias is None else zeros + self.bias().view(1, -1, 1, 1))[:1]
        return found if own.weight is None else found.to(own.weight.dtype)


class Slim(nn.Module):
    """The passes of `net` through the channels of `keep`, bool (N,). Raises ValueError where a layer is of a kind that is not
    supported."""

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
        self.others = [p for p in net.parameters() if p.requires_grad and p.dim() and id(p) not in used]
        """Parameters of which nothing is open."""
        del self.narrowing

    def _part(self, net: "GatedNetwork", path: str, made: nn.Module | Tensor, used: set[int]) -> nn.Module:
        if isinstance(made, Place | Channels):
            return made.to(self.device)
        if isinstance(made, nn.Dropout) and not made.p:
            return nn.Identity()
        if path in self.narrowing.constants:
            return self._constant(net, path, used)
        if isinstance(made, Tensor):
            return self._of(path, made, used)
        try:
            own = net.get_submodule(path)
        except AttributeError:
            own = None
        parts = {name: self._of(f"{path}.{name}", parameter, used) for name, parameter in made.named_parameters()}
        if isinstance(own, GatedBatchNorm) and isinstance(made, _BatchNorm) and made.track_running_stats:
            return PartOfNorm(own, self._cuts(f"{path}.running_mean", made.running_mean)[0])
        if type(own) in (nn.Conv2d, Conv2d, nn.Linear, GatedConv2d, GatedLinear) and isinstance(own, type(made)):
            return PartOfLayer(own, made.to("meta"), parts)
        raise ValueError(f"{path} is a {type(made).__name__}, which is not supported")

    def _constant(self, net: "GatedNetwork", name: str, used: set[int]) -> ConstantNorm:
        graph, node = self.narrowing.graph, self.narrowing.constants[name]
        behind, path = self.narrowing.nodes.reads[node][0], graph.where(node)
        if [name_of(node), name_of(behind)] != ["batch_norm", "conv2d"] or behind.meta["val"].dim() != 4:
            raise ValueError(f"{name} is what several operations leave")
        norm = net.get_submodule(path)
        at = self._cuts(f"{path}.running_mean", self.narrowing.cut(f"{path}.running_mean"))[0]
        for key in [key for key in ("weight", "bias") if getattr(norm, key) is not None]:
            self._of(f"{path}.{key}", self.narrowing.cut(f"{path}.{key}"), used)
        bias = graph.tensor_of(argument_of(behind, "bias"))
        return ConstantNorm(PartOfNorm(norm, at), bias and self._of(bias, self.narrowing.cut(bias), used))

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
        return logits + sum(p[:0].sum() for p in self.others) if self.others and torch.is_grad_enabled() else logits


@torch.no_grad()
def why_not(net: "GatedNetwork", keep: Tensor) -> str:
    """Why passes through the open channels `keep` alone may not give what all channels with closed gates give; "" if they do, as
    tried with random weights, and draw no random numbers. The answer depends on the network and the mask alone."""
    generator = torch.Generator().manual_seed(0)
    whole, gates = copy.deepcopy(net).cpu().float(), keep.cpu().float()
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        if "running_var" in name:
            tensor.fill_(1)
        elif tensor.is_floating_point():
            values = torch.empty_like(tensor).uniform_(0.1, 0.5, generator=generator)
            size = tensor[0].numel() if tensor.dim() > 1 else 1
            tensor.copy_(values if size == 1 else (values - 0.3) * 5 * size**-0.5)
    slim = copy.deepcopy(whole)
    images = torch.randn(8, 3, net.image_size, net.image_size, generator=generator)
    try:
        slim.slim_to(keep)
        for training, most in ((False, TOLERANCE), (True, 10 * TOLERANCE)):
            before = torch.get_rng_state(), random.getstate()
            expected = whole.train(training)(images, gates)
            drawn = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            if drawn:
                return "the network draws random numbers"
            if not apart(expected, slim.train(training)(images, gates)) < most:
                return "it would not give the same"
    except FAULTS as error:  # of a kind that is not supported
        return str(error).split("\n")[0]
    return ""
