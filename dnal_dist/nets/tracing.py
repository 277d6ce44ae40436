"""From a module to the operations that an image goes through: by torch.export, for any; by torch.fx, for those of this project."""

import contextlib
import logging
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

aten = torch.ops.aten


class Traced(NamedTuple):
    nodes: list[fx.Node]
    """Operations of aten, as torch.export writes them, with parameters and buffers as placeholders."""
    names: dict[str, str]
    """Parameter, buffer or constant of each placeholder, by its node's name."""
    constants: dict[str, Tensor]


Tracer = Callable[[nn.Module, Tensor], Traced]
# Images that a network is read for: a size that is this number, and no other, is the number of images.
IMAGES = 5


def exported(module: nn.Module, example: Tensor) -> Traced:
    """What torch.export finds."""
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, (example[:1].expand(IMAGES, -1, -1, -1).contiguous(),), strict=False)
    _inline(program)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    return Traced(list(program.graph.nodes), names, dict(program.constants))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch writes of an operation that fails, beside the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _inline(program: torch.export.ExportedProgram) -> None:
    """Put the operations within `with torch.autocast(...)` blocks and the like among the others."""
    for node in list(program.graph.nodes):
        parts = [a for a in node.all_input_nodes if a.op == "get_attr"] if node.op == "call_function" else []
        if len(parts) != 1 or not isinstance(inner := program.graph_module.get_submodule(parts[0].target), fx.GraphModule):
            continue
        inputs = iter(node.args[node.args.index(parts[0]) + 1 :])
        copied: dict = {}
        with program.graph.inserting_before(node):
            for own in inner.graph.nodes:
                if own.op == "placeholder":
                    copied[own] = next(inputs)
                elif own.op != "output":
                    copied[own] = program.graph.node_copy(own, copied.__getitem__)
        (output,) = [own for own in inner.graph.nodes if own.op == "output"]
        for user in list(node.users):
            user.replace_all_uses_with(copied[output.args[0][user.args[1]]])
            program.graph.erase_node(user)
        program.graph.erase_node(node)


LEAVES = (nn.Conv2d, _BatchNorm, nn.Linear, nn.ReLU)


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, _: str) -> bool:
        return isinstance(m, LEAVES)


def symbolic(module: nn.Module, example: Tensor) -> Traced:
    """The same of a network of this project, without torch.export: importing that takes longer than all the rest of a start."""
    made = _Made(module)
    for node in _Leaves().trace(module).nodes:
        if node.op == "placeholder":
            made.put(node, made.graph.placeholder(node.name), torch.empty_like(example, device="meta"))
        elif node.op == "output":
            made.graph.output((made.of[node.args[0]],))
        else:
            made.add(node)
    return Traced(list(made.graph.nodes), made.names, {})


def _first(x: list[int], *_) -> list[int]:
    return x


def _windows(x: list[int], kernel: list[int], stride=None, padding=(0, 0), dilation=(1, 1)) -> list[int]:
    rows = zip(x[2:], kernel, stride or kernel, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in rows]


# Shape of the result, from the operation's arguments with shapes in place of tensors; where there is none, that of the first.
_SHAPES: dict = {
    aten.conv2d.default: lambda x, w, b, *rest: [x[0], w[0], *_windows(x, w[2:], *rest[:3])],
    aten.linear.default: lambda x, w, b: [*x[:-1], w[0]],
    aten.max_pool2d.default: lambda x, *sizes: [*x[:2], *_windows(x, *sizes)],
    aten.adaptive_avg_pool2d.default: lambda x, size: [*x[:2], *size],
    aten.flatten.using_ints: lambda x, first: [*x[:first], math.prod(x[first:])],
    aten.pad.default: lambda x, pads: [x[0], x[1] + pads[4] + pads[5], *x[2:]],
    aten.slice.Tensor: lambda x, d, *ends: [*x[:d], len(range(*slice(*ends).indices(x[d]))), *x[d + 1 :]],
}


class _Made:
    """The graph of aten's operations as it is made."""

    def __init__(self, module: nn.Module):
        self.module, self.graph, self.names = module, fx.Graph(), {}
        self.of: dict[fx.Node, fx.Node] = {}
        self.tensors: dict[str, fx.Node] = {}

    def put(self, node: fx.Node, made: fx.Node, value: Tensor) -> None:
        made.meta = {"val": value, "nn_module_stack": node.meta.get("nn_module_stack", {})}
        self.of[node] = made

    def call(self, node: fx.Node, target, *args) -> None:
        """`node` is, from now on, this operation."""
        shapes = [list(a.meta["val"].shape) if isinstance(a, fx.Node) else a for a in args]
        # The operation itself on the meta device imports what torch.export does.
        self.put(node, self.graph.call_function(target, args), torch.empty(_SHAPES.get(target, _first)(*shapes), device="meta"))

    def tensor(self, name: str) -> fx.Node | None:
        """The placeholder of a parameter or buffer of the module; None if it is none."""
        if name not in self.tensors:
            path, _, own = name.rpartition(".")
            tensor = getattr(self.module.get_submodule(path), own)
            if tensor is None:
                return None
            self.tensors[name] = made = self.graph.placeholder(name.replace(".", "_"))
            made.meta["val"] = torch.empty_like(tensor, device="meta")
            self.names[made.name] = name
        return self.tensors[name]

    def add(self, node: fx.Node) -> None:
        x, *others = (self.of[a] if isinstance(a, fx.Node) else a for a in node.args)
        if node.op == "call_module":
            self.call_module(node, x)
        elif node.target in (F.relu, F.relu6):
            plain = node.target.__name__ + "_" * node.kwargs.get("inplace", False)
            self.call(node, getattr(aten, plain).default, x)
        elif node.target is F.max_pool2d:
            sizes = [*others, *(node.kwargs[name] for name in ("stride", "padding")[len(others) - 1 :] if node.kwargs.get(name))]
            self.call(node, aten.max_pool2d.default, x, *([size, size] for size in sizes))
        elif node.target is F.adaptive_avg_pool2d:
            self.call(node, aten.adaptive_avg_pool2d.default, x, [*others, *others])
        elif node.target is operator.getitem:
            for dim, part in enumerate(others[0]):
                if part != slice(None):
                    self.call(node, aten.slice.Tensor, x, dim, part.start or 0, part.stop or 2**63 - 1, part.step or 1)
                    x = self.of[node]
        else:
            target = {operator.add: aten.add.Tensor, F.pad: aten.pad.default, "flatten": aten.flatten.using_ints}[node.target]
            self.call(node, target, x, *(list(a) if isinstance(a, tuple) else a for a in others))

    def call_module(self, node: fx.Node, x: fx.Node) -> None:
        module, path = self.module.get_submodule(node.target), node.target
        weight, bias = (self.tensor(f"{path}.{name}") if hasattr(module, name) else None for name in ("weight", "bias"))
        if isinstance(module, nn.Conv2d):
            sizes = [list(size) for size in (module.stride, module.padding, module.dilation)]
            self.call(node, aten.conv2d.default, x, weight, bias, *sizes, module.groups)
        elif isinstance(module, nn.Linear):
            self.call(node, aten.linear.default, x, weight, bias)
        elif isinstance(module, nn.ReLU):
            self.call(node, aten.relu.default, x)
        else:
            mean, variance = self.tensor(f"{path}.running_mean"), self.tensor(f"{path}.running_var")
            self.call(node, aten.batch_norm.default, x, weight, bias, mean, variance, False, module.momentum, module.eps, False)
