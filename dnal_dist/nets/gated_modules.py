"""Modules whose output channels have gates, of the kinds that any network is made of."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets.convolution import Conv2d
from dnal_dist.nets.gated import GatedBatchNorm, Gates


class Gated:
    """What a module becomes whose output channels have gates: `gate`, (channels,), multiplies them. None: no gates."""

    # Names that no layer of a user's has.
    _dnal_gates: Gates
    _dnal_site: int
    """The site whose gates are those of its output channels, one after the other; else -1."""
    _dnal_places: Tensor | None
    """The gate of each output channel, if they are no site's."""

    def take(self, gates: Gates, numbers: Tensor) -> None:
        """numbers: the gate of each output channel, (channels,)."""
        self._dnal_gates, own = gates, numbers.tolist()
        firsts = itertools.pairwise([0, *itertools.accumulate(gates.sizes)])
        sites = [i for i, ends in enumerate(firsts) if ends == (own[0], own[0] + len(own)) and own == list(range(*ends))]
        self._dnal_site = sites[0] if sites else -1
        self.register_buffer("_dnal_places", None if sites else numbers, persistent=False)

    @property
    def _dnal_gate(self) -> Tensor | None:
        if (current := self._dnal_gates.current) is None:
            return None
        return current[self._dnal_site] if self._dnal_places is None else current[-1][self._dnal_places]


class GatedConv2d(Gated, Conv2d):
    """The gate in the weight and the bias."""

    def forward(self, x: Tensor) -> Tensor:
        if (gate := self._dnal_gate) is None:
            return super().forward(x)
        # In the type of the weight: gates are float32, whatever the weights are in.
        weight, bias = self.weight * gate.view(-1, 1, 1, 1), None if self.bias is None else (self.bias * gate).to(self.bias.dtype)
        return self._conv_forward(x, weight.to(self.weight.dtype), bias)


class GatedLinear(Gated, nn.Linear):
    """The gate in the weight and the bias."""

    def forward(self, x: Tensor) -> Tensor:
        if (gate := self._dnal_gate) is None:
            return super().forward(x)
        bias = None if self.bias is None else (self.bias * gate).to(self.bias.dtype)
        return F.linear(x, (self.weight * gate.view(-1, 1)).to(self.weight.dtype), bias)


class GatedNorm(Gated, GatedBatchNorm):
    """The gate in the affine; it takes none from its caller."""

    def forward(self, x: Tensor, gate: None = None) -> Tensor:
        return super().forward(x, self._dnal_gate)


class NormAct(GatedBatchNorm):
    """A BatchNorm with its dropout and activation, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.act(self.drop(super().forward(x, gate)))


class GatedNormAct(Gated, NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self._dnal_gate)


class GatedOutput(Gated):
    """Of a subclass that does more than its base: the gate multiplies the output."""

    def forward(self, x: Tensor) -> Tensor:
        out, gate = super().forward(x), self._dnal_gate
        behind = 0 if isinstance(self, nn.Linear) else out.dim() - 2  # dimensions behind the channels
        return out if gate is None else out * gate.to(out.dtype).view(-1, *(1,) * behind)


def plain_norm(module: nn.Module) -> type | None:
    """The kind with frozen statistics of a BatchNorm without gates; None if its forward is its own."""
    own = type(module)
    if own in (nn.BatchNorm1d, nn.BatchNorm2d):
        return GatedBatchNorm
    if own.forward is _BatchNorm.forward:
        return type(own.__name__, (GatedBatchNorm, own), {})
    return type(own.__name__, (NormAct, own), {}) if {"act", "drop"} <= set(module._modules) else None


def gated_kind(module: nn.Module) -> type:
    plain = {nn.Conv2d: GatedConv2d, nn.Linear: GatedLinear, nn.BatchNorm2d: GatedNorm, nn.BatchNorm1d: GatedNorm}
    plain[GatedBatchNorm] = GatedNorm
    if type(module) in plain:
        return plain[type(module)]
    if isinstance(module, _BatchNorm) and plain_norm(module) is not None:
        kind = GatedNormAct if {"act", "drop"} <= set(module._modules) else GatedNorm
        # What else a derived class does, such as staying in evaluation mode, it still does.
        return type(f"Gated{type(module).__name__}", (kind, type(module)), {})
    return type(f"Gated{type(module).__name__}", (GatedOutput, type(module)), {})
