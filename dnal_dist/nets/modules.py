"""Modules that compact networks are made of beside torch's own."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


def _check_rising(channels: list[int], width: float = math.inf) -> None:
    """Raise ValueError unless `channels` are whole numbers that rise, from 0 to below `width`."""
    if not all(type(c) is int and 0 <= c < width for c in channels) or any(a >= b for a, b in pairwise(channels)):
        raise ValueError(f"not rising channel numbers below {width}: {str(channels)[:40]}")


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
        _check_rising(those)
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
            _check_rising(channels, width)
        self.branches = nn.ModuleList(branches)
        self.adds, self.width, self.carry, self.stride = adds, width, carry, stride
        for i, channels in enumerate([*adds, carry or []]):
            self.register_buffer(f"_channels{i}", torch.tensor(channels, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = None
        if self.carry is not None:
            out = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
            out = self._placed(None, out, len(self.adds), len(self.carry))
        for i, branch in enumerate(self.branches):
            out = self._placed(out, branch(x), i, len(self.adds[i]))
        # A view of x would let the ReLU behind it write to x.
        return out if self.adds else out.clone()

    def _placed(self, out: Tensor | None, part: Tensor, i: int, channels: int) -> Tensor:
        """`out` with `part` added to the i-th list of channels."""
        if channels == self.width:
            return part if out is None else out + part
        if out is None:
            out = part.new_zeros(part.shape[0], self.width, *part.shape[2:])
        return out.index_add(1, getattr(self, f"_channels{i}"), part.expand(out.shape[0], -1, *out.shape[2:]))
