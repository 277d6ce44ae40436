"""Small networks, each with one thing that channels may go through."""

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 16


class Small(nn.Module):
    """A stem, a body and a classifier."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.add_body(channels)
        self.head = nn.Linear(self.features(channels), 10)

    def add_body(self, channels: int) -> None:
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def features(self, channels: int) -> int:
        return channels

    def body(self, x):
        return F.relu(self.conv(x))

    def forward(self, images):
        x = self.body(F.relu(self.norm(self.stem(images))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Residual(Small):
    """A sum, scaled, whose branch ends without a BatchNorm."""

    def body(self, x):
        return F.silu(x + 0.5 * self.conv(x))


class Dense(Small):
    """Concatenation, then a BatchNorm of what several layers wrote."""

    def add_body(self, channels):
        self.grow = nn.Conv2d(channels, 5, 3, padding=1)
        self.after = nn.BatchNorm2d(channels + 5)
        self.last = nn.Conv2d(channels + 5, channels, 1)

    def body(self, x):
        return self.last(F.gelu(self.after(torch.cat([x, self.grow(x)], 1))))


class Squeeze(Small):
    """Squeeze and excitation: a sigmoid of what closed is not zero, but what it scales is."""

    def add_body(self, channels):
        self.conv, self.down, self.up = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def body(self, x):
        x = F.hardswish(self.conv(x))
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Depthwise(Small):
    def add_body(self, channels):
        self.deep, self.point = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, 6, 1)

    def features(self, channels):
        return 6

    def body(self, x):
        return F.relu6(self.point(self.deep(x)))


class Grouped(Small):
    """Groups that close as a whole (four of two channels) and groups that each lose the same channels (two of four)."""

    def add_body(self, channels):
        self.many, self.few = nn.Conv2d(channels, 12, 3, padding=1, groups=4), nn.Conv2d(12, channels, 3, padding=1, groups=2)

    def body(self, x):
        return F.relu(self.few(F.relu(self.many(x))))


class Shuffled(Small):
    """Halves, of which one passes, and a shuffle whose sizes are numbers in the code."""

    def add_body(self, channels):
        self.changing = nn.Conv2d(channels // 2, channels // 2, 1)

    def body(self, x):
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, F.relu(self.changing(changed))], 1)
        return x.view(len(x), 2, 4, SIZE, SIZE).transpose(1, 2).reshape(len(x), 8, SIZE, SIZE)


class Split(Small):
    """Parts that go their own ways, one after the other, as in Res2Net; a slice and a pad of channels."""

    def add_body(self, channels):
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.join = nn.Conv2d(channels, channels, 1)

    def body(self, x):
        a, b, c = torch.split(x, [2, 2, 4], 1)
        a = F.relu(self.first(a))
        b = F.relu(self.second(a + b))
        x = torch.cat([a, b, c], 1)
        return F.relu(self.join(x) + F.pad(x[:, 2:], (0, 0, 0, 0, 1, 1)))


class LinearOfItsOwn(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class NormOfItsOwn(nn.BatchNorm2d):
    pass


class Subclasses(Small):
    """Layers of classes that a user derived."""

    def add_body(self, channels):
        self.norm = NormOfItsOwn(channels)
        self.up, self.down = LinearOfItsOwn(channels, 12), nn.Linear(12, channels)

    def body(self, x):
        return self.down(F.relu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Twice(Small):
    """One convolution called twice."""

    def body(self, x):
        return F.relu(self.conv(F.relu(self.conv(x))))


class Standardised(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class WeightStandardised(Small):
    def add_body(self, channels):
        self.conv, self.next = Standardised(channels, 6, 3, padding=1), nn.Conv2d(6, channels, 1)

    def body(self, x):
        return F.relu(self.next(F.relu(self.conv(x))))


class LayerNormed(Small):
    """A stream that LayerNorm reads stays whole; what is hidden in a block closes. A scale for each channel."""

    def add_body(self, channels):
        self.layer_norm, self.scale = nn.LayerNorm(channels), nn.Parameter(torch.full((channels,), 0.3))
        self.up, self.down = nn.Linear(channels, 16), nn.Linear(16, channels)

    def body(self, x):
        y = self.layer_norm(x.permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Flattened(Small):
    """The classifier reads positions of each channel; a hidden Linear with a BatchNorm and a dropout."""

    def add_body(self, channels):
        self.hidden, self.hidden_norm = nn.Linear(channels * 16, 12), nn.BatchNorm1d(12)

    def features(self, channels):
        return 12

    def forward(self, images):
        x = F.adaptive_avg_pool2d(F.relu(self.norm(self.stem(images))), 4).view(len(images), -1)
        return self.head(F.dropout(F.relu(self.hidden_norm(self.hidden(x))), 0.5, self.training))


class Offset(Small):
    """What a closed channel becomes is not zero where a convolution reads it, so it stays."""

    def body(self, x):
        return F.relu(self.conv(torch.sigmoid(x)))


class Auxiliary(Small):
    """A second classifier in training."""

    def add_body(self, channels):
        super().add_body(channels)
        self.auxiliary = nn.Linear(channels, 10)

    def forward(self, images):
        logits = super().forward(images)
        return (logits, self.auxiliary(self.stem(images).mean((2, 3)))) if self.training else logits


class Scalar(Small):
    """Parameters of one number, and one for each channel and position."""

    def add_body(self, channels):
        super().add_body(channels)
        self.alpha, self.place = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.rand(1, channels, SIZE, SIZE) + 0.5)

    def body(self, x):
        return F.relu(self.conv(x * self.place) * torch.sigmoid(self.alpha))


class Alias(Small):
    """One module under two names, of which the second is called."""

    def add_body(self, channels):
        super().add_body(channels)
        self.again = self.conv

    def body(self, x):
        return F.relu(self.again(x))


class Tied(Small):
    """Two convolutions with one weight."""

    def add_body(self, channels):
        super().add_body(channels)
        self.other = nn.Conv2d(channels, channels, 3, padding=1)
        self.other.weight = self.conv.weight

    def body(self, x):
        return F.relu(self.other(F.relu(self.conv(x))))


class Frozen(nn.BatchNorm2d):
    """As networks for detection have it: it never leaves evaluation mode."""

    def train(self, mode: bool = True):
        return super().train(False)


class FrozenNorm(Small):
    def add_body(self, channels):
        super().add_body(channels)
        self.norm = Frozen(channels)


class Numbered(Small):
    """The number of images as a size: of a parameter that is expanded or repeated, and of zeros beside channels."""

    def add_body(self, channels):
        super().add_body(channels)
        self.scale, self.point = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5), nn.Conv2d(2 * channels + 3, channels, 1)

    def body(self, x):
        scales = torch.cat([self.scale.expand(len(x), -1, SIZE, SIZE), self.scale.repeat(len(x), 1, SIZE, SIZE)], 1)
        x = torch.cat([torch.cat([x, x], 1) * scales, x.new_zeros(len(x), 3, SIZE, SIZE)], 1)
        return F.relu(self.conv(self.point(x)))


class Parametrized(Small):
    """Weights that torch computes, of a convolution and of a Linear."""

    def add_body(self, channels):
        made = torch.nn.utils.parametrizations.weight_norm
        self.conv, self.hidden = made(nn.Conv2d(channels, 6, 3, padding=1)), made(nn.Linear(6, 12))

    def features(self, channels):
        return 12

    def body(self, x):
        return F.relu(self.hidden(F.relu(self.conv(x)).mean((2, 3))))[..., None, None]


class ConvOfItsOwn(nn.Conv2d):
    """With attributes that are called as this project's might be, and a parameter beside its weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate, self.gates, self.gate_site = nn.Parameter(torch.full((1,), 0.7)), 4, "none"

    def forward(self, x):
        return super().forward(x) * self.gate


class OwnAttributes(Small):
    def add_body(self, channels):
        self.conv = ConvOfItsOwn(channels, channels, 3, padding=1)


KINDS = [
    *(Small, Residual, Dense, Squeeze, Depthwise, Grouped, Shuffled, Split, Twice, WeightStandardised, LayerNormed, Flattened),
    *(Offset, Auxiliary, Subclasses, Scalar, Alias, Tied, FrozenNorm, Numbered, Parametrized, OwnAttributes),
]
