"""Compact networks of older releases as runtimes like them: sequences with sums whose branches write all channels."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets.modules import Channels, Constant, Sum

Order = list[int | None]
"""Which channel of a tensor before stands at each place now; None: zeros."""


def whole(network: nn.Sequential) -> nn.Sequential:
    """The function of a compact network, in eval mode, without index_add or gather. A stream that gains channels keeps those before
    in front, so that its shortcut is a padding with zeros at the end."""
    if not any(isinstance(module, Sum | Channels) for module in network.modules()):
        return copy.deepcopy(network)
    first = next(module for module in network if isinstance(module, nn.Conv2d))
    found, order = [], list(range(first.in_channels))
    for module in network:
        made, order = (_sum if isinstance(module, Sum) else _module)(module, order)
        found.append(made)
    return nn.Sequential(*found).train(network.training)


def _sum(old: Sum, order: Order) -> tuple[Sum, Order]:
    carried = [] if old.carry is None else [old.carry[channel] for channel in order]
    after = carried + sorted(set(range(old.width)) - set(carried))
    branches = [_branch(branch, adds, order, after) for branch, adds in zip(old.branches, old.adds, strict=True)]
    everything = list(range(old.width))
    carry = None if old.carry is None else everything[: len(carried)]
    return Sum(branches, [everything] * len(branches), old.width, carry, old.stride), after


def _branch(branch: nn.Sequential, adds: list[int], order: Order, after: Order) -> nn.Sequential:
    """The branch with x in the `order`, and all channels of the stream written in the order `after`."""
    place = {channel: i for i, channel in enumerate(adds)}
    rows: Order = [place.get(channel) for channel in after]
    if isinstance(branch[0], Constant):
        constant = Constant(len(rows)).to(branch[0].value)
        constant.value.data.copy_(_take(branch[0].value.data, 1, rows))
        return nn.Sequential(constant)
    found = []
    for module in branch:
        if isinstance(module, Channels):
            at = {channel: i for i, channel in enumerate(module.those)}
            order = [at.get(channel) for channel in order]
        elif module is branch[-2]:  # a convolution
            found.append(_conv(module, order, rows))
            order = rows
        else:
            made, order = _module(module, order)
            found.append(made)
    return nn.Sequential(*found)


def _module(module: nn.Module, order: Order) -> tuple[nn.Module, Order]:
    """A module that reads channels in the `order`, and the order in which it writes them."""
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1
        rows = order if depthwise else list(range(module.out_channels))
        return _conv(module, order, rows), rows
    if isinstance(module, nn.Linear):
        spread = module.in_features // len(order)
        columns = [None if c is None else c * spread + i for c in order for i in range(spread)]
        made = nn.Linear(len(columns), module.out_features, module.bias is not None)
        return _with(made, module, weight=_take(module.weight, 1, columns), bias=module.bias), list(range(module.out_features))
    if isinstance(module, _BatchNorm):
        made = type(module)(len(order), module.eps, module.momentum)
        tensors = {name: _take(getattr(module, name), 0, order) for name in ("weight", "bias", "running_mean", "running_var")}
        tensors["running_var"][[channel is None for channel in order]] = 1
        return _with(made, module, **tensors, num_batches_tracked=module.num_batches_tracked), order
    return copy.deepcopy(module), order


def _conv(module: nn.Conv2d, columns: Order, rows: Order) -> nn.Conv2d:
    weight = _take(module.weight, 0, rows)
    groups = len(rows) if module.groups > 1 else 1
    weight = weight if groups > 1 else _take(weight, 1, columns)
    made = nn.Conv2d(
        *(weight.shape[1] * groups, len(rows), module.kernel_size, module.stride, module.padding, module.dilation, groups),
        bias=module.bias is not None,
    )
    return _with(made, module, weight=weight, bias=None if module.bias is None else _take(module.bias, 0, rows))


def _take(tensor: Tensor, dim: int, order: Order) -> Tensor:
    """tensor, its entries along `dim` in the order; zeros where that has none."""
    tensor = tensor.detach()
    known = torch.tensor([i for i, channel in enumerate(order) if channel is not None], dtype=torch.long, device=tensor.device)
    source = torch.tensor([channel for channel in order if channel is not None], dtype=torch.long, device=tensor.device)
    shape = list(tensor.shape)
    shape[dim] = len(order)
    return tensor.new_zeros(shape).index_copy_(dim, known, tensor.index_select(dim, source))


def _with(made: nn.Module, like: nn.Module, **tensors: Tensor | None) -> nn.Module:
    made = made.to(like.weight.device, like.weight.dtype)
    for name, tensor in tensors.items():
        if tensor is not None:
            getattr(made, name).data.copy_(tensor)
    return made
