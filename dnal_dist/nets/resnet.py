"""Residual networks for small pictures: basic blocks with parameter-free shortcuts (option A of He et al., 2015)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN, Feed, GatedNetwork, Layer, halve, scaled


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv2(relu(conv1(x)))), both convolutions 3x3 + BN + gate. The shortcut keeps every other pixel where
    the block has stride 2, and pads with zero channels, half on each side, where it widens."""

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
        self.stages = nn.ModuleList()
        channels = widths[0]
        for s, width in enumerate(widths):
            stage = nn.ModuleList()
            for b in range(blocks):
                stage.append(BasicBlock(channels, width, 2 if s and not b else 1))
                channels = width
            self.stages.append(stage)
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
        stream = (Feed("stem"),)
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                path = f"stages.{s}.{b}"
                if block.stride > 1:
                    image_size = halve(image_size)
                for conv, feeds in (("conv1", stream), ("conv2", (Feed(f"{path}.conv1"),))):
                    site = f"{path}.{conv}"
                    found.append(Layer(f"{site}.conv", f"{site}.norm", site, feeds, image_size**2, bypassed=True))
                stream = (*(Feed(f.site, f.offset + block.pad) for f in stream), Feed(f"{path}.conv2"))
        return [*found, Layer("classifier", None, None, stream, 1)]


def resnet56_cifar(num_classes: int = 10, width: float = 1.0) -> ResNet:
    return ResNet(scaled([16, 32, 64], width), 9, num_classes)


def resnet_digits(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """Three stages of two blocks, for pictures of 8x8 pixels."""
    return ResNet(scaled([16, 32, 64], width), 2, num_classes)
