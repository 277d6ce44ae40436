"""BatchNorm across processes."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from dnal_dist.nets import GatedBatchNorm


def replace_norms(network: nn.Module, across: bool) -> None:
    """Plain BatchNorms of a compact network become gated ones, which keep their statistics in float32 whatever the weights are in,
    let them rest while activations are computed again, and normalise with the statistics of all processes if `across`."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = GatedBatchNorm
        if across and isinstance(module, GatedBatchNorm):
            module.across = _normalise_across


def _normalise_across(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm of x (n, C, ...) in training with the statistics of all processes' batches, which are equally large."""
    world_size, dtype = dist.get_world_size(), x.dtype
    if weight is None:
        weight, bias = x.new_ones(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
    if x.device.type == "cuda":
        if running_mean is None:
            # Without any, torch's counts are of another type than a low-precision x, and its kernel refuses them.
            running_mean, running_var = torch.zeros_like(weight, dtype=torch.float32), torch.ones_like(weight, dtype=torch.float32)
        kept = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        x = x if kept else x.contiguous()
        return SyncBatchNorm.apply(x, weight, bias, running_mean, running_var, eps, momentum, dist.group.WORLD, world_size)
    # Torch's has kernels for GPUs only. Statistics are taken in float32 at least.
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    axes, shape = [0, *range(2, x.dim())], (1, -1, *(1,) * (x.dim() - 2))
    mean = differentiable.all_reduce(x.mean(axes)) / world_size
    centred = x - mean.view(shape)
    variance = differentiable.all_reduce((centred**2).mean(axes)) / world_size
    if running_mean is not None:
        count = x.numel() // x.shape[1] * world_size
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype) * (count / max(1, count - 1)), momentum)
    return (centred * (weight * (variance + eps).rsqrt()).view(shape) + bias.view(shape)).to(dtype)
