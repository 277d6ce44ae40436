"""MobileNetV2 (Sandler et al., 2018): inverted residual blocks, gated at the depthwise and the project convolution."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.activation import relu6
from dnal_dist.nets.gated import ConvBN, initialise, scaled


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

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else relu6(self.expand(x), inplace=True)
        branch = self.project(relu6(self.depthwise(hidden), inplace=True))
        if self.identity:
            return branch + x
        return branch if self.shortcut is None else branch + self.shortcut(x)


class MobileNetV2(nn.Module):
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
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = relu6(self.stem(images), inplace=True)
        for block in self.blocks:
            x = block(x)
        x = relu6(self.last(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


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
