"""How the channels of any network connect, read from its exported graph.

Every channel that a convolution or Linear writes gets a number. A tensor's `labels` are these numbers, one for each element, held
with size 1 along dimensions in which they do not change. Moving data moves labels; adding channels unites theirs: they stay or go
together. What is united is a class, and a class that stays whole has a reason.
"""

import math
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.common.errors import InputError

OPEN = 0
"""The label of what is always there."""


class Classes:
    """Disjoint sets of labels, with the reason why a set stays whole."""

    def __init__(self):
        self.parents = [OPEN]
        self.reasons = {OPEN: "it meets what has no channels to close"}

    def new(self, number: int) -> Tensor:
        first = len(self.parents)
        self.parents.extend(range(first, first + number))
        return torch.arange(first, first + number)

    def find(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = label = self.parents[self.parents[label]]
        return label

    def unite(self, some: Tensor, others: Tensor) -> None:
        """Unite element by element; the shapes broadcast."""
        pairs = torch.stack([t.flatten() for t in torch.broadcast_tensors(some, others)], 1)
        for a, b in torch.unique(pairs, dim=0).tolist():
            a, b = sorted((self.find(a), self.find(b)))
            if a != b:
                self.parents[b] = a
                if b in self.reasons:
                    self.reasons.setdefault(a, self.reasons.pop(b))

    def freeze(self, labels: Tensor, reason: str) -> None:
        for label in labels.unique().tolist():
            self.reasons.setdefault(self.find(label), reason)

    def reason(self, label: int) -> str | None:
        return self.reasons.get(self.find(label))


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

    def __init__(self, program: torch.export.ExportedProgram, module: nn.Module, rules: dict[str, "Rule"]):
        self.rules, self.nodes = rules, list(program.graph.nodes)
        self.kinds = {path: type(m) for path, m in module.named_modules()}
        # What has several names goes by its first.
        self.paths = _first_names(module.named_modules(remove_duplicate=False))
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        firsts = _first_names(tensors)
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names |= dict(signature.inputs_to_lifted_tensor_constants)
        self.names = {node: firsts.get(name, name) for node, name in self.names.items()}
        self.constants = dict(program.constants)
        self.reached = {self.names[node.name] for node in self.nodes if node.users and node.name in self.names}
        """Parameters and buffers that images reach."""
        self.classes = Classes()
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
        self.norms: dict[str, str] = {}
        """The BatchNorm behind a layer, by paths."""
        self.called = {path for node in self.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
        for node in self.nodes:
            self._visit(node)

    def __deepcopy__(self, _) -> "Graph":
        return self  # nothing in it changes, and it holds no weights

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

    def where(self, node) -> str:
        """The module that `node` belongs to."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return self.paths.get(stack[-1][0], stack[-1][0]) if stack else ""

    def hold(self, name: str, dims: dict[int, Tensor]) -> None:
        """The parameter or buffer `name` is cut by these labels along its dimensions, wherever it is used."""
        before = self.tensors.setdefault(name, dims)
        for dim in before.keys() & dims.keys():
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


def read(module: nn.Module, example: Tensor, rules: dict[str, Rule]) -> Graph:
    """The graph of `module`, in eval mode, for images like `example` (n, 3, H, W). rules: one for each operation.

    Raises InputError with the operation and the line of the module's code that cannot be read.
    """
    training = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (example,), strict=False)
        _inline(program)
        return Graph(program, module, rules)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be read: {_first_line(error)}{_their_line(error)}") from None
    finally:
        for m, was in training.items():
            m.training = was


def _inline(program: torch.export.ExportedProgram) -> None:
    """Put the operations within `with torch.autocast(...)` blocks and the like among the others."""
    for node in list(program.graph.nodes):
        parts = [a for a in node.all_input_nodes if a.op == "get_attr"] if node.op == "call_function" else []
        if len(parts) != 1 or not isinstance(inner := program.graph_module.get_submodule(parts[0].target), torch.fx.GraphModule):
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _their_line(error: Exception) -> str:
    """The innermost line of code outside torch that an error passed through."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "dnal_dist" not in f.filename]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
