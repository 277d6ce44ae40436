"""From a keep mask to a physically smaller network: plain torch modules, the same function as the masked network.

A compact network is an nn.Sequential; `describe` turns it into JSON and `build` into a network again, so that it can be kept and
loaded without the gated network it came from.
"""

import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dnal_dist import cost
from dnal_dist.common import atomic
from dnal_dist.nets import GatedNetwork, Layer
from dnal_dist.nets.mobilenet import MBConv, MobileNetV2
from dnal_dist.nets.resnet import BottleneckResNet, ResNet
from dnal_dist.nets.supernet import Supernet
from dnal_dist.nets.vgg import VGG


def _check_rising(channels: list[int], width: float = math.inf) -> None:
    """Raise ValueError unless `channels` are whole numbers that rise, from 0 to below `width`."""
    if not all(type(c) is int and 0 <= c < width for c in channels) or any(a >= b for a, b in pairwise(channels)):
        raise ValueError(f"not rising channel numbers below {width}: {str(channels)[:40]}")


class Constant(nn.Module):
    """What is left of a branch whose first channels all closed: one learnable number a channel, shape (1, C, 1, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Channels(nn.Module):
    """Channels `those`, a rising list, of x (N, C, H, W)."""

    def __init__(self, those: list[int]):
        super().__init__()
        _check_rising(those)
        self.those = those
        self.register_buffer("_those", torch.tensor(those, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self._those)


class Sum(nn.Module):
    """A sum of branches, each of which may write only some of the stream's `width` channels, and of a shortcut, if there is one.

    branches[i](x) is added to channels `adds[i]`. carry: the channels of the stream that x (N, len(carry), H, W) itself goes to,
    every `stride`-th pixel of it; None: there is no such shortcut. Lists of channels rise; one that names all costs nothing.
    """

    def __init__(
        self, branches: list[nn.Sequential], adds: list[list[int]], width: int, carry: list[int] | None = None, stride: int = 1
    ):
        super().__init__()
        if len(adds) != len(branches) or (not branches and carry is None) or stride < 1:
            raise ValueError("a sum needs something to add up, and for each branch its channels")
        for channels in (*adds, carry or []):
            _check_rising(channels, width)
        self.branches = nn.ModuleList(branches)
        self.adds, self.width, self.carry, self.stride = adds, width, carry, stride
        for i, channels in enumerate([*adds, carry or []]):
            self.register_buffer(f"_channels{i}", torch.tensor(channels, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = None
        if self.carry is not None:
            out = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
            out = self._placed(None, out, len(self.adds), len(self.carry))
        for i, branch in enumerate(self.branches):
            out = self._placed(out, branch(x), i, len(self.adds[i]))
        # A view of x would let the ReLU behind it write to x.
        return out if self.adds else out.clone()

    def _placed(self, out: Tensor | None, part: Tensor, i: int, channels: int) -> Tensor:
        """`out` with `part` added to the i-th list of channels."""
        if channels == self.width:
            return part if out is None else out + part
        if out is None:
            out = part.new_zeros(part.shape[0], self.width, *part.shape[2:])
        return out.index_add(1, getattr(self, f"_channels{i}"), part.expand(out.shape[0], -1, *out.shape[2:]))


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
    nn.ReLU6: lambda m: (m.inplace,),
    nn.MaxPool2d: lambda m: (m.kernel_size, m.stride, m.padding),
    nn.AdaptiveAvgPool2d: lambda m: (m.output_size,),
    nn.Flatten: lambda m: (),
    Constant: lambda m: (m.value.shape[1],),
    Channels: lambda m: (m.those,),
    Sum: lambda m: ([describe(branch) for branch in m.branches], m.adds, m.width, m.carry, m.stride),
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
            if kind == "Sum":
                arguments[0] = [build(branch) for branch in arguments[0]]
            network.append(_KINDS[kind](*arguments))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"not part of a compact network: {str(item)[:80]} ({error})") from None
    return network


def restored(description: list, tensors: dict[str, Tensor]) -> nn.Sequential:
    """The network that `description` tells of, with these weights and statistics. Raises ValueError if they do not fit, before
    memory is taken for whatever the description asks for."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(description).state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("the weights do not fit the description of the network")
    network = build(description)
    network.load_state_dict(tensors)
    return network


def save(network: nn.Sequential, folder: Path, **facts) -> None:
    """Write `folder`/architecture.json (the description, and `facts` for readers) and weights.safetensors, in place of what was
    there. Raises OSError."""
    with atomic.folder(folder) as unfinished:
        weights = to_bytes({name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()})
        atomic.write(unfinished / "weights.safetensors", weights)
        told = json.dumps({**facts, "network": describe(network)}, indent=1) + "\n"
        atomic.write(unfinished / "architecture.json", told.encode())


def load(folder: Path | str) -> nn.Sequential:
    """The compact network saved in `folder`, in eval mode. Raises ValueError naming the folder and what is missing or wrong."""
    folder = Path(folder)
    try:
        description = json.loads((folder / "architecture.json").read_text())["network"]
        network = restored(description, load_file(folder / "weights.safetensors"))
    except Exception as error:
        raise ValueError(f"{folder}: no compact network can be loaded from here ({error})") from None
    return network.eval()


def rescue(net: GatedNetwork, keep: Tensor, strength: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """`keep`, bool (N,), with channels opened so that something of the picture reaches every layer around which there is no way.

    Where all that feeds such a layer closed, the strongest channel of each closed site on one way opens: of the layer right before,
    or of the strongest candidate of a supernet's cell. strength (N,) ranks channels, alpha for example; by default the magnitude of
    their BatchNorm's weight. Returns the mask and the names of the sites that were rescued.
    """
    keep = keep.cpu().clone()
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

    Equal in eval mode up to rounding; `.keep` of the result is the mask it was made with. A site that would close although there is
    no way around it keeps one channel (see `rescue`), with a warning. `net` is left as it is.
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
        self.live = cost.liveness(net, layers, cost.useful(net, keep))
        self.layers: dict[str, Layer] = {layer.path: layer for layer in layers}

    def conv(self, path: str) -> list[nn.Module]:
        """Conv2d and BatchNorm2d of the ConvBN whose convolution is at `path`."""
        source, (inputs, outputs) = self.net.get_submodule(path), self.live[path]
        number = int(outputs.sum())
        depthwise = source.groups > 1
        assert not depthwise or (inputs | ~outputs).all(), f"{path} keeps channels that nothing writes to"
        conv = nn.Conv2d(
            number if depthwise else int(inputs.sum()), number, source.kernel_size, source.stride, source.padding,
            groups=number if depthwise else 1, bias=source.bias is not None, device=source.weight.device, dtype=source.weight.dtype,
        )  # fmt: skip
        weight = source.weight[outputs]
        conv.weight.copy_(weight if depthwise else weight[:, inputs])
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

    def branch(self, *paths: str, activation: type[nn.Module]) -> nn.Sequential | None:
        """The ConvBNs whose convolutions are at `paths`, with activations between them; None if the last one closed.

        Where an inner one closed, what is left is a constant.
        """
        if not self.live[paths[-1]].outputs.any():
            return None
        first, *left = [path for path in paths if self.live[path].outputs.any()]
        is_whole = len(left) + 1 == len(paths)
        chain = nn.Sequential(*(self.conv(first) if is_whole else [self.norm(first, nn.BatchNorm2d)]))
        inputs, outputs = self.live[first]
        if is_whole and self.net.get_submodule(first).groups > 1 and not torch.equal(inputs, outputs):
            # A depthwise convolution that reads a stream reads only the channels that it keeps.
            chain.insert(0, Channels(_positions(outputs, inputs)))
        for path in left:
            chain.extend([activation(inplace=True), *self.conv(path)])
        return chain if is_whole else nn.Sequential(self._constant(chain))

    @staticmethod
    def _constant(chain: nn.Sequential) -> Constant:
        """What `chain` makes of zeros. It begins with a BatchNorm, whose answer to them is the same everywhere; only convolutions
        without a border may follow."""
        assert all(module.kernel_size == (1, 1) for module in chain if isinstance(module, nn.Conv2d))
        norm = chain[0]
        value = chain.eval()(norm.weight.new_zeros(1, norm.num_features, 1, 1))
        constant = Constant(value.shape[1]).to(value)
        constant.value.copy_(value)
        return constant

    def sum(self, branches: list[tuple[nn.Sequential | None, str]], carried: Tensor | None = None, stride: int = 1) -> Sum:
        """The sum of `branches`, each with the path of the layer that ends it, and of the channels `carried` along a shortcut."""
        # Constants come last: only the others know height and width.
        present = sorted(
            ((branch, self.live[end].outputs) for branch, end in branches if branch is not None),
            key=lambda pair: isinstance(pair[0][0], Constant),
        )
        stream = self.stream([added for _, added in present], carried)
        carry = None if carried is None else _positions(carried, stream)
        adds = [_positions(added, stream) for _, added in present]
        return Sum([branch for branch, _ in present], adds, int(stream.sum()), carry, stride)

    @staticmethod
    def stream(added: list[Tensor], carried: Tensor | None) -> Tensor:
        """Channels of a stream that something is written to."""
        return torch.stack([*added, *([] if carried is None else [carried])]).any(0)


def _positions(some: Tensor, among: Tensor) -> list[int]:
    """Where the channels of mask `some` stand in a tensor that holds only the channels of mask `among`."""
    return some[among].nonzero().flatten().tolist()


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
            carried = nn.functional.pad(stream, (block.pad, block.pad))
            branch = cut.branch(conv1, conv2, activation=nn.ReLU)
            if branch is not None or block.stride > 1 or block.pad:
                network.extend([cut.sum([(branch, conv2)], carried, block.stride), nn.ReLU(inplace=True)])
            stream = cut.live[conv2].outputs | carried
    return network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), cut.linear("classifier")])


def _bottleneck_resnet(net: BottleneckResNet, cut: _Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    stream = cut.live["stem.conv"].outputs
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            convs = [f"stages.{s}.{b}.{name}.conv" for name in ("conv1", "conv2", "conv3")]
            branch, written = (cut.branch(*convs, activation=nn.ReLU), convs[-1]), cut.live[convs[-1]].outputs
            if block.downsample is not None:
                shortcut = f"stages.{s}.{b}.downsample.conv"
                both = [(nn.Sequential(*cut.conv(shortcut)), shortcut), branch]
                network.extend([cut.sum(both), nn.ReLU(inplace=True)])
                stream = torch.ones_like(written)
            elif branch[0] is not None:
                network.extend([cut.sum([branch], stream), nn.ReLU(inplace=True)])
                stream = stream | written
    return network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), cut.linear("classifier")])


def _mbconv(block: MBConv, path: str, cut: _Slicer) -> tuple[nn.Sequential | None, str]:
    """The branch of an MBConv, and the path of the layer that ends it."""
    paths = [f"{path}.{name}.conv" for name in ("expand", "depthwise", "project") if getattr(block, name) is not None]
    return cut.branch(*paths, activation=nn.ReLU6), paths[-1]


def _mobilenet(net: MobileNetV2, cut: _Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU6(inplace=True))
    stream = cut.live["stem.conv"].outputs
    for b, block in enumerate(net.blocks):
        path = f"blocks.{b}"
        branch, end = _mbconv(block, path, cut)
        written = cut.live[end].outputs
        if block.identity:
            if branch is not None:
                network.append(cut.sum([(branch, end)], stream))
            stream = stream | written
        elif block.shortcut is not None:
            shortcut = f"{path}.shortcut.conv"
            network.append(cut.sum([(nn.Sequential(*cut.conv(shortcut)), shortcut), (branch, end)]))
            stream = torch.ones_like(written)
        else:
            network.extend(branch)
            stream = written
    return _ended(network, cut)


def _supernet(net: Supernet, cut: _Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU6(inplace=True), *_mbconv(net.first, "first", cut)[0])
    stream = cut.live["first.project.conv"].outputs
    for path, cell in net.cells():
        branches = [_mbconv(candidate, f"{path}.{name}", cut) for name, candidate in cell.items()]
        carried = stream if cell.identity else None
        stream = cut.stream([cut.live[end].outputs for _, end in branches], carried)
        if carried is not None and all(branch is None for branch, _ in branches):
            continue  # only the shortcut is left
        network.append(cut.sum(branches, carried))
    return _ended(network, cut)


def _ended(network: nn.Sequential, cut: _Slicer) -> nn.Sequential:
    """`network` with the last convolution and the classifier of MobileNetV2 and of the supernet."""
    network.extend([*cut.conv("last.conv"), nn.ReLU6(inplace=True)])
    return network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), cut.linear("classifier")])


# Where a shortcut that changes nothing is all that is left of a block, nothing of the block is left: the ReLU behind it would see
# what went through one before.
_FAMILIES = {
    VGG: _vgg,
    ResNet: _resnet,
    BottleneckResNet: _bottleneck_resnet,
    MobileNetV2: _mobilenet,
    Supernet: _supernet,
}
