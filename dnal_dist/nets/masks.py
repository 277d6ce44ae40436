"""Keep masks: which channels are live, useful and present."""

import base64
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dnal_dist.nets.gated import Feed, GatedNetwork, Layer


def rescue(net: GatedNetwork, keep: Tensor, strength: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """`keep`, bool (N,), with channels opened so that something of the image reaches every layer around which there is no way.

    Where all that feeds such a layer closed, the strongest channel of each closed site on one way opens: of the layer right before,
    or of the strongest candidate of a supernet's cell. strength (N,) ranks channels, alpha for example; by default the magnitude of
    their BatchNorm's weight. Returns the mask and the names of the sites that were rescued.
    """
    keep = keep.cpu().clone()
    if (groups := net.must_have()) is not None:
        return _rescue_groups(net, keep, groups, strength)
    parts, layers = net.by_site(keep), net.layers(1)  # the image size has no bearing on which channels connect
    if strength is None:
        norms = (net.get_submodule(site).norm for site in net.gate_sites)
        strength = torch.cat([norm.weight.detach().abs() for norm in norms])
    ranks = net.by_site(strength.detach().cpu())
    by_path = {layer.path: layer for layer in layers}
    rescued = []
    for feeds in {layer.feeds: None for layer in layers if layer.feeds}:
        writers = [by_path[feed.writer] for feed in feeds]
        if any(layer.feeds == feeds and layer.branch and layer.branch == writers[0].branch for layer in layers):
            continue  # inside a branch, which may close as a whole
        # Sites that must be open on each way here; one without gates is always open.
        ways = list({writer.branch or ((writer.site,) if writer.site else ()): None for writer in writers})
        if any(all(parts[site].any() for site in way) for way in ways):
            continue
        for site in max(ways, key=lambda way: min(float(ranks[site].max()) for site in way)):
            if not parts[site].any():
                parts[site][ranks[site].argmax()] = True
                rescued.append(site)
    return keep, rescued


def _rescue_groups(net: GatedNetwork, keep: Tensor, groups: list[Tensor], strength: Tensor | None) -> tuple[Tensor, list[str]]:
    strength = torch.zeros(len(keep)) if strength is None else strength.detach().cpu()
    opened = []
    for group in groups:
        if not keep[group].any():
            opened.append(int(group[strength[group].argmax()]))
            keep[opened[-1]] = True
    for ways in net.ways():
        if not any(all(keep[group].any() for group in way) for way in ways):
            for group in max(ways, key=lambda way: min(float(strength[group].max()) for group in way)):
                if not keep[group].any():
                    opened.append(int(group[strength[group].argmax()]))
                    keep[opened[-1]] = True
    ends = torch.tensor(list(net.gate_sites.values())).cumsum(0)
    names = list(net.gate_sites)
    return keep, list(dict.fromkeys(names[int((ends <= gate).sum())] for gate in opened))


class Live(NamedTuple):
    """Channels of one layer that do something, as bool masks."""

    inputs: Tensor
    outputs: Tensor


def all_open(net: GatedNetwork) -> Tensor:
    """The keep mask, bool (N,), that keeps every channel."""
    return torch.ones(net.num_gates, dtype=torch.bool)


def useful(net: GatedNetwork, keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that have a say in what the network computes: where all channels of a site in a branch
    closed, what lies before it in that branch is read by nothing."""
    keep = keep.cpu().clone()
    by_site = net.by_site(keep)
    for branch in {layer.branch: None for layer in net.layers(1)}:
        closed = [i for i, site in enumerate(branch) if not by_site[site].any()]
        for site in branch[: max(closed, default=0)]:
            by_site[site][:] = False
    return keep


def present(net: GatedNetwork, keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that the compact network has. A branch with a closed site is a constant, of which only the
    last site is left."""
    keep = useful(net, keep)
    by_site = net.by_site(keep)
    for branch in {layer.branch: None for layer in net.layers(1)}:
        if not all(by_site[site].any() for site in branch):
            for site in net.inner(branch):
                by_site[site][:] = False
    return keep


def liveness(net: GatedNetwork, layers: list[Layer], keep: Tensor) -> dict[str, Live]:
    """By layer path, which input channels can differ from zero and which output channels are needed, under `keep`, bool (N,)."""
    by_site = net.by_site(keep.cpu())
    live: dict[str, Live] = {}
    for layer in layers:
        inputs, outputs = channels_of(net.get_submodule(layer.path))
        needed = by_site[layer.site] if layer.site else torch.ones(outputs, dtype=torch.bool)
        live[layer.path] = Live(alive_inputs(layer, layer.feeds, inputs, live), needed)
    return live


def alive_inputs(layer: Layer, feeds: tuple[Feed, ...], inputs: int, live: dict[str, Live]) -> Tensor:
    if not layer.feeds:
        return torch.ones(inputs, dtype=torch.bool)
    alive = torch.zeros(inputs // layer.spread, dtype=torch.bool)
    for feed in feeds:
        written = live[feed.writer].outputs
        alive[feed.offset : feed.offset + len(written)] |= written
    return alive.repeat_interleave(layer.spread)


def is_depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1


def channels_of(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def kernel_area(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else module.kernel_size[0] * module.kernel_size[1]


def pack(keep: Tensor) -> str:
    """A keep mask, bool (N,), as text: base64 of its bits, the first channel in the highest bit."""
    return base64.b64encode(np.packbits(keep.cpu().numpy()).tobytes()).decode()


def unpack(text: str, number: int) -> Tensor:
    """The keep mask, bool (number,), that `pack` wrote. Raises ValueError if it is of another length."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if not number <= len(bits) < number + 8:
        raise ValueError(f"a mask of {number} channels was expected, found {len(bits)} bits")
    return torch.from_numpy(bits[:number].astype(bool))
