"""Parallel branches of one input as one branch: few large convolutions in place of many small ones, the same function."""

import copy
import itertools
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnal_dist.nets.narrow import Narrow, Ref, Step, names

# Operations that give each channel's result from that channel alone.
PER_CHANNEL = {
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
}
# Runtimes are slow with depthwise convolutions of other numbers of channels.
MULTIPLE = 8


class Branch(NamedTuple):
    """One operand of a sum: a convolution and what keeps its channels apart, if that is all there is from `source` on, and a
    convolution at the end."""

    source: str
    inner: list[Step]
    end: list[Step]
    """A convolution, and a BatchNorm, and a step that pads with channels of zeros, if there are."""


def merged(network: Narrow) -> Narrow:
    """The function of a compact network in eval mode, where branches of one input and the same kinds of layers that are added up are
    one branch, and constants that are added to a branch are in its bias."""
    return _Merging(network).build()


class _Merging:
    def __init__(self, network: Narrow):
        self.network, self.made = network, {step.out: step for step in network.steps}
        self.uses = Counter(name for step in network.steps for name in names([step.args, step.kwargs]))
        self.calls = Counter(step.target for step in network.steps if step.kind in ("module", "tensor"))
        self.layers: dict[str, nn.Module] = {}
        self.gone: set[str] = set()
        """Results that nothing reads any more."""

    @torch.no_grad()
    def build(self) -> Narrow:
        instead: dict[str, list[Step]] = {}
        for step in reversed(self.network.steps):
            if _adds(step) and step.out not in self.gone:
                instead[step.out] = self._sum(step)
        steps = [new for step in self.network.steps if step.out not in self.gone for new in instead.get(step.out, [step])]
        return self.network.with_steps(steps, self.layers)

    def _sum(self, step: Step) -> list[Step]:
        """What computes a sum now."""
        operands, gone = self._operands(step)
        groups: dict[str, list[Branch]] = {}
        constants, rest = [], []
        for name in operands:
            if branch := self._branch(name):
                groups.setdefault(repr([branch.source, *map(self._kind, branch.inner + branch.end[:1])]), []).append(branch)
            elif (constant := self._constant(name)) is not None:
                constants.append(constant)
            else:
                rest.append(name)
        if not groups or (not constants and max(map(len, groups.values())) == 1):
            return [step]
        steps: list[Step] = []
        for group in sorted(groups.values(), key=len, reverse=True):
            if len(group) > 1 or constants:
                steps += self._one(group, sum(value for _, value in constants))
                gone += [s.out for branch in group for s in branch.end + branch.inner * (len(group) > 1)]
                gone += [s.out for found, _ in constants for s in found]
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
            if self.uses[name] == 1 and name in self.made and _adds(self.made[name]):
                found = self._operands(self.made[name])
                operands, inner = operands + found[0], [*inner, name, *found[1]]
            else:
                operands.append(name)
        return operands, inner

    def _branch(self, name: str) -> Branch | None:
        """What writes an operand, if a convolution does."""
        end: list[Step] = []
        for kind in ("pad", "norm", "conv"):
            if (step := self._own(name, kind)) is not None:
                end.insert(0, step)
                name = step.args[0].name
        if not end or self._kind(end[0])[0] != "conv":
            return None
        source, inner = name, []
        while (step := self._own(name, "conv", "norm", "op", "depthwise")) is not None:
            inner.insert(0, step)
            name = step.args[0].name
            if self._kind(step)[0] == "conv":
                return Branch(name, inner, end)
        return Branch(source, [], end)

    def _constant(self, name: str) -> tuple[list[Step], Tensor] | None:
        """The steps and the value, (channels,), of an operand with one number a channel."""
        pad = self._own(name, "pad")
        step = self._own(name if pad is None else pad.args[0].name, "constant")
        if step is None:
            return None
        value = self.network.called(step).detach().flatten()
        return ([step], value) if pad is None else ([step, pad], F.pad(value, (0, pad.args[1][5])))

    def _own(self, name: str, *kinds: str) -> Step | None:
        """The step with a result that one other alone reads, if it is of these kinds."""
        step = self.made.get(name)
        return step if step and self.uses[name] == 1 and (self._kind(step) or " ")[0] in kinds else None

    def _kind(self, step: Step) -> tuple | None:
        """What must be equal in steps that can be one."""
        plain, called = step.target.partition(".")[0], self.network.called(step)
        if called is not None and self.calls[step.target] > 1:
            return None
        if step.kind == "tensor":
            return ("constant",) if called.dim() == 4 and called.numel() == called.shape[1] else None
        if isinstance(called, _BatchNorm):
            return ("norm", called.eps, called.momentum, called.affine) if called.running_mean is not None else None
        if isinstance(called, nn.Conv2d) and (called.groups == 1 or called.groups == called.in_channels == called.out_channels):
            how = called.kernel_size, called.stride, called.padding, called.dilation, called.bias is None
            return "conv" if called.groups == 1 else "depthwise", *how
        if step.kind == "op" and len(names([step.args, step.kwargs])) == 1:
            if plain == "pad" and len(step.args) == 2 and len(step.args[1]) == 6 and not any(step.args[1][:5]):
                return ("pad",)
            return ("op", step.target, step.args[1:], step.kwargs) if plain in PER_CHANNEL else None
        return None

    def _one(self, group: list[Branch], constant: Tensor | int) -> list[Step]:
        """The steps of one branch for several, of whose inner layers nothing stays if there are several, and a constant."""
        steps, source = [], group[0].inner[-1].out if group[0].inner else group[0].source
        fill = 0
        if len(group) > 1 and group[0].inner:
            source = group[0].source
            fill = -sum(self.network.called(branch.inner[0]).out_channels for branch in group) % MULTIPLE
            for several in zip(*(branch.inner for branch in group), strict=True):
                step = several[0]._replace(args=[Ref(source), *several[0].args[1:]])
                if step.kind == "module":
                    step = step._replace(target=self._name([s.target for s in several]))
                    self.layers[step.target] = _joined([self.network.called(s) for s in several], fill)
                steps.append(step)
                source = step.out
        path = self._name([branch.end[0].target for branch in group])
        weights, biases = zip(*(self._folded(branch.end) for branch in group), strict=True)
        weight = F.pad(torch.cat(weights, 1), (0, 0, 0, 0, 0, fill)) if group[0].inner else sum(weights)
        conv = copy.deepcopy(self.network.called(group[0].end[0]))
        conv.in_channels, conv.out_channels = weight.shape[1], weight.shape[0]
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(sum(biases) + constant)
        self.layers[path] = conv
        return [*steps, group[0].end[-1]._replace(kind="module", target=path, args=[Ref(source)], kwargs={})]

    def _folded(self, end: list[Step]) -> tuple[Tensor, Tensor]:
        """The weight and bias of what ends a branch."""
        conv, missing = self.network.called(end[0]), 0
        weight, bias = conv.weight, conv.bias
        for step in end[1:]:
            if step.kind == "op":
                missing = step.args[1][5]
            else:
                norm = self.network.called(step)
                of = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                weight, bias = fuse_conv_bn_weights(weight, bias, *of)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(bias, (0, missing))

    def _name(self, paths: list[str]) -> str:
        """A path made of those of several layers."""
        parts = zip(*(path.split(".") for path in paths), strict=False)
        name = ".".join("_".join(dict.fromkeys(part)) for part in parts)
        taken = self.layers.keys() | (self.calls.keys() - set(paths))
        return next(path for i in itertools.count() if (path := f"{name}{i or ''}") not in taken)


def _joined(modules: list[nn.Module], fill: int) -> nn.Module:
    """Layers of one kind as one, with `fill` channels more at the end that are zero."""
    made = copy.deepcopy(modules[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (first := getattr(made, name, None)) is not None:
            tensors = [getattr(module, name) for module in modules]
            rest = first.new_full((fill, *first.shape[1:]), float(name == "running_var"))
            tensor = torch.cat([*tensors, rest])
            setattr(made, name, nn.Parameter(tensor, any(t.requires_grad for t in tensors)) if name in made._parameters else tensor)
    channels = len(made.weight) if isinstance(made, nn.Conv2d) else len(made.running_mean)
    if isinstance(made, _BatchNorm):
        made.num_features = channels
    elif made.groups > 1:
        made.groups = made.in_channels = made.out_channels = channels
    else:
        made.out_channels = channels
    return made


def _adds(step: Step) -> bool:
    return step.kind == "op" and step.target == "add.Tensor" and len(names(step.args)) == 2 and not step.kwargs
