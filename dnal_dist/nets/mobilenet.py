"""MobileNetV2 (Sandler et al., 2018): inverted residual blocks, gated at the depthwise and the project convolution."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.activation import relu6
from dnal_dist.nets.gated import ConvBN, Feed, GatedNetwork, Layer, halve, scaled
from dnal_dist.nets.slicing import Slicer, with_classifier


class MBConv(nn.Module):
    """Expand (1x1, BN, ReLU6, no gate), depthwise (BN, gate, ReLU6), project (1x1, BN, gate), and a shortcut around them if any.

    expand: with False the depthwise convolution reads x itself. shortcut: "identity", "conv" (1x1 + BN, no gate) or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        expansion: int = 6,
        expand: bool = True,
        shortcut: str | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvBN(inputs, hidden, 1, gated=False, eps=eps) if expand else None
        self.depthwise = ConvBN(hidden, hidden, kernel, stride, groups=hidden, eps=eps)
        self.project = ConvBN(hidden, outputs, 1, eps=eps)
        self.stride, self.identity = stride, shortcut == "identity"
        self.shortcut = ConvBN(inputs, outputs, 1, gated=False, eps=eps) if shortcut == "conv" else None

    def forward(self, x: Tensor, depthwise_gate: Tensor | None = None, project_gate: Tensor | None = None) -> Tensor:
        hidden = x if self.expand is None else relu6(self.expand(x), inplace=True)
        hidden = relu6(self.depthwise(hidden, depthwise_gate), inplace=True)
        branch = self.project(hidden, project_gate)
        if self.identity:
            return branch + x
        return branch if self.shortcut is None else branch + self.shortcut(x)

    def layers(self, path: str, image_size: int, stream: tuple[Feed, ...], optional: bool) -> tuple[list[Layer], tuple[Feed, ...]]:
        """Its layers for inputs of image_size x image_size that `stream` writes, and what writes the block's output.

        optional: the network works without the branch.
        """
        sites = (f"{path}.depthwise", f"{path}.project")
        branch = sites if optional else ()
        found, feeds = [], stream
        if self.expand is not None:
            expand = f"{path}.expand"
            found.append(Layer(f"{expand}.conv", f"{expand}.norm", sites[0], feeds, image_size**2, branch=branch))
            feeds = (Feed(f"{expand}.conv"),)
        if self.stride > 1:
            image_size = halve(image_size)
        for site in sites:
            found.append(Layer(f"{site}.conv", f"{site}.norm", site, feeds, image_size**2, branch=branch))
            feeds = (Feed(f"{site}.conv"),)
        if self.shortcut is not None:
            shortcut = f"{path}.shortcut"
            found.append(Layer(f"{shortcut}.conv", f"{shortcut}.norm", None, stream, image_size**2))
            feeds = (Feed(f"{shortcut}.conv", around=True), *feeds)
        return found, (*(f._replace(around=True) for f in stream), *feeds) if self.identity else feeds


class MobileNetV2(GatedNetwork):
    """Stem conv3x3, blocks of the given (width, stride), a 1x1 convolution (gated) to `last` channels, average pool, Linear.

    widths: of the stem, and of each stage. conv_shortcuts: blocks with stride 1 that change the width have a 1x1 convolution around
    them; without, they have no shortcut. expand_first: the first block, of expansion 1, keeps its expand convolution.
    """

    def __init__(
        self,
        widths: list[int],
        strides: list[int],
        last: int,
        num_classes: int,
        stem_stride: int,
        conv_shortcuts: bool,
        expand_first: bool,
    ):
        super().__init__()
        self.stem = ConvBN(3, widths[0], 3, stem_stride, gated=False)
        self.blocks = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            for b in range((1, 2, 3, 4, 3, 3, 1)[stage]):
                stride = 1 if b else strides[stage]
                around = "identity" if inputs == outputs else "conv" if conv_shortcuts else None
                expansion = 6 if stage else 1
                expand = stage > 0 or expand_first
                shortcut = around if stride == 1 else None
                self.blocks.append(MBConv(inputs, outputs, 3, stride, expansion, expand, shortcut))
                inputs = outputs
        self.last = ConvBN(inputs, last, 1)
        self.classifier = nn.Linear(last, num_classes)
        self.num_classes = num_classes
        self.finish()

    def units(self) -> list[nn.Module]:
        return [*self.blocks, self.last]

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        *shares, last = self.split(gates)
        x = relu6(self.stem(images), inplace=True)
        for block, share in zip(self.blocks, shares, strict=True):
            x = block(x, *share)
        x = relu6(self.last(x, *last), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def layers(self, image_size: int) -> list[Layer]:
        if self.stem.conv.stride[0] > 1:
            image_size = halve(image_size)
        first = self.blocks[0]
        read_by = None if first.expand or first.identity or first.shortcut else "blocks.0.depthwise"
        found, stream = [Layer("stem.conv", "stem.norm", read_by, (), image_size**2)], (Feed("stem.conv"),)
        for b, block in enumerate(self.blocks):
            optional = block.identity or block.shortcut is not None
            layers, stream = block.layers(f"blocks.{b}", image_size, stream, optional)
            found += layers
            if block.stride > 1:
                image_size = halve(image_size)
        found.append(Layer("last.conv", "last.norm", "last", stream, image_size**2))
        return [*found, Layer("classifier", None, None, (Feed("last.conv"),), 1)]


def _widths(width: float) -> tuple[list[int], int]:
    """Widths of stem and stages, and of the last convolution, which only grows (as in torchvision)."""
    widths = scaled([32, 16, 24, 32, 64, 96, 160, 320], width, 8)
    return widths, scaled([1280], max(1.0, width), 8)[0]


def mobilenetv2_cifar(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    widths, last = _widths(width)
    return MobileNetV2(widths, [1, 1, 2, 2, 1, 2, 1], last, num_classes, 1, conv_shortcuts=True, expand_first=True)


def mobilenetv2_imagenet(num_classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    widths, last = _widths(width)
    return MobileNetV2(widths, [1, 2, 2, 2, 1, 2, 1], last, num_classes, 2, conv_shortcuts=False, expand_first=False)


def mbconv_branch(block: MBConv, path: str, cut: Slicer) -> tuple[nn.Sequential | None, str]:
    """The branch of an MBConv, and the path of the layer that ends it."""
    paths = [f"{path}.{name}.conv" for name in ("expand", "depthwise", "project") if getattr(block, name) is not None]
    return cut.branch(*paths, activation=nn.ReLU6), paths[-1]


def compact_mobilenet(net: MobileNetV2, cut: Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU6(inplace=True))
    stream = cut.live["stem.conv"].outputs
    for b, block in enumerate(net.blocks):
        path = f"blocks.{b}"
        branch, end = mbconv_branch(block, path, cut)
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
    return with_classifier(network, cut)


def torchvision_mobilenet(network: MobileNetV2) -> list[tuple[str, str]]:
    found = [("features.0.0", "stem.conv"), ("features.0.1", "stem.norm")]
    for b, block in enumerate(network.blocks):
        theirs, ours = f"features.{b + 1}.conv", f"blocks.{b}"
        parts = ["depthwise"] if block.expand is None else ["expand", "depthwise"]
        for i, part in enumerate(parts):
            found += [(f"{theirs}.{i}.0", f"{ours}.{part}.conv"), (f"{theirs}.{i}.1", f"{ours}.{part}.norm")]
        place = len(parts)
        found += [(f"{theirs}.{place}", f"{ours}.project.conv"), (f"{theirs}.{place + 1}", f"{ours}.project.norm")]
    last = f"features.{len(network.blocks) + 1}"
    return [*found, (f"{last}.0", "last.conv"), (f"{last}.1", "last.norm"), ("classifier.1", "classifier")]
