"""Modules that compact networks are made of beside torch's own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _check(channels: list[int], width: float = math.inf) -> None:
    """Raise ValueError unless `channels` are different whole numbers from 0 to below `width`."""
    if not all(type(c) is int and 0 <= c < width for c in channels) or len(set(channels)) < len(channels):
        raise ValueError(f"not different channel numbers below {width}: {str(channels)[:40]}")


class Constant(nn.Module):
    """What is left of a branch whose first channels all closed: one learnable number a channel, shape (1, C, 1, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Channels(nn.Module):
    """Channels `those`, a rising list, of x (N, C, H, W)."""

    def __init__(self, those: list[int]):
        super().__init__()
        _check(those)
        self.those = those
        self.register_buffer("_those", torch.tensor(those, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self._those)


class Sum(nn.Module):
    """A sum of branches, each of which may write only some of the stream's `width` channels, and of a shortcut, if there is one.

    branches[i](x) is added to channels `adds[i]`. carry: the channels of the stream that x (N, len(carry), H, W) itself goes to,
    every `stride`-th pixel of it; None: there is no such shortcut. Lists of channels rise; one that names all costs nothing.
    """

    def __init__(
        self, branches: list[nn.Sequential], adds: list[list[int]], width: int, carry: list[int] | None = None, stride: int = 1
    ):
        super().__init__()
        if len(adds) != len(branches) or (not branches and carry is None) or stride < 1:
            raise ValueError("a sum needs something to add up, and for each branch its channels")
        for channels in (*adds, carry or []):
            _check(channels, width)
        self.branches = nn.ModuleList(branches)
        self.adds, self.width, self.carry, self.stride = adds, width, carry, stride
        self.places = nn.ModuleList(Place(channels, width) for channels in adds)
        self.carried = nn.ModuleList([] if carry is None else [Place(carry, width)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | None = None
        # Loops over modules, which torch.jit.script unrolls.
        for place in self.carried:
            out = place(x[:, :, :: self.stride, :: self.stride], out)
            if len(self.branches) == 0:
                # A view of x would let the ReLU behind it write to x.
                out = out.clone()
        for branch, place in zip(self.branches, self.places):  # noqa: B905  (torch.jit.script knows no `strict`)
            out = place(branch(x), out)
        assert out is not None
        return out


@torch.fx.wrap
def _zeros(part: Tensor, width: int) -> Tensor:
    """Zeros (N, width, H, W), in memory as `part` (N, C, H, W) is."""
    # By its strides, since every second pixel of a tensor is not contiguous in any format.
    layout = torch.channels_last if part.stride(1) < part.stride(3) else torch.contiguous_format
    size = [part.size(0), width, part.size(2), part.size(3)]
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=layout).zero_()


class Place(nn.Module):
    """Adds a part (N, len(channels), H, W) to those channels of a stream of `width`; a constant part has one pixel."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        _check(channels, width)
        self.width, self.whole, self.places = width, len(channels) == width, channels
        self.first = channels == list(range(len(channels)))
        self.register_buffer("channels", torch.tensor(channels, dtype=torch.long), persistent=False)

    def forward(self, part: Tensor, out: Tensor | None = None) -> Tensor:
        if self.first and not self.whole:
            part = F.pad(part, (0, 0, 0, 0, 0, self.width - part.size(1)))
        if self.first:
            return part if out is None else out + part
        # In place of a copy, which keeps the memory's layout; index_add does not.
        out = _zeros(part, self.width) if out is None else out.clone()
        part = part.to(out.dtype)  # autocast leaves constants in float32
        return out.index_add_(1, self.channels, part.expand(out.size(0), part.size(1), out.size(2), out.size(3)))
