"""How the channels of any network connect, read from its traced graph.

Every channel that a convolution or Linear writes gets a number. A tensor's `labels` are these numbers, one for each element, held
with size 1 along dimensions in which they do not change. Moving data moves labels; adding channels unites theirs: they stay or go
together. What is united is a class, and a class that stays whole has a reason. Where streams are free, a sum of feature maps unites
nothing: each of its channels gets a label of its own, which is there if any of what is added is.
"""

import math
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import InputError
from dnal_dist.nets.classes import Classes
from dnal_dist.nets.tracing import Traced, Tracer, exported


class Gated(NamedTuple):
    """What of a network has gates."""

    streams_are_free: bool = False
    """Whether each of the layers that a sum adds up has gates of its own; else they share them."""
    ignore: tuple[str, ...] = ()
    """Modules whose outputs have none."""
    only: tuple[str, ...] | None = None
    """Modules whose outputs alone have gates; None: all that may close."""

    def has(self, path: str) -> bool:
        """Whether what the module at `path` writes may close."""
        return not _is_in(path, self.ignore) and (self.only is None or _is_in(path, self.only))


def _is_in(path: str, modules: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in modules)


class Value(NamedTuple):
    """What is known of a tensor."""

    labels: Tensor
    shape: tuple[int, ...]
    gates: frozenset[str] | None
    """Module paths whose gates together make closed channels zero here; None: a closed channel is not zero."""

    @property
    def full(self) -> Tensor:
        return self.labels.expand(self.shape)

    def along(self, dim: int) -> Tensor | None:
        """The labels along one dimension, (size,); None if they change along another one too."""
        dim %= len(self.shape)
        if any(size > 1 for d, size in enumerate(self.labels.shape) if d != dim):
            return None
        return self.labels.flatten().expand(self.shape[dim])


class Weighted(NamedTuple):
    """A Conv2d or Linear of the network."""

    path: str
    inputs: Tensor
    """Labels of what it reads, (channels or features,)."""
    outputs: Tensor
    """Labels of what it writes."""
    groups: int
    whole_groups: bool
    """Whether groups close as a whole; else each group loses the same channels."""
    positions: int
    """Output positions of one image, height x width, over all calls."""
    baked: bool
    """Its weight is computed from parameters (weight standardisation, for example); a compact network has it as a plain one."""


Rule = Callable[["Graph", torch.fx.Node], "Value | list[Value]"]


class Graph:
    """The channels of `module` as an image goes through it; what `read` returns."""

    def __init__(self, traced: Traced, module: nn.Module, rules: dict[str, "Rule"], gated: "Gated"):
        self.rules, self.nodes, self.gated = rules, traced.nodes, gated
        self.kinds = {path: type(m) for path, m in module.named_modules()}
        # What has several names goes by its first.
        self.paths = _first_names(module.named_modules(remove_duplicate=False))
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        firsts = _first_names(tensors)
        self.names = {node: firsts.get(name, name) for node, name in traced.names.items()}
        self.constants = traced.constants
        self.reached = {self.names[node.name] for node in self.nodes if node.users and node.name in self.names}
        """Parameters and buffers that images reach."""
        self.classes = Classes()
        self.depths: dict = {}
        """Layers that each node has behind it, one after the other."""
        self.values: dict = {}
        self.tensors: dict[str, dict[int, Tensor]] = {}
        """Parameters and buffers that are cut with the channels: name -> dimension -> labels along it."""
        self.layers: dict[str, Weighted] = {}
        self.points: dict[str, Tensor] = {}
        """Module path -> labels of its output channels, of each module that gates can be put on."""
        self.needed: set[str] = set()
        """Those of `points` whose gates are needed."""
        self.parts: dict[tuple[int, ...], None] = {}
        """Groups of labels of which one must stay."""
        self.free_sums: dict = {}
        """Nodes that are sums with labels of their own, each with its group of labels."""
        self.baked: set[str] = set()
        """Parameters and buffers that weights are computed from."""
        self.norms: dict[str, str] = {}
        """The BatchNorm behind a layer, by paths."""
        self.called = {path for node in self.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
        for node in self.nodes:
            self._visit(node)

    def __deepcopy__(self, _) -> "Graph":
        return self  # nothing in it changes, and it holds no weights

    def positions(self) -> dict[str, int]:
        """At how many places each layer computes for one image."""
        return {layer.path: layer.positions for layer in self.layers.values()}

    def tensor_of(self, node) -> str | None:
        """The name of the parameter, buffer or constant that `node` stands for."""
        return self.names.get(node.name) if isinstance(node, torch.fx.Node) and node.op == "placeholder" else None

    def value(self, argument) -> Value | None:
        """What is known of an argument; of a parameter, if it is used as a tensor among others, from now on."""
        if not isinstance(argument, torch.fx.Node):
            return None
        if argument not in self.values and not self._label(argument):
            return None
        return self.values[argument]

    def _label(self, node) -> bool:
        shape = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else None
        if node.op == "placeholder" and shape is not None:
            name = self.tensor_of(node)
            vary = [d for d, size in enumerate(shape) if size > 1]
            labels = self.classes.new(math.prod(shape)).view(shape) if vary else torch.zeros(shape, dtype=torch.long)
            self.values[node] = Value(labels, shape, None)
            for d in vary:
                self.tensors.setdefault(name, {})[d] = labels.movedim(d, 0).reshape(shape[d], -1)
        elif node.op == "call_function":
            for argument in node.all_input_nodes:
                self.value(argument)
            self._apply(node)
        return node in self.values

    def _visit(self, node) -> None:
        before = max((self.depths[a] for a in node.all_input_nodes), default=0)
        self.depths[node] = before + (name_of(node) in ("conv2d", "linear"))
        if node.op == "output":
            for argument in node.all_input_nodes:
                if (value := self.value(argument)) is not None and isinstance(value, Value):
                    self.classes.freeze(value.labels, "it is the network's output")
                    self.outputs = value
        elif node.op == "placeholder" and self.tensor_of(node) is None:
            if isinstance(found := node.meta.get("val"), Tensor):
                self.values[node] = Value(torch.zeros((1,) * found.dim(), dtype=torch.long), tuple(found.shape), None)
        elif isinstance(node.meta.get("val"), Tensor | list | tuple) and any(a in self.values for a in node.all_input_nodes):
            self._apply(node)

    def _apply(self, node) -> None:
        found = self.rules.get(name_of(node).removesuffix("_"), _without_rule)(self, node)
        self.values[node] = found
        if name_of(node).endswith("_") and isinstance(found, Value):
            self.values[node.args[0]] = found  # in place
        for value in found if isinstance(found, list | tuple) and not isinstance(found, Value) else [found]:
            self.parts[tuple(value.labels.unique().tolist())] = None

    def out(self, node, labels: Tensor, gates: Iterable[str] | None) -> Value:
        shape = tuple(node.meta["val"].shape)
        return Value(squeezed(labels), shape, None if gates is None else frozenset(gates))

    def read(self, labels: Tensor, value: Value, reason: str) -> None:
        """A layer that mixes channels reads `value`: closed ones must be zero."""
        if value.gates is None:
            self.classes.freeze(labels, reason)
        else:
            self.needed |= value.gates

    def unknown(self, node, why: str) -> Value | list[Value]:
        """Whatever `node` reads stays whole, and what it gives is always there."""
        for argument in node.all_input_nodes:
            value = self.values.get(argument)
            for one in [value] if isinstance(value, Value) else value or []:
                self.classes.freeze(one.labels, why)
        found = node.meta["val"]
        rows = [
            Value(torch.zeros((1,) * t.dim(), dtype=torch.long), tuple(t.shape), None)
            for t in (found if isinstance(found, list | tuple) else [found])
            if isinstance(t, Tensor)
        ]
        return rows if isinstance(found, list | tuple) else rows[0]

    def bake(self, weight) -> None:
        """The node `weight` computes the weight of a layer."""
        queue = [weight]
        while queue:
            queue.extend((node := queue.pop()).all_input_nodes)
            self.baked |= {self.names[node.name]} if node.name in self.names else set()

    def where(self, node) -> str:
        """The module that `node` belongs to."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return self.paths.get(stack[-1][0], stack[-1][0]) if stack else ""

    def hold(self, name: str, dims: dict[int, Tensor]) -> None:
        """The parameter or buffer `name` is cut by these labels along its dimensions, wherever it is used."""
        before = self.tensors.setdefault(name, dims)
        for dim in before.keys() & dims.keys() if before is not dims else ():
            self.classes.unite(before[dim], dims[dim])


def name_of(node) -> str:
    """The operation of a node without namespace and overload: `add_` of aten.add_.Tensor."""
    return node.target._opname if hasattr(node.target, "_opname") else getattr(node.target, "__name__", str(node.target))


def _without_rule(graph: Graph, node) -> Value | list[Value]:
    return graph.unknown(node, f"no rule is known for {name_of(node)} in {graph.where(node) or 'the network'}")


def _first_names(named: Iterable[tuple[str, object]]) -> dict[str, str]:
    found: dict[int, str] = {}
    return {name: found.setdefault(id(one), name) for name, one in named}


def squeezed(labels: Tensor) -> Tensor:
    """The labels with size 1 along dimensions in which they do not change."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if stride == 0 or bool((labels == first).all()):
                labels = first
    return labels.contiguous()


def read(module: nn.Module, example: Tensor, rules: dict[str, Rule], gated: Gated, trace: Tracer = exported) -> Graph:
    """The graph of `module`, in eval mode, for images like `example` (n, 3, H, W). rules: one for each operation.

    Raises InputError with the operation and the line of the module's code that cannot be read.
    """
    training = {m: m.training for m in module.modules()}
    try:
        return Graph(trace(module.eval(), example), module, rules, gated)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be read: {_first_line(error)}{_their_line(error)}") from None
    finally:
        for m, was in training.items():
            m.training = was


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _their_line(error: Exception) -> str:
    """The innermost line of code outside torch that an error passed through."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "dnal_dist" not in f.filename]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
