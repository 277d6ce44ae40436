"""DNAL as published (arXiv 2103.02126), written plainly: the yardstick of this project's steps.

The same networks with the same weights, from a network of dnal_dist: the gate sigmoid(delta * alpha) is a multiplication of its own
behind BatchNorm, each layer has an alpha of its own, every step computes the gradients of weights and alphas alike, activations are
torch's modules, and the finetune trains the full network with closed channels multiplied by 0. Nothing of dnal_dist computes here.
"""

import copy
import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets import GatedNetwork
from dnal_dist.nets.gated import ConvBN
from dnal_dist.nets.mobilenet import MBConv, MobileNetV2
from dnal_dist.nets.resnet import BasicBlock, Bottleneck, BottleneckResNet, ResNet
from dnal_dist.nets.supernet import Cell, Supernet
from dnal_dist.nets.vgg import VGG

STEPS = ("pretrain", "search weights", "architecture", "finetune")
LR, MOMENTUM, WEIGHT_DECAY, ALPHA_LR, PENALTY_WEIGHT = 0.01, 0.9, 4e-5, 0.01, 5e-5


class Unit(nn.Module):
    """Convolution, BatchNorm and, where it is a gate site, the gates of its channels."""

    gates = "absent"
    """absent, soft (sigmoid(delta * alpha)) or mask (0 or 1)."""
    delta = 1.0

    def __init__(self, ours: ConvBN):
        super().__init__()
        self.conv, self.norm = copy.deepcopy(ours.conv), _batchnorm(ours.norm, nn.BatchNorm2d)
        self.conv.__class__ = nn.Conv2d
        channels = ours.norm.num_features
        self.alpha = nn.Parameter(torch.zeros(channels)) if ours.gated else None
        self.register_buffer("mask", torch.ones(channels) if ours.gated else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.alpha is None or self.gates == "absent":
            return x
        gate = torch.sigmoid(self.delta * self.alpha) if self.gates == "soft" else self.mask
        return x * gate.view(1, -1, 1, 1)


class Residual(nn.Module):
    """The sum of branches and of a shortcut, if there is one."""

    def __init__(self, branches: list[nn.Module], shortcut: nn.Module | None):
        super().__init__()
        self.branches, self.shortcut = nn.ModuleList(branches), shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = functools.reduce(operator.add, (branch(x) for branch in self.branches))
        return out if self.shortcut is None else out + self.shortcut(x)


class Padded(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, `pad` zero channels on both sides."""

    def __init__(self, stride: int, pad: int):
        super().__init__()
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class Formulation(nn.Module):
    """`network` in the published formulation, with copies of its weights and statistics; alpha 0 and all masks 1."""

    def __init__(self, network: GatedNetwork):
        super().__init__()
        self.units: dict[str, Unit] = {}
        """Units by the path of the ConvBN that they were made from."""
        self.names = {module: name for name, module in network.named_modules()}
        self.body = _BODIES[type(network.own)](network.own, self)
        del self.names
        self.sites = [self.units[site] for site in network.gate_sites]

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def unit(self, ours: ConvBN) -> Unit:
        made = self.units[self.names[ours]] = Unit(ours)
        return made

    def set_gates(self, gates: str, delta: float = 1.0) -> None:
        for unit in self.sites:
            unit.gates, unit.delta = gates, delta

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """alpha: flat, (N,), in the order of the network's gate_sites."""
        for unit, part in zip(self.sites, alpha.split([len(unit.alpha) for unit in self.sites]), strict=True):
            unit.alpha.copy_(part)

    def set_mask(self, keep: Tensor) -> None:
        """keep: flat, bool (N,)."""
        for unit, part in zip(self.sites, keep.split([len(unit.alpha) for unit in self.sites]), strict=True):
            unit.mask.copy_(part)

    def alphas(self) -> list[nn.Parameter]:
        return [unit.alpha for unit in self.sites]

    def weights(self) -> list[nn.Parameter]:
        alphas = {id(alpha) for alpha in self.alphas()}
        return [parameter for parameter in self.parameters() if id(parameter) not in alphas]


class Trainer:
    """The published steps of a Formulation that is on its device, by torch's own SGD."""

    def __init__(self, network: Formulation, step: str, autocast: torch.dtype | None = None):
        """step: one of STEPS. autocast: type of mixed precision; None computes in float32."""
        self.network, self.step, self.autocast = network.train(), step, autocast
        network.set_gates({"pretrain": "absent", "finetune": "mask"}.get(step, "soft"))
        self.weights = torch.optim.SGD(network.weights(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.alphas = torch.optim.SGD(network.alphas(), lr=ALPHA_LR, momentum=MOMENTUM)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step; the cross-entropy, a scalar on the device."""
        self.weights.zero_grad()
        self.alphas.zero_grad()
        with torch.autocast(images.device.type, self.autocast or torch.float32, enabled=self.autocast is not None):
            logits = self.network(images)
        cross_entropy = loss = F.cross_entropy(logits.float(), labels)
        if self.step in ("search weights", "architecture"):
            loss = loss + PENALTY_WEIGHT * sum(torch.sigmoid(alpha).sum() for alpha in self.network.alphas())
        loss.backward()
        (self.alphas if self.step == "architecture" else self.weights).step()
        return cross_entropy.detach()


def _batchnorm(ours: nn.Module, kind: type[nn.Module]) -> nn.Module:
    norm = kind(ours.num_features, ours.eps, ours.momentum).to(ours.weight)
    norm.load_state_dict(ours.state_dict())
    return norm


def _relu(network: nn.Module) -> nn.Module:
    return nn.ReLU6(inplace=True) if isinstance(network, MobileNetV2 | Supernet) else nn.ReLU(inplace=True)


def _chain(convs: list[ConvBN | None], activation: type[nn.Module], made: Formulation) -> nn.Sequential:
    """The units of `convs` with activations between them."""
    chain = nn.Sequential()
    for conv in convs:
        if conv is not None:
            chain.extend([made.unit(conv), activation(inplace=True)])
    return chain[:-1]


def _block(ours: nn.Module, made: Formulation) -> nn.Module:
    if isinstance(ours, Cell):
        branches = [_block(candidate, made).branches[0] for candidate in ours.children()]
        return Residual(branches, nn.Identity() if ours.identity else None)
    if isinstance(ours, MBConv):
        shortcut = made.unit(ours.shortcut) if ours.shortcut is not None else nn.Identity() if ours.identity else None
        return Residual([_chain([ours.expand, ours.depthwise, ours.project], nn.ReLU6, made)], shortcut)
    if isinstance(ours, BasicBlock):
        return Residual([_chain([ours.conv1, ours.conv2], nn.ReLU, made)], Padded(ours.stride, ours.pad))
    assert isinstance(ours, Bottleneck)
    shortcut = nn.Identity() if ours.downsample is None else made.unit(ours.downsample)
    return Residual([_chain([ours.conv1, ours.conv2, ours.conv3], nn.ReLU, made)], shortcut)


def _classifier(network: nn.Module) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(network.classifier)]


def _mobile(network: MobileNetV2 | Supernet, made: Formulation) -> nn.Sequential:
    blocks = (
        network.blocks
        if isinstance(network, MobileNetV2)
        else [network.first, *(cell for stage in network.stages for cell in stage["cells"])]
    )
    body = nn.Sequential(made.unit(network.stem), _relu(network), *(_block(block, made) for block in blocks))
    return body.extend([made.unit(network.last), _relu(network), *_classifier(network)])


def _residual(network: ResNet | BottleneckResNet, made: Formulation) -> nn.Sequential:
    body = nn.Sequential(made.unit(network.stem), _relu(network))
    if isinstance(network, BottleneckResNet):
        body.append(nn.MaxPool2d(3, 2, 1))
    for stage in network.stages:
        for block in stage:
            body.extend([_block(block, made), _relu(network)])
    return body.extend(_classifier(network))


def _vgg(network: VGG, made: Formulation) -> nn.Sequential:
    body = nn.Sequential()
    for stage in network.stages:
        for conv in stage:
            body.extend([made.unit(conv), _relu(network)])
        body.append(nn.MaxPool2d(2))
    body.extend([nn.AdaptiveAvgPool2d(network.side), nn.Flatten()])
    for module in network.classifier:
        is_norm = hasattr(module, "running_mean")
        body.append(_batchnorm(module, nn.BatchNorm1d) if is_norm else copy.deepcopy(module))
    return body


_BODIES = {VGG: _vgg, ResNet: _residual, BottleneckResNet: _residual, MobileNetV2: _mobile, Supernet: _mobile}
