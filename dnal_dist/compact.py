"""From a keep mask to a physically smaller network: plain torch modules, the same function as the masked network.

A compact network is an nn.Sequential; `describe` turns it into JSON and `build` into a network again, so that it can be kept and
loaded without the gated network it came from.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dnal_dist import cost
from dnal_dist.nets import GatedNetwork, Layer
from dnal_dist.nets.resnet import ResNet
from dnal_dist.nets.vgg import VGG


class Constant(nn.Module):
    """What is left of a branch whose first channels all closed: one learnable number a channel, shape (1, C, 1, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Residual(nn.Module):
    """A shortcut and a branch that may each hold only some of the stream's `width` channels.

    x (N, len(carry), H, W) goes to channels `carry` of the stream, every `stride`-th pixel of it; branch(x) is added to channels
    `add`. Both lists rise; a list that names all channels costs nothing. An empty `add` has no branch at all.
    """

    def __init__(self, branch: nn.Sequential, width: int, carry: list[int], add: list[int], stride: int = 1):
        super().__init__()
        self.branch, self.width, self.carry, self.add, self.stride = branch, width, carry, add, stride
        self.register_buffer("_carry", torch.tensor(carry, dtype=torch.long), persistent=False)
        self.register_buffer("_add", torch.tensor(add, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if len(self.carry) < self.width:
            stream = out.new_zeros(out.shape[0], self.width, *out.shape[2:])
            out = stream.index_copy(1, self._carry, out)
        if not self.add:
            return out
        branch = self.branch(x)
        if len(self.add) == self.width:
            return out + branch
        return out.index_add(1, self._add, branch.expand(out.shape[0], -1, *out.shape[2:]))


# What it takes to build each kind of module again, as its constructor's arguments.
_ARGUMENTS = {
    nn.Conv2d: lambda m: [
        *(m.in_channels, m.out_channels, list(m.kernel_size), list(m.stride), list(m.padding)),
        *(list(m.dilation), m.groups, m.bias is not None),
    ],
    nn.Linear: lambda m: (m.in_features, m.out_features, m.bias is not None),
    nn.BatchNorm2d: lambda m: (m.num_features, m.eps, m.momentum),
    nn.BatchNorm1d: lambda m: (m.num_features, m.eps, m.momentum),
    nn.ReLU: lambda m: (m.inplace,),
    nn.MaxPool2d: lambda m: (m.kernel_size,),
    nn.AdaptiveAvgPool2d: lambda m: (m.output_size,),
    nn.Flatten: lambda m: (),
    Constant: lambda m: (m.value.shape[1],),
    Residual: lambda m: (describe(m.branch), m.width, m.carry, m.add, m.stride),
}
_KINDS = {kind.__name__: kind for kind in _ARGUMENTS}


def describe(network: nn.Sequential) -> list:
    """The structure of a compact network as JSON: one [kind, arguments] for each module."""
    return [[type(module).__name__, list(_ARGUMENTS[type(module)](module))] for module in network]


def build(description: list) -> nn.Sequential:
    """The network `describe` told of, freshly initialised. Raises ValueError if it is no such description."""
    network = nn.Sequential()
    for item in description:
        try:
            kind, (*arguments,) = item
            if kind == "Residual":
                arguments[0] = build(arguments[0])
            network.append(_KINDS[kind](*arguments))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"not part of a compact network: {str(item)[:80]} ({error})") from None
    return network


def save(network: nn.Sequential, folder: Path, **facts) -> None:
    """Write `folder`/architecture.json (the description, and `facts` for readers) and weights.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / "weights.safetensors")
    (folder / "architecture.json").write_text(json.dumps({**facts, "network": describe(network)}, indent=1) + "\n")


def load(folder: Path | str) -> nn.Sequential:
    """The compact network saved in `folder`, in eval mode. Raises ValueError naming the file that is missing or wrong."""
    folder = Path(folder)
    try:
        network = build(json.loads((folder / "architecture.json").read_text())["network"])
        network.load_state_dict(load_file(folder / "weights.safetensors"))
    except Exception as error:
        raise ValueError(f"{folder}: no compact network can be loaded from here ({error})") from None
    return network.eval()


def rescue(net: GatedNetwork, keep: Tensor, strength: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """`keep`, bool (N,), with the strongest channel opened in every site that would close although no shortcut goes around it.

    strength (N,) ranks channels, alpha for example; by default the magnitude of their BatchNorm's weight. Returns the mask and the
    names of the sites that were rescued.
    """
    keep = keep.cpu().clone()
    parts = net.by_site(keep)
    ranks = None if strength is None else net.by_site(strength.detach().cpu())
    rescued = []
    # The image size has no bearing on which channels connect.
    for layer in net.layers(1):
        if layer.site is None or layer.bypassed or parts[layer.site].any():
            continue
        rank = net.get_submodule(layer.norm).weight.detach().abs().cpu() if ranks is None else ranks[layer.site]
        parts[layer.site][rank.argmax()] = True
        rescued.append(layer.site)
    return keep, rescued


def reopen(net: GatedNetwork, image_size: int, keep: Tensor, alpha: Tensor, floor: float) -> tuple[Tensor, bool]:
    """`keep` with as many channels opened again as bring the multiply-adds to the share `floor`; and whether any had to be.

    The largest alpha of each site come first, the same share of every site: after a collapse alpha (N,) still ranks the channels of
    a site, but no longer one site against another.
    """
    least = floor * cost.count(net, image_size).macs
    rank = torch.cat([a.argsort(descending=True, stable=True).argsort() / len(a) for a in net.by_site(alpha).values()])
    ranked = rank.argsort(stable=True)

    def with_first(number: int) -> Tensor:
        mask = keep.clone()
        mask[ranked[:number]] = True
        return mask

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if cost.count(net, image_size, with_first(middle)).macs >= least:
            high = middle
        else:
            low = middle + 1
    return with_first(low), low > 0


def compact(net: GatedNetwork, keep: Tensor) -> nn.Sequential:
    """A smaller network with the function of `net` when the gates of the channels not in `keep`, bool (N,), are 0 and the others 1.

    Equal in eval mode up to rounding; `.keep` of the result is the mask it was made with. A site that would close although no
    shortcut goes around it keeps one channel (see `rescue`), with a warning. `net` is left as it is.
    """
    keep, rescued = rescue(net, keep)
    if rescued:
        warnings.warn(f"all channels of {', '.join(rescued)} would close; the strongest one of each stays", stacklevel=2)
    with torch.no_grad():
        network = _FAMILIES[type(net)](net, _Slicer(net, keep))
    network.keep = keep
    return network.to(next(net.parameters()).device).train(net.training)


class _Slicer:
    """Cuts the modules of a gated network down to their live channels."""

    def __init__(self, net: GatedNetwork, keep: Tensor):
        layers = net.layers(1)
        self.net = net
        self.live = {
            layer.path: live for layer, live in zip(layers, cost.liveness(net, layers, cost.useful(net, keep)), strict=True)
        }
        self.layers: dict[str, Layer] = {layer.path: layer for layer in layers}

    def conv(self, path: str) -> list[nn.Module]:
        """Conv2d and BatchNorm2d of the ConvBN whose convolution is at `path`."""
        source, (inputs, outputs) = self.net.get_submodule(path), self.live[path]
        conv = nn.Conv2d(
            int(inputs.sum()), int(outputs.sum()), source.kernel_size, source.stride, source.padding,
            bias=source.bias is not None, device=source.weight.device, dtype=source.weight.dtype,
        )  # fmt: skip
        conv.weight.copy_(source.weight[outputs][:, inputs])
        if source.bias is not None:
            conv.bias.copy_(source.bias[outputs])
        return [conv, self.norm(path, nn.BatchNorm2d)]

    def linear(self, path: str) -> nn.Linear:
        source, (inputs, _) = self.net.get_submodule(path), self.live[path]
        weight = source.weight[:, inputs]
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(source.bias)
        return linear

    def norm(self, path: str, kind: type[nn.Module]) -> nn.Module:
        source, (_, outputs) = self.net.get_submodule(self.layers[path].norm), self.live[path]
        norm = kind(int(outputs.sum()), source.eps, source.momentum, device=source.weight.device, dtype=source.weight.dtype)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(source, name)[outputs])
        norm.num_batches_tracked.copy_(source.num_batches_tracked)
        return norm

    def constant(self, path: str) -> Constant:
        """The output of the ConvBN at `path`, in eval mode, for inputs that are all zero."""
        norm = self.norm(path, nn.BatchNorm2d)
        value = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        constant = Constant(norm.num_features).to(value)
        constant.value.copy_(value.view(1, -1, 1, 1))
        return constant


def _vgg(net: VGG, cut: _Slicer) -> nn.Sequential:
    network = nn.Sequential()
    for s, stage in enumerate(net.stages):
        for c, _ in enumerate(stage):
            network.extend([*cut.conv(f"stages.{s}.{c}.conv"), nn.ReLU(inplace=True)])
        network.append(nn.MaxPool2d(2))
    network.extend([nn.AdaptiveAvgPool2d(net.side), nn.Flatten()])
    for i, module in enumerate(net.classifier):
        if isinstance(module, nn.Linear):
            network.append(cut.linear(path := f"classifier.{i}"))
            if cut.layers[path].norm:
                network.extend([cut.norm(path, nn.BatchNorm1d), nn.ReLU(inplace=True)])
    return network


def _resnet(net: ResNet, cut: _Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU(inplace=True))
    stream = cut.live["stem.conv"].outputs
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            conv1, conv2 = (f"stages.{s}.{b}.{name}.conv" for name in ("conv1", "conv2"))
            added = cut.live[conv2].outputs
            carried = nn.functional.pad(stream, (block.pad, block.pad))
            stream = carried | added
            branch = nn.Sequential()
            if added.any() and not cut.live[conv1].outputs.any():
                branch.append(cut.constant(conv2))
            elif added.any():
                branch.extend([*cut.conv(conv1), nn.ReLU(inplace=True), *cut.conv(conv2)])
            residual = Residual(branch, int(stream.sum()), _positions(carried, stream), _positions(added, stream), block.stride)
            network.extend([residual, nn.ReLU(inplace=True)])
    network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), cut.linear("classifier")])
    return network


def _positions(some: Tensor, among: Tensor) -> list[int]:
    """Where the channels of mask `some` stand in a tensor that holds only the channels of mask `among`."""
    return some[among].nonzero().flatten().tolist()


_FAMILIES = {VGG: _vgg, ResNet: _resnet}
