"""Depthwise convolutions whose weight gradients are products of matrices where that is faster: on a CPU, with few places in the
batch's maps, kernels wider than 3 would pad each channel's weights to 16 x 16 channels to take a kernel meant for others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_dist.nets.activation import plain

# Places in the maps of a whole batch, and with a stride above 1, up to which products were faster (benchmarks/depthwise.py).
MOST, MOST_STRIDED = 3200, 300


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_x = of_weight = None
        if needs_x:
            sizes = [len(weight)], ctx.stride, ctx.padding, [1, 1], False, [0, 0], len(weight)
            of_x = torch.ops.aten.convolution_backward(gradient, x, weight, *sizes, [True, False, False])[0]
        if needs_weight:
            of_weight = weight_gradient(x, gradient, weight, ctx.stride, ctx.padding)
        return of_x, of_weight, gradient.sum((0, 2, 3)) if needs_bias else None, None, None


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The gradient of a depthwise convolution's weight, (C, 1, *kernel), with its strides. x (n, C, H, W); gradient (n, C, h, w) of
    its result.

    For each row of the kernel one product a channel, of all columns of the gradient with all of x: a place of the kernel is the sum
    along one of its diagonals.
    """
    (height, width), (channels, _, *kernel) = gradient.shape[2:], weight.shape
    rows, columns = stride[0] * (height - 1) + kernel[0], stride[1] * (width - 1) + kernel[1]
    (top, left), (below, right) = padding, (rows - x.shape[2] - padding[0], columns - x.shape[3] - padding[1])
    padded = F.pad(x.permute(1, 2, 0, 3), (left, right, 0, 0, top, below))  # C, rows, n, columns
    gradients = gradient.permute(1, 2, 0, 3).reshape(channels, -1, width).transpose(1, 2)
    found = torch.empty_like(weight)
    for row in range(kernel[0]):
        own = padded[:, row : row + stride[0] * (height - 1) + 1 : stride[0]].reshape(channels, -1, columns)
        pairs = torch.bmm(gradients, own)
        diagonals = pairs.as_strided((channels, kernel[1], width), (width * columns, 1, columns + stride[1]))
        found[:, 0, row] = diagonals.sum(2)
    return found


def faster(module: nn.Module) -> nn.Module:
    """`module` itself; a convolution of the kind below where that is of use, all others stay as they are."""
    if type(module) is nn.Conv2d and _is_of_use(module):
        module.__class__ = Conv2d
    return module


def _is_of_use(conv: nn.Conv2d) -> bool:
    is_wide = conv.groups == conv.in_channels == conv.out_channels > 1 and max(conv.kernel_size) > 3
    return is_wide and conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, with the faster way to those gradients."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _is_of_use(self) and self._is_faster(x, weight):
            return _Depthwise.apply(x, weight, bias, self.stride, self.padding)
        return super()._conv_forward(x, weight, bias)

    def _is_faster(self, x: Tensor, weight: Tensor) -> bool:
        if plain(x, weight) or x.device.type != "cpu" or x.dim() != 4 or torch.is_autocast_enabled("cpu"):
            return False
        places = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        return x.dtype in (torch.float32, torch.float64) and 0 < places <= (MOST if self.stride == (1, 1) else MOST_STRIDED)
