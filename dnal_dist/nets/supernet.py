"""The supernet of ProxylessNAS (Cai et al., 2018), made dense: every cell sums all of its MBConv candidates."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.activation import relu6
from dnal_dist.nets.gated import ConvBN, Feed, GatedNetwork, Layer, halve, scaled
from dnal_dist.nets.mobilenet import MBConv, mbconv_branch
from dnal_dist.nets.slicing import Slicer, with_classifier

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

    def forward(self, x: Tensor, *gates: Tensor | None) -> Tensor:
        gates = iter(gates or (None,) * (2 * len(CANDIDATES)))
        out = x if self.identity else None
        for candidate in self.children():
            branch = candidate(x, next(gates), next(gates))
            out = branch if out is None else out + branch
        return out


class Supernet(GatedNetwork):
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
        self.num_classes = num_classes
        self.finish()
        bound = 1 / math.sqrt(last)
        nn.init.uniform_(self.classifier.weight, -bound, bound)

    def cells(self) -> list[tuple[str, Cell]]:
        """Module path and cell, in forward order."""
        return [(f"stages.{s}.cells.{c}", cell) for s, stage in enumerate(self.stages) for c, cell in enumerate(stage["cells"])]

    def units(self) -> list[nn.Module]:
        return [self.first, *(cell for _, cell in self.cells()), self.last]

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        first, *shares, last = self.split(gates)
        x = self.first(relu6(self.stem(images), inplace=True), *first)
        for (_, cell), share in zip(self.cells(), shares, strict=True):
            x = cell(x, *share)
        x = relu6(self.last(x, *last), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def layers(self, image_size: int) -> list[Layer]:
        if self.stem.conv.stride[0] > 1:
            image_size = halve(image_size)
        found = [Layer("stem.conv", "stem.norm", "first.depthwise", (), image_size**2)]
        layers, stream = self.first.layers("first", image_size, (Feed("stem.conv"),), optional=False)
        found += layers
        for path, cell in self.cells():
            written = tuple(f._replace(around=True) for f in stream) if cell.identity else ()
            for name, candidate in cell.named_children():
                layers, feeds = candidate.layers(f"{path}.{name}", image_size, stream, optional=True)
                found += layers
                written += feeds
            stream = written
            if cell.stride > 1:
                image_size = halve(image_size)
        found.append(Layer("last.conv", "last.norm", "last", stream, image_size**2))
        return [*found, Layer("classifier", None, None, (Feed("last.conv"),), 1)]


def proxyless_supernet(num_classes: int = 1000, width: float = 1.0) -> Supernet:
    widths = scaled([32, 16, 24, 40, 80, 96, 192, 320], width, 8)
    last = scaled([1280], max(1.0, width), 8)[0]
    return Supernet(widths, [4, 4, 4, 4, 4, 1], [2, 2, 2, 1, 2, 1], last, num_classes, 2)


def supernet_digits(num_classes: int = 10, width: float = 1.0) -> Supernet:
    """Two stages of two cells, for small images: from the first cell on the maps have half their side."""
    widths, last = scaled([16, 8, 12, 24], width), scaled([64], width)[0]
    return Supernet(widths, [2, 2], [2, 1], last, num_classes, 1)


def compact_supernet(net: Supernet, cut: Slicer) -> nn.Sequential:
    network = nn.Sequential(*cut.conv("stem.conv"), nn.ReLU6(inplace=True), *mbconv_branch(net.first, "first", cut)[0])
    stream = cut.live["first.project.conv"].outputs
    for path, cell in net.cells():
        branches = [mbconv_branch(candidate, f"{path}.{name}", cut) for name, candidate in cell.named_children()]
        carried = stream if cell.identity else None
        stream = cut.stream([cut.live[end].outputs for _, end in branches], carried)
        if carried is not None and all(branch is None for branch, _ in branches):
            continue  # only the shortcut is left
        network.append(cut.sum(branches, carried))
    return with_classifier(network, cut)
