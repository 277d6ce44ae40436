"""VGG: plain stages of 3x3 convolutions, every one gated, then fully connected layers without gates."""

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN, initialise, scaled


class VGG(nn.Module):
    """Stages of conv3x3 (with bias) + BN + ReLU, each closed by a 2x2 max-pool; pooled to `side` x `side`; then Linear
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
            self.classifier.extend([nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()])
            features = width
        self.classifier.append(nn.Linear(features, num_classes))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for stage in self.stages:
            for conv in stage:
                x = F.relu(conv(x), inplace=True)
            x = F.max_pool2d(x, 2)
        return self.classifier(F.adaptive_avg_pool2d(x, self.side).flatten(1))


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
