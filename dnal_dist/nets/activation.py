"""ReLU6 and hardtanh that keep their result for the backward pass; torch's own keep a copy of their input, beside the result that
the next layer keeps anyway."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary


class _Hardtanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        result = F.hardtanh(x, low, high, inplace)
        ctx.save_for_backward(result)
        ctx.bounds = low, high
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        # The result is strictly between the bounds where the input is.
        return torch.ops.aten.hardtanh_backward(gradient, result, *ctx.bounds), None, None, None


def plain(x: Tensor, trained: Tensor) -> bool:
    """Whether torch's own is to be called on `x`: it is not where `trained` gets a gradient in a plain step, and nowhere else, so
    that compilers and exporters see it."""
    traced = has_torch_function_unary(x) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or not (torch.is_grad_enabled() and trained.requires_grad)


def relu6(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x, inplace) if plain(x, x) else _Hardtanh.apply(x, 0.0, 6.0, inplace)


def hardtanh(x: Tensor, low: float = -1.0, high: float = 1.0, inplace: bool = False) -> Tensor:
    return F.hardtanh(x, low, high, inplace) if plain(x, x) else _Hardtanh.apply(x, low, high, inplace)


class ReLU6(nn.ReLU6):
    def forward(self, x: Tensor) -> Tensor:
        return relu6(x, self.inplace)


aten = torch.ops.aten
OPERATIONS = {
    aten.relu6.default: relu6,
    aten.relu6_.default: functools.partial(relu6, inplace=True),
    aten.hardtanh.default: hardtanh,
    aten.hardtanh_.default: functools.partial(hardtanh, inplace=True),
}
"""What takes the place of an operation."""
