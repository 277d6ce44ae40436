"""A network as a user would write it: no line of it knows of gates."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth


class Mixed(nn.Module):
    """A sum, a concatenation, a grouped and a depthwise convolution, one without BatchNorm, and squeeze and excitation."""

    def __init__(self, num_classes: int = 10, channels: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.block = Block(channels)
        self.side = nn.Conv2d(channels, channels, 3, padding=1)
        self.after = nn.Sequential(nn.BatchNorm2d(2 * channels), nn.Conv2d(2 * channels, 3 * channels, 1), nn.SiLU())
        self.classifier = nn.Linear(3 * channels, num_classes)

    def forward(self, images):
        x = self.block(self.stem(images))
        x = self.after(F.max_pool2d(torch.cat([x, self.side(x)], 1), 2))
        return self.classifier(x.mean((2, 3)))


class Dropping(nn.Module):
    """Stochastic depth and dropout."""

    def __init__(self, num_classes: int = 10, channels: int = 12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.drop, self.classifier = nn.Dropout(0.3), nn.Linear(channels, num_classes)

    def forward(self, images):
        x = self.stem(images)
        x = F.relu(x + stochastic_depth(self.branch(x), 0.3, "row", self.training))
        return self.classifier(self.drop(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        y = F.relu(self.norms[0](self.grouped(x)))
        y = self.norms[1](self.deep(y))
        y = y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return F.relu(x + y)
