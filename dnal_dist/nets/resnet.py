"""Residual networks: basic blocks with parameter-free shortcuts for small images (option A of He et al., 2015), and bottlenecks
with convolutional shortcuts for ImageNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN, Feed, GatedNetwork, Layer, halve, scaled
from dnal_dist.nets.slicing import Slicer


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv2(relu(conv1(x)))), both convolutions 3x3 + BN + gate. The shortcut keeps every other pixel where
    the block has stride 2, and pads with zero channels, half on each side, where it widens."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvBN(inputs, outputs, 3, stride)
        self.conv2 = ConvBN(outputs, outputs, 3)
        self.stride = stride
        self.pad = (outputs - inputs) // 2
        """Zero channels before the shortcut's own, and as many behind."""

    def forward(self, x: Tensor, gate1: Tensor | None = None, gate2: Tensor | None = None) -> Tensor:
        branch = self.conv2(F.relu(self.conv1(x, gate1), inplace=True), gate2)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(branch + x, inplace=True)


class ResNet(GatedNetwork):
    """Stem conv3x3, stages of `blocks` basic blocks (each stage but the first begins with stride 2), average pool, Linear."""

    def __init__(self, widths: list[int], blocks: int, num_classes: int):
        super().__init__()
        self.stem = ConvBN(3, widths[0], 3)
        self.stages, channels = _stages(BasicBlock, widths[0], widths, [blocks] * len(widths))
        self.classifier = nn.Linear(channels, num_classes)
        self.num_classes = num_classes
        self.finish()

    def units(self) -> list[nn.Module]:
        return [self.stem, *(block for stage in self.stages for block in stage)]

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        shares = iter(self.split(gates))
        x = F.relu(self.stem(images, *next(shares)), inplace=True)
        for stage in self.stages:
            for block in stage:
                x = block(x, *next(shares))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def layers(self, image_size: int) -> list[Layer]:
        found = [Layer("stem.conv", "stem.norm", "stem", (), image_size**2)]
        stream = (Feed("stem.conv"),)
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                sites = (f"stages.{s}.{b}.conv1", f"stages.{s}.{b}.conv2")
                if block.stride > 1:
                    image_size = halve(image_size)
                for site, feeds in zip(sites, (stream, (Feed(f"{sites[0]}.conv"),)), strict=True):
                    found.append(Layer(f"{site}.conv", f"{site}.norm", site, feeds, image_size**2, branch=sites))
                stream = (*(Feed(f.writer, f.offset + block.pad, True) for f in stream), Feed(f"{sites[1]}.conv"))
        return [*found, Layer("classifier", None, None, stream, 1)]


class Bottleneck(nn.Module):
    """relu(shortcut(x) + conv3(relu(conv2(relu(conv1(x)))))): 1x1, 3x3 with the stride, 1x1 to four times the width, each with BN
    and gate. The shortcut is a 1x1 convolution + BN without gate where the shape changes, else x itself."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = ConvBN(inputs, width, 1)
        self.conv2 = ConvBN(width, width, 3, stride)
        self.conv3 = ConvBN(width, outputs, 1)
        changes = stride > 1 or inputs != outputs
        self.downsample = ConvBN(inputs, outputs, 1, stride, gated=False) if changes else None
        self.stride = stride

    def forward(self, x: Tensor, gate1: Tensor | None = None, gate2: Tensor | None = None, gate3: Tensor | None = None) -> Tensor:
        branch = F.relu(self.conv1(x, gate1), inplace=True)
        branch = self.conv3(F.relu(self.conv2(branch, gate2), inplace=True), gate3)
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)), inplace=True)


class BottleneckResNet(GatedNetwork):
    """Stem conv7x7 stride 2 and max-pool, four stages of `blocks` bottlenecks (each stage but the first begins with stride 2),
    average pool, Linear: the layout of torchvision (He et al., 2015, with the stride on the 3x3 convolution)."""

    def __init__(self, stem: int, widths: list[int], blocks: list[int], num_classes: int):
        super().__init__()
        self.stem = ConvBN(3, stem, 7, 2)
        self.stages, channels = _stages(Bottleneck, stem, widths, blocks)
        self.classifier = nn.Linear(channels, num_classes)
        self.num_classes = num_classes
        self.finish()

    def units(self) -> list[nn.Module]:
        return [self.stem, *(block for stage in self.stages for block in stage)]

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        shares = iter(self.split(gates))
        x = F.max_pool2d(F.relu(self.stem(images, *next(shares)), inplace=True), 3, 2, 1)
        for stage in self.stages:
            for block in stage:
                x = block(x, *next(shares))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def layers(self, image_size: int) -> list[Layer]:
        image_size = halve(image_size)
        found = [Layer("stem.conv", "stem.norm", "stem", (), image_size**2)]
        image_size = halve(image_size)
        stream = (Feed("stem.conv"),)
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                path = f"stages.{s}.{b}"
                sites = tuple(f"{path}.{name}" for name in ("conv1", "conv2", "conv3"))
                feeds = stream
                for site in sites:
                    if block.stride > 1 and site == sites[1]:
                        image_size = halve(image_size)
                    found.append(Layer(f"{site}.conv", f"{site}.norm", site, feeds, image_size**2, branch=sites))
                    feeds = (Feed(f"{site}.conv"),)
                if block.downsample is not None:
                    shortcut = f"{path}.downsample"
                    found.append(Layer(f"{shortcut}.conv", f"{shortcut}.norm", None, stream, image_size**2, plain=True))
                    stream = (Feed(f"{shortcut}.conv"),)
                stream = (*(f._replace(around=True) for f in stream), *feeds)
        return [*found, Layer("classifier", None, None, stream, 1)]


def _stages(block: type[nn.Module], channels: int, widths: list[int], blocks: list[int]) -> tuple[nn.ModuleList, int]:
    """Stages of blocks, each stage but the first beginning with stride 2, for an input of `channels`; and their output channels."""
    stages = nn.ModuleList()
    for s, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        stage = nn.ModuleList()
        for b in range(count):
            stage.append(block(channels, width, 2 if s and not b else 1))
            channels = block.expansion * width
        stages.append(stage)
    return stages, channels


def resnet56_cifar(num_classes: int = 10, width: float = 1.0) -> ResNet:
    return ResNet(scaled([16, 32, 64], width), 9, num_classes)


def resnet50_imagenet(num_classes: int = 1000, width: float = 1.0) -> BottleneckResNet:
    stem, *widths = scaled([64, 64, 128, 256, 512], width)
    return BottleneckResNet(stem, widths, [3, 4, 6, 3], num_classes)


def resnet_digits(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """Three stages of two blocks, for images of 8x8 pixels."""
    return ResNet(scaled([16, 32, 64], width), 2, num_classes)


def compact_resnet(net: ResNet, cut: Slicer) -> nn.Sequential:
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


def compact_bottleneck_resnet(net: BottleneckResNet, cut: Slicer) -> nn.Sequential:
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


def torchvision_resnet(network: BottleneckResNet) -> list[tuple[str, str]]:
    found = [("conv1", "stem.conv"), ("bn1", "stem.norm")]
    for s, stage in enumerate(network.stages):
        for b, block in enumerate(stage):
            theirs, ours = f"layer{s + 1}.{b}", f"stages.{s}.{b}"
            for k in (1, 2, 3):
                found += [(f"{theirs}.conv{k}", f"{ours}.conv{k}.conv"), (f"{theirs}.bn{k}", f"{ours}.conv{k}.norm")]
            if block.downsample is not None:
                around = f"{ours}.downsample"
                found += [(f"{theirs}.downsample.0", f"{around}.conv"), (f"{theirs}.downsample.1", f"{around}.norm")]
    return [*found, ("fc", "classifier")]
