"""Networks of pareto.py that are shaped like published ones and take images of 16x16 pixels."""

from torch import nn

from dnal_dist.nets.gated import scaled
from dnal_dist.nets.mobilenet import MobileNetV2
from dnal_dist.nets.resnet import ResNet
from dnal_dist.nets.vgg import VGG


def vgg16(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """VGG16's thirteen convolutions, without the last of its five max-pools."""
    stages = [[64] * 2, [128] * 2, [256] * 3, [512] * 6]
    return VGG([scaled(stage, width) for stage in stages], scaled([512], width), num_classes)


def mobilenetv2(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """MobileNetV2's seventeen blocks; the first stride of 2 is in the second stage."""
    widths = scaled([32, 16, 24, 32, 64, 96, 160, 320], width, 8)
    last = scaled([1280], width, 8)[0]
    return MobileNetV2(widths, [1, 2, 2, 2, 1, 1, 1], last, num_classes, 1, conv_shortcuts=True, expand_first=True)


def resnet20(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    return ResNet(scaled([16, 32, 64], width), 3, num_classes)
