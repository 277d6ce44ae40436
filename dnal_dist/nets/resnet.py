"""Residual networks: basic blocks with parameter-free shortcuts for small images (option A of He et al., 2015), and bottlenecks
with convolutional shortcuts for ImageNet."""

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN, initialise, scaled


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv2(relu(conv1(x)))), both convolutions 3x3 + BN, gated. The shortcut keeps every other pixel where
    the block has stride 2, and pads with zero channels, half on each side, where it widens."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvBN(inputs, outputs, 3, stride)
        self.conv2 = ConvBN(outputs, outputs, 3)
        self.stride = stride
        self.pad = (outputs - inputs) // 2
        """Zero channels before the shortcut's own, and as many behind."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.relu(self.conv1(x), inplace=True))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(branch + x, inplace=True)


class ResNet(nn.Module):
    """Stem conv3x3, stages of `blocks` basic blocks (each stage but the first begins with stride 2), average pool, Linear."""

    def __init__(self, widths: list[int], blocks: int, num_classes: int):
        super().__init__()
        self.stem = ConvBN(3, widths[0], 3)
        self.stages, channels = _stages(BasicBlock, widths[0], widths, [blocks] * len(widths))
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images), inplace=True)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Bottleneck(nn.Module):
    """relu(shortcut(x) + conv3(relu(conv2(relu(conv1(x)))))): 1x1, 3x3 with the stride, 1x1 to four times the width, each with BN,
    gated. The shortcut is a 1x1 convolution + BN without gate where the shape changes, else x itself."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = ConvBN(inputs, width, 1)
        self.conv2 = ConvBN(width, width, 3, stride)
        self.conv3 = ConvBN(width, outputs, 1)
        changes = stride > 1 or inputs != outputs
        self.downsample = ConvBN(inputs, outputs, 1, stride, gated=False, plain=True) if changes else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.conv1(x), inplace=True)
        branch = self.conv3(F.relu(self.conv2(branch), inplace=True))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)), inplace=True)


class BottleneckResNet(nn.Module):
    """Stem conv7x7 stride 2 and max-pool, four stages of `blocks` bottlenecks (each stage but the first begins with stride 2),
    average pool, Linear: the layout of torchvision (He et al., 2015, with the stride on the 3x3 convolution)."""

    def __init__(self, stem: int, widths: list[int], blocks: list[int], num_classes: int):
        super().__init__()
        self.stem = ConvBN(3, stem, 7, 2)
        self.stages, channels = _stages(Bottleneck, stem, widths, blocks)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(images), inplace=True), 3, 2, 1)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


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
