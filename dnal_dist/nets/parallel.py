"""Layers for runtimes: parallel branches of one input as one, and channels that they are fast with; the same function."""

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_dist.nets.narrow import Narrow, Ref, Step, names

# Operations that give each channel's result from that channel alone.
PER_CHANNEL = {"relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid"}
# Runtimes are slow with depthwise convolutions of other numbers of channels.
MULTIPLE = 8


class Branch(NamedTuple):
    """One operand of a sum: a convolution and what keeps its channels apart, if that is all there is from `source` on, and a
    convolution at the end."""

    source: str
    inner: list[Step]
    end: list[Step]
    """A convolution, and a BatchNorm if there is one."""


def merged(network: Narrow) -> Narrow:
    """The function of a network from `whole`. Branches of one input and the same kinds of layers that are added up are one branch,
    constants added to a branch are in its bias, and depthwise convolutions between two others have a multiple of 8 channels."""
    return Chains(Chains(network).merged()).filled()


class Chains:
    def __init__(self, network: Narrow):
        self.network, self.made = network, {step.out: step for step in network.steps}
        self.layers: dict[str, nn.Module] = {}
        self.gone: set[str] = set()
        """Results that nothing reads any more."""

    @torch.no_grad()
    def merged(self) -> Narrow:
        instead: dict[str, list[Step]] = {}
        for step in reversed(self.network.steps):
            if _adds(step) and step.out not in self.gone:
                instead[step.out] = self._sum(step)
        steps = [new for step in self.network.steps if step.out not in self.gone for new in instead.get(step.out, [step])]
        return self.network.with_steps(steps, self.layers)

    @torch.no_grad()
    def filled(self) -> Narrow:
        for step in self.network.steps:
            if (self._kind(step) or " ")[0] == "conv":
                _, inner = self._inner(step.args[0].name)
                conv = self.network.called(step)
                fill = -conv.in_channels % MULTIPLE
                if fill and any(self._kind(one)[0] == "depthwise" for one in inner):
                    for one in (one for one in inner if one.kind == "module"):
                        # The convolution may have ended a chain before.
                        self.layers[one.target] = _joined([self.layers.get(one.target, self.network.called(one))], fill)
                    self.layers[step.target] = _reading(conv, F.pad(conv.weight, (0, 0, 0, 0, 0, fill)), conv.bias)
        return self.network.with_steps(self.network.steps, self.layers)

    def _sum(self, step: Step) -> list[Step]:
        """What computes a sum now."""
        operands, gone = self._operands(step)
        groups: dict[str, list[Branch]] = {}
        constants, rest = [], []
        for name in operands:
            end = self.end(name)
            if not end:
                rest.append(name)
            elif end[0].kind == "tensor":
                constants.append(name)
            else:
                branch = Branch(*self._inner(end[0].args[0].name), end)
                groups.setdefault(repr([branch.source, *map(self._kind, branch.inner + end[:1])]), []).append(branch)
        widths = {self.network.called(branch.end[0]).out_channels for group in groups.values() for branch in group}
        if len(widths | {self.network.called(self.made[name]).numel() for name in constants}) > 1 or not widths:
            return [step]
        if not constants and max(map(len, groups.values())) == 1:
            return [step]
        steps: list[Step] = []
        for group in sorted(groups.values(), key=len, reverse=True):
            if len(group) > 1 or constants:
                values = [self.network.called(self.made[name]).flatten() for name in constants]
                steps += self._one(group, sum(values))
                gone += constants + [s.out for branch in group for s in branch.end + branch.inner * (len(group) > 1)]
                constants = []
                rest.append(steps[-1].out)
            else:
                rest.append(group[0].end[-1].out)
        self.gone.update(gone)
        if len(rest) == 1:
            return [*steps[:-1], steps[-1]._replace(out=step.out)]
        for i, name in enumerate(rest[1:], 2):
            before = rest[0] if i == 2 else steps[-1].out
            steps.append(Step(step.out if i == len(rest) else f"{step.out}.{i}", "op", "add.Tensor", [Ref(before), Ref(name)], {}))
        return steps

    def _operands(self, step: Step) -> tuple[list[str], list[str]]:
        """The results that a sum of sums adds up, and the sums within it."""
        operands, inner = [], []
        for name in names(step.args):
            if self.network.uses[name] == 1 and name in self.made and _adds(self.made[name]):
                found = self._operands(self.made[name])
                operands, inner = operands + found[0], [*inner, name, *found[1]]
            else:
                operands.append(name)
        return operands, inner

    def end(self, name: str) -> list[Step]:
        """What writes the result `name` for one reader alone: a constant, a convolution, or one and its BatchNorm; else nothing."""
        norm = self._own(name, "norm")
        conv = self._own(norm.args[0].name if norm else name, "conv", *([] if norm else ["constant"]))
        return [step for step in (conv, norm) if step] if conv else []

    def _inner(self, name: str) -> tuple[str, list[Step]]:
        """A convolution and the steps behind it that keep channels apart, up to the result `name`, and what the convolution reads;
        nothing and `name` if there are no such steps."""
        source, inner = name, []
        while (step := self._own(source, "conv", "norm", "op", "depthwise")) is not None:
            inner.insert(0, step)
            source = step.args[0].name
            if self._kind(step)[0] == "conv":
                return source, inner
        return name, []

    def _own(self, name: str, *kinds: str) -> Step | None:
        """The step with a result that one other alone reads, if it is of these kinds."""
        step = self.made.get(name)
        return step if step and self.network.uses[name] == 1 and (self._kind(step) or " ")[0] in kinds else None

    def _kind(self, step: Step) -> tuple | None:
        """What must be equal in steps that can be one."""
        called = self.network.called(step)
        if called is not None and self.network.calls[step.target] > 1:
            return None
        if step.kind == "tensor":
            return ("constant",) if called.dim() == 4 and called.numel() == called.shape[1] else None
        if isinstance(called, _BatchNorm):
            return "norm", called.eps, called.momentum, called.affine
        if isinstance(called, nn.Conv2d) and (called.groups == 1 or called.groups == called.in_channels == called.out_channels):
            how = called.kernel_size, called.stride, called.padding, called.dilation, called.bias is None
            return "conv" if called.groups == 1 else "depthwise", *how
        if step.target.partition(".")[0] in PER_CHANNEL and len(names([step.args, step.kwargs])) == 1:
            return "op", step.target, step.args[1:], step.kwargs
        return None

    def _one(self, group: list[Branch], constant: Tensor | int) -> list[Step]:
        """The steps of one branch for several, of which those of a single one are its end alone, and a constant."""
        first = group[0]
        steps, x = [], first.inner[-1].out if first.inner else first.source
        if len(group) > 1 and first.inner:
            x = first.source
            for several in zip(*(branch.inner for branch in group), strict=True):
                step = several[0]._replace(args=[Ref(x), *several[0].args[1:]])
                if step.kind == "module":
                    step = step._replace(target=self._name([s.target for s in several]))
                    self.layers[step.target] = _joined([self.network.called(s) for s in several])
                steps.append(step)
                x = step.out
        path = self._name([branch.end[0].target for branch in group])
        weights, biases = zip(*(self._folded(branch.end) for branch in group), strict=True)
        weight = torch.cat(weights, 1) if first.inner else sum(weights)
        self.layers[path] = _reading(self.network.called(first.end[0]), weight, sum(biases) + constant)
        return [*steps, Step(first.end[-1].out, "module", path, [Ref(x)], {})]

    def _folded(self, end: list[Step]) -> tuple[Tensor, Tensor]:
        """The weight and bias of what ends a branch."""
        conv, *norms = map(self.network.called, end)
        weight, bias = conv.weight, conv.bias
        for norm in norms:
            of = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(weight, bias, *of)
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def _name(self, paths: list[str]) -> str:
        """A path made of those of several layers."""
        parts = zip(*(path.split(".") for path in paths), strict=False)
        name = ".".join("_".join(dict.fromkeys(part)) for part in parts)
        taken = self.layers.keys() | (self.network.calls.keys() - set(paths))
        return next(path for i in itertools.count() if (path := f"{name}{i or ''}") not in taken)


def _reading(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution like `conv` with another weight and bias."""
    made = copy.deepcopy(conv)
    made.out_channels, made.in_channels = weight.shape[:2]
    made.weight = nn.Parameter(weight, conv.weight.requires_grad)
    made.bias = None if bias is None else nn.Parameter(bias, conv.weight.requires_grad)
    return made


def _joined(modules: list[nn.Module], fill: int = 0) -> nn.Module:
    """Layers of one kind as one, with `fill` channels more at the end that give zero."""

    def rows(name: str, first: Tensor) -> Tensor:
        rest = first.new_full((fill, *first.shape[1:]), float(name == "running_var"))
        return torch.cat([*(getattr(module, name) for module in modules), rest])

    return with_rows(copy.deepcopy(modules[0]), rows)


def with_rows(module: nn.Module, rows: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A convolution or BatchNorm, changed to have other output channels. rows: its tensors by their names and those before."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (before := getattr(module, name, None)) is not None:
            tensor = rows(name, before)
            setattr(module, name, nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor)
            channels = len(tensor)
    if isinstance(module, _BatchNorm):
        module.num_features = channels
    else:
        module.out_channels = channels
        if module.groups > 1:
            module.groups = module.in_channels = channels
    return module


def _adds(step: Step) -> bool:
    return step.kind == "op" and step.target == "add.Tensor" and len(names(step.args)) == 2 and not step.kwargs
