"""VGG: plain stages of 3x3 convolutions, every one gated, then fully connected layers without gates."""

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN, Feed, GatedBatchNorm, GatedNetwork, Layer, scaled
from dnal_dist.nets.slicing import Slicer


class VGG(GatedNetwork):
    """Stages of conv3x3 (with bias) + BN + gate + ReLU, each closed by a 2x2 max-pool; pooled to `side` x `side`; then Linear
    layers, all but the last with BatchNorm and ReLU."""

    def __init__(self, stages: list[list[int]], hidden: list[int], num_classes: int, side: int = 1):
        super().__init__()
        channels = 3
        self.stages = nn.ModuleList()
        for widths in stages:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(ConvBN(channels, width, 3, bias=True))
                channels = width
            self.stages.append(stage)
        self.side = side
        self.classifier = nn.Sequential()
        features = channels * side * side
        for width in hidden:
            self.classifier.extend([nn.Linear(features, width), GatedBatchNorm(width), nn.ReLU()])
            features = width
        self.classifier.append(nn.Linear(features, num_classes))
        self.num_classes = num_classes
        self.finish()

    def units(self) -> list[nn.Module]:
        return [conv for stage in self.stages for conv in stage]

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        x, shares = images, iter(self.split(gates))
        for stage in self.stages:
            for conv in stage:
                x = F.relu(conv(x, *next(shares)), inplace=True)
            x = F.max_pool2d(x, 2)
        return self.classifier(F.adaptive_avg_pool2d(x, self.side).flatten(1))

    def layers(self, image_size: int) -> list[Layer]:
        found, feeds = [], ()
        for s, stage in enumerate(self.stages):
            for c, _ in enumerate(stage):
                site = f"stages.{s}.{c}"
                found.append(Layer(f"{site}.conv", f"{site}.norm", site, feeds, image_size**2))
                feeds = (Feed(f"{site}.conv"),)
            image_size //= 2
        for i, module in enumerate(self.classifier):
            if isinstance(module, nn.Linear):
                norm = f"classifier.{i + 1}" if i + 1 < len(self.classifier) else None
                spread = self.side**2 if feeds else 1
                found.append(Layer(f"classifier.{i}", norm, None, feeds, 1, spread))
                feeds = ()
        return found


def _vgg16(hidden: list[int], num_classes: int, width: float, side: int = 1) -> VGG:
    stages = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
    return VGG([scaled(stage, width) for stage in stages], scaled(hidden, width), num_classes, side)


def vgg16_cifar(num_classes: int = 10, width: float = 1.0) -> VGG:
    return _vgg16([512], num_classes, width)


def vgg16_imagenet(num_classes: int = 1000, width: float = 1.0) -> VGG:
    return _vgg16([4096, 4096], num_classes, width, side=7)


def vgg_digits(num_classes: int = 10, width: float = 1.0) -> VGG:
    """Six convolutions for images of 8x8 pixels."""
    return VGG([scaled(stage, width) for stage in ([32, 32], [64, 64], [128, 128])], [], num_classes)


def compact_vgg(net: VGG, cut: Slicer) -> nn.Sequential:
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


def torchvision_vgg(network: VGG) -> list[tuple[str, str]]:
    found, place = [], 0
    for s, stage in enumerate(network.stages):
        for c in range(len(stage)):
            found += [(f"features.{place}", f"stages.{s}.{c}.conv"), (f"features.{place + 1}", f"stages.{s}.{c}.norm")]
            place += 3  # with the ReLU
        place += 1  # the max-pool
    # Where ours has a BatchNorm and a ReLU between two Linear layers, torchvision has a ReLU and a Dropout.
    linear = [i for i, module in enumerate(network.classifier) if isinstance(module, nn.Linear)]
    return [*found, *((f"classifier.{i}", f"classifier.{i}") for i in linear)]
