"""The supernet of ProxylessNAS (Cai et al., 2018), made dense: every cell sums all of its MBConv candidates."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.activation import relu6
from dnal_dist.nets.gated import ConvBN, initialise, scaled
from dnal_dist.nets.mobilenet import MBConv

# Kernel and expansion of a cell's candidates.
CANDIDATES = [(kernel, expansion) for kernel in (3, 5, 7) for expansion in (3, 6)]
EPS = 1e-3


class Cell(nn.Module):
    """The sum of six MBConv candidates, named k3e3 ... k7e6 for kernel and expansion, and of x itself where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # Children, not an nn.ModuleDict, which FSDP2 of torch 2.11 takes for a container without a forward.
        for k, e in CANDIDATES:
            self.add_module(f"k{k}e{e}", MBConv(inputs, outputs, k, stride, e, eps=EPS))
        self.stride, self.identity = stride, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.identity else None
        for candidate in self.children():
            branch = candidate(x)
            out = branch if out is None else out + branch
        return out


class Supernet(nn.Module):
    """Stem conv3x3 (no gate), one MBConv of expansion 1 without expand convolution, stages of cells, a 1x1 convolution (gated) to
    `last` channels, average pool, Linear. A candidate is gone when all its gates close.

    widths: of the stem, of the first block, and of each stage; cells, strides: of each stage.
    """

    def __init__(self, widths: list[int], cells: list[int], strides: list[int], last: int, num_classes: int, stem_stride: int):
        super().__init__()
        stem, channels, *widths = widths
        self.stem = ConvBN(3, stem, 3, stem_stride, gated=False, eps=EPS)
        self.first = MBConv(stem, channels, 3, 1, 1, expand=False, eps=EPS)
        self.stages = nn.ModuleList()
        for width, count, stride in zip(widths, cells, strides, strict=True):
            row = nn.ModuleList()
            for c in range(count):
                row.append(Cell(channels, width, 1 if c else stride))
                channels = width
            self.stages.append(nn.ModuleDict({"cells": row}))
        self.last = ConvBN(channels, last, 1, eps=EPS)
        self.classifier = nn.Linear(last, num_classes)
        initialise(self)
        bound = 1 / math.sqrt(last)
        nn.init.uniform_(self.classifier.weight, -bound, bound)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(relu6(self.stem(images), inplace=True))
        for stage in self.stages:
            for cell in stage["cells"]:
                x = cell(x)
        x = relu6(self.last(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def proxyless_supernet(num_classes: int = 1000, width: float = 1.0) -> Supernet:
    widths = scaled([32, 16, 24, 40, 80, 96, 192, 320], width, 8)
    last = scaled([1280], max(1.0, width), 8)[0]
    return Supernet(widths, [4, 4, 4, 4, 4, 1], [2, 2, 2, 1, 2, 1], last, num_classes, 2)


def supernet_digits(num_classes: int = 10, width: float = 1.0) -> Supernet:
    """Two stages of two cells, for small images: from the first cell on the maps have half their side."""
    widths, last = scaled([16, 8, 12, 24], width), scaled([64], width)[0]
    return Supernet(widths, [2, 2], [2, 1], last, num_classes, 1)
