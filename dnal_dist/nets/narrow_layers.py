"""Layers of a graph with the channels that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnal_dist.nets.convolution import faster
from dnal_dist.nets.layer_rules import argument_of

if TYPE_CHECKING:
    from dnal_dist.nets.narrowing import Narrowing


def _conv(narrowing: Narrowing, node, path: str) -> nn.Conv2d:
    layer = narrowing.graph.layers[path]
    weight, bias = _tensors(narrowing, node, path)
    groups = layer.groups
    if layer.groups > 1 and layer.whole_groups:
        groups = weight.shape[0] // (len(layer.outputs) // layer.groups)
    settings = {key: argument_of(node, key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
    # What it is made with would be drawn at random for nothing.
    conv = nn.Conv2d(*sizes, **settings, groups=groups, bias=bias is not None, device="meta")
    return _with(faster(conv), weight=weight, bias=bias)


def _tensors(narrowing: Narrowing, node, path: str) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution or Linear."""
    graph, layer = narrowing.graph, narrowing.graph.layers[path]
    if not layer.baked:
        bias = graph.tensor_of(argument_of(node, "bias"))
        return narrowing.cut(graph.tensor_of(node.args[1])), narrowing.cut(bias) if bias else None
    per_group = len(layer.inputs) // layer.groups
    cuts = {0: layer.outputs} if layer.groups > 1 and layer.whole_groups else {0: layer.outputs, 1: layer.inputs[:per_group]}
    weight, bias = _computed(narrowing.module.get_submodule(path))
    return narrowing.cut_of(weight, cuts), None if bias is None else narrowing.cut_of(bias, {0: layer.outputs})


def _computed(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that a convolution or Linear computes from its parameters."""
    found = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("conv2d", "_conv_forward", "linear"):
                found.append((args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")))
            return function(*args, **(kwargs or {}))

    if isinstance(module, nn.Linear):
        x = torch.zeros(1, module.in_features)
    else:
        size = max(k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)) + 1
        x = torch.zeros(1, module.in_channels, size, size)
    with torch.no_grad(), Seen():
        module(x.to(module.weight))
    return found[-1]


def _linear(narrowing: Narrowing, node, path: str) -> nn.Linear:
    weight, bias = _tensors(narrowing, node, path)
    return _with(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"), weight=weight, bias=bias)


def _batch_norm(narrowing: Narrowing, node, path: str) -> nn.Module:
    graph = narrowing.graph
    names = [graph.tensor_of(argument) for argument in node.args[1:5]]
    weight, bias, mean, var = (None if name is None else narrowing.cut(name) for name in names)
    if mean is None:
        raise ValueError(f"{path} has no running statistics; give it track_running_stats=True")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(node.meta["val"].shape)]
    # A momentum of None is traced as a number.
    momentum = narrowing.module.get_submodule(path).momentum
    norm = kind(len(mean), eps=node.args[7], momentum=momentum, affine=weight is not None)
    return _with(norm, weight=weight, bias=bias, running_mean=mean, running_var=var)


def _dropout(narrowing: Narrowing, node, path: str) -> nn.Dropout:
    return nn.Dropout(node.args[1])


def _with(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(module, name, nn.Parameter(tensor) if name in module._parameters else tensor)
    return module


MODULES = {"conv2d": _conv, "linear": _linear, "batch_norm": _batch_norm, "dropout": _dropout}
