"""Weights of live channels, cut out of a gated network's modules."""

import torch
from torch import Tensor, nn

from dnal_dist.nets import masks
from dnal_dist.nets.gated import GatedNetwork, Layer
from dnal_dist.nets.modules import Channels, Constant, Sum


class Slicer:
    """Cuts the modules of a gated network down to their live channels."""

    def __init__(self, net: GatedNetwork, keep: Tensor):
        layers = net.layers(1)
        self.net = net
        self.live = masks.liveness(net, layers, masks.useful(net, keep))
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


def with_classifier(network: nn.Sequential, cut: Slicer) -> nn.Sequential:
    """`network` with the last convolution and the classifier of MobileNetV2 and of the supernet."""
    network.extend([*cut.conv("last.conv"), nn.ReLU6(inplace=True)])
    return network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), cut.linear("classifier")])
