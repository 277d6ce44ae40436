"""What a network costs: multiply-adds for one picture and parameters, for any choice of channels kept."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.nets import Feed, GatedNetwork, Layer


class Cost(NamedTuple):
    macs: int
    params: int


class Live(NamedTuple):
    """Channels of one layer that do something, as bool masks."""

    inputs: Tensor
    outputs: Tensor


def all_open(net: GatedNetwork) -> Tensor:
    """The keep mask, bool (N,), that keeps every channel."""
    return torch.ones(net.num_gates, dtype=torch.bool)


def without_dead_ends(layers: list[Layer], keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """`keep` by site, with the sites closed that only feed layers without any open output: the function stays the same."""
    keep = dict(keep)
    for layer in reversed(layers):
        if layer.site is None:
            continue
        readers = [reader for reader in layers if any(feed.site == layer.site for feed in reader.feeds)]
        if all(reader.site is not None and not keep[reader.site].any() for reader in readers):
            keep[layer.site] = torch.zeros_like(keep[layer.site])
    return keep


def useful(net: GatedNetwork, keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that the compact network has: those that some open channel reads, directly or not."""
    by_site = without_dead_ends(net.layers(1), net.by_site(keep.cpu()))
    return torch.cat([by_site[site] for site in net.gate_sites])


def liveness(net: GatedNetwork, layers: list[Layer], keep: Tensor) -> list[Live]:
    """For each layer, which input channels can differ from zero and which output channels stay, under `keep`, bool (N,)."""
    by_site = net.by_site(keep.cpu())
    found = []
    for layer in layers:
        inputs, outputs = _channels(net.get_submodule(layer.path))
        alive = torch.zeros(inputs // layer.spread, dtype=torch.bool)
        for feed in layer.feeds:
            alive[feed.offset : feed.offset + len(by_site[feed.site])] |= by_site[feed.site]
        alive = alive.repeat_interleave(layer.spread) if layer.feeds else torch.ones(inputs, dtype=torch.bool)
        found.append(Live(alive, torch.ones(outputs, dtype=torch.bool) if layer.site is None else by_site[layer.site]))
    return found


def count(net: GatedNetwork, image_size: int, keep: Tensor | None = None, rule: str = "exact") -> Cost:
    """Cost of `net` for one picture of image_size x image_size when only the channels of `keep`, bool (N,), stay.

    exact: multiply-adds of Conv2d and Linear; all parameters. Residual-aware: a channel that a shortcut still feeds still costs.
    It is the cost of the compact network. paper: the rule behind the tables of arXiv 2103.02126, which adds one operation for each
    BatchNorm and bias output, counts no BatchNorm of Linear layers, and takes an input channel for closed when the layer right
    before closed it.
    """
    if rule not in ("exact", "paper"):
        raise ValueError(f"unknown rule {rule!r}: expected 'exact' or 'paper'")
    layers = net.layers(image_size)
    keep = all_open(net) if keep is None else keep
    if rule == "paper":
        layers = [layer._replace(feeds=layer.feeds[-1:]) for layer in layers]
    else:
        keep = useful(net, keep)
    live = liveness(net, layers, keep)
    costs = [
        _layer_cost(net, layer, int(live.inputs.sum()), int(live.outputs.sum()), rule)
        for layer, live in zip(layers, live, strict=True)
    ]
    return Cost(sum(c.macs for c in costs), sum(c.params for c in costs))


def both_rules(net: GatedNetwork, image_size: int, keep: Tensor | None = None) -> dict[str, dict[str, int]]:
    """The cost by both rules, as a run's records hold it."""
    return {rule: count(net, image_size, keep, rule)._asdict() for rule in ("exact", "paper")}


class Expected(NamedTuple):
    """Multiply-adds and parameters as differentiable scalars."""

    macs: Tensor
    params: Tensor


def expected_macs(net: GatedNetwork, image_size: int, gates: Tensor) -> Tensor:
    """Scalar, differentiable in `gates` (N,): exact multiply-adds if each gate is the probability that its channel stays.

    Equals `count` when every gate is 0 or 1.
    """
    return expected(net, image_size, gates).macs


def expected(net: GatedNetwork, image_size: int, gates: Tensor) -> Expected:
    """Exact multiply-adds and parameters if each gate of `gates` (N,) is the probability that its channel stays; differentiable."""
    by_site = net.by_site(gates)
    macs, params = gates.new_zeros(()), gates.new_zeros(())
    layers = net.layers(image_size)
    for layer in layers:
        module = net.get_submodule(layer.path)
        inputs, outputs = _channels(module)
        if layer.feeds:
            closed = gates.new_ones(inputs // layer.spread)
            for feed in layer.feeds:
                gate = by_site[feed.site]
                closed = closed * (1 - nn.functional.pad(gate, (feed.offset, len(closed) - feed.offset - len(gate))))
            inputs = (1 - closed).sum() * layer.spread
        if layer.site is not None:
            outputs = by_site[layer.site].sum()
            readers = [reader for reader in layers if Feed(layer.site) in reader.feeds]
            if all(reader.bypassed and len(reader.feeds) == 1 for reader in readers):
                # Inside a branch: when the layers behind it close altogether it costs nothing.
                outputs = outputs * (1 - torch.cat([1 - by_site[reader.site] for reader in readers]).prod())
        weights = _area(module) * inputs * outputs
        macs = macs + layer.positions * weights
        params = params + weights + ((module.bias is not None) + 2 * (layer.norm is not None)) * outputs
    return Expected(macs, params)


def _layer_cost(net: GatedNetwork, layer: Layer, inputs: int, outputs: int, rule: str) -> Cost:
    module = net.get_submodule(layer.path)
    bias = outputs if module.bias is not None else 0
    if rule == "exact":
        if not inputs or not outputs:
            # What is left of a layer without inputs is the constant that its BatchNorm puts out.
            return Cost(0, outputs)
        weights = _area(module) * inputs * outputs
        return Cost(layer.positions * weights, weights + bias + (2 * outputs if layer.norm else 0))
    weights = _area(module) * inputs * outputs
    if isinstance(module, nn.Linear):
        return Cost(weights + outputs, weights + outputs)
    return Cost(layer.positions * weights + outputs + bias, weights + 2 * outputs + bias)


def _channels(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def _area(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else module.kernel_size[0] * module.kernel_size[1]
