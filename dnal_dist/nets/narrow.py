"""A network of fewer channels from a graph: the same operations, narrower layers, sizes that fit. It needs nothing of the module
that the graph was read from."""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnal_dist.nets.graph import Graph, Value, name_of
from dnal_dist.nets.rules import RULES, argument_of


class Step(NamedTuple):
    """One operation of a Narrow network."""

    out: str
    """Name of the result."""
    kind: str
    """"module" (its path), "op" (its name in torch.ops.aten), "item" or "tensor" (its name)."""
    target: str
    args: list
    kwargs: dict


class Ref(NamedTuple):
    """The result of another step, as an argument."""

    name: str


OF_IMAGES = "images' device"


def operation(name: str) -> Callable:
    """The operation of aten called `name`, with its overload. Raises ValueError if no rule names it."""
    plain, _, overload = name.partition(".")
    if plain.removesuffix("_") not in RULES and plain not in ALSO:
        raise ValueError(f"no operation of a network is called {name!r}")
    return getattr(getattr(torch.ops.aten, plain), overload or "default")


# What a network may do beside what there are rules for: channels stay whole there.
ALSO = {
    *("layer_norm", "group_norm", "instance_norm", "matmul", "bmm", "addmm", "conv1d", "conv3d", "conv_transpose2d", "einsum"),
    *(
        "scaled_dot_product_attention",
        "cumsum",
        "roll",
        "where",
        "gt",
        "lt",
        "ge",
        "le",
        "eq",
        "ne",
        "pow",
        "norm",
        "argmax",
        "topk",
    ),
    *(
        "index_select",
        "gather",
        "max",
        "min",
        "logsumexp",
        "log_softmax",
        "lerp",
        "addcmul",
        "baddbmm",
        "im2col",
        "col2im",
        "outer",
    ),
    *(
        "bitwise_not",
        "logical_not",
        "floor",
        "ceil",
        "round",
        "std",
        "var",
        "unfold",
        "glu",
        "linalg_vector_norm",
        "norm.ScalarOpt_dim",
    ),
}


class Narrow(nn.Module):
    """A network that runs `steps` one after the other on images (n, 3, H, W), and returns what the last one gives.

    layers: modules by path, which keep the names of the network that it was made from.
    """

    def __init__(self, steps: list[Step], layers: dict[str, nn.Module], tensors: dict[str, Tensor | nn.Parameter]):
        super().__init__()
        self.steps = steps
        for path, layer in layers.items():
            _holder(self, path).register_module(path.rpartition(".")[2], layer)
        for name, tensor in tensors.items():
            register = "register_parameter" if isinstance(tensor, nn.Parameter) else "register_buffer"
            getattr(_holder(self, name), register)(name.rpartition(".")[2], tensor)
        last: dict[str, int] = {}
        for i, step in enumerate(steps):
            for name in _names([step.args, step.kwargs]):
                last[name] = i
        self.ends = [[name for name, at in last.items() if at == i] for i in range(len(steps))]
        self.edges = [0, len(steps)]
        self.calls = [operation(step.target) if step.kind == "op" else None for step in steps]

    def forward(self, images: Tensor) -> Tensor:
        found: dict = {"images": images}
        for first, last in itertools.pairwise(self.edges):
            found = self.within(first, last, found, images.device)
        return found[self.steps[-1].out]

    def within(self, first: int, last: int, found: dict, device: torch.device) -> dict:
        """The results of steps `first` to `last` that later ones read, from those of the steps before."""
        found = dict(found)
        for step, call, ends in list(zip(self.steps, self.calls, self.ends, strict=True))[first:last]:
            if step.kind == "tensor":
                result = functools.reduce(getattr, step.target.split("."), self)
            elif step.kind == "module":
                result = functools.reduce(getattr, step.target.split("."), self)(found[step.args[0].name])
            elif step.kind == "item":
                result = found[step.args[0].name][step.args[1]]
            else:
                result = call(*_filled(step.args, found, device), **_filled(step.kwargs, found, device))
            found[step.out] = result
            for name in ends:
                del found[name]
        return found

    def divide(self, every: int) -> None:
        """Run about `every` steps at a time by `within`, which a caller may wrap."""
        self.edges = [*range(0, len(self.steps), every), len(self.steps)]

    def leaves(self) -> list[nn.Module]:
        """The modules that steps call, in their order."""
        return [self.get_submodule(path) for path in dict.fromkeys(step.target for step in self.steps if step.kind == "module")]


def _holder(root: nn.Module, path: str) -> nn.Module:
    """The module that holds what is called `path`, made where it is not there."""
    for name in path.split(".")[:-1]:
        if name not in root._modules:
            root.register_module(name, nn.Module())
        root = root._modules[name]
    return root


def _filled(argument, found: dict, device: torch.device):
    if isinstance(argument, Ref):
        return found[argument.name]
    if isinstance(argument, list):
        return [_filled(a, found, device) for a in argument]
    if isinstance(argument, dict):
        return {k: _filled(a, found, device) for k, a in argument.items()}
    return device if argument is OF_IMAGES else argument


def _names(argument) -> set[str]:
    if isinstance(argument, Ref):
        return {argument.name}
    if isinstance(argument, list | dict):
        return set().union(*map(_names, argument.values() if isinstance(argument, dict) else argument))
    return set()


class Narrowing:
    """From a graph, its module's tensors and the labels that stay to a Narrow network."""

    def __init__(self, graph: Graph, module: nn.Module, stays: Tensor):
        """stays: bool (labels,)."""
        self.graph, self.module, self.stays = graph, module, stays
        self.named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
        self.named |= graph.constants
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict = {}
        self.images = next(n for n in graph.nodes if n.op == "placeholder" and graph.tensor_of(n) is None)

    def build(self) -> Narrow:
        (output,) = [node for node in self.graph.nodes if node.op == "output"]
        final = output.all_input_nodes[0]
        wanted, queue = set(), [final]
        while queue:
            node = queue.pop()
            if node not in wanted:
                wanted.add(node)
                queue.extend([node.args[0]] if self._kind(node) in MODULES else node.all_input_nodes)
        for node in self.graph.nodes:
            if node in wanted and node is not self.images:
                self._add(node)
        return Narrow(self.steps, self.layers, self.tensors)

    def _kind(self, node) -> str:
        """The operation, if a module of the compact network does it."""
        name = name_of(node) if node.op == "call_function" else ""
        own = name in MODULES and isinstance(node.args[0], torch.fx.Node)
        return name if own and (name == "dropout" or self.graph.where(node) in (self.graph.layers | self.graph.points)) else ""

    def _add(self, node) -> None:
        kind = self._kind(node)
        if node.op == "placeholder":
            name = self.graph.tensor_of(node)
            tensor = self.cut(name)
            self.tensors[name] = nn.Parameter(tensor) if isinstance(self.named[name], nn.Parameter) else tensor
            self.steps.append(Step(node.name, "tensor", name, [], {}))
        elif kind:
            path = self.graph.where(node) if kind != "dropout" else node.name
            if path not in self.layers:
                self.layers[path] = MODULES[kind](self, node, path)
            self.steps.append(Step(node.name, "module", path, [self._ref(node.args[0])], {}))
        elif node.target is operator.getitem:
            self.steps.append(Step(node.name, "item", "", [self._ref(node.args[0]), node.args[1]], {}))
        else:
            target, args = self._sized(node)
            plain, _, overload = target.partition(".")
            # Out of place, so that activations can be computed again.
            step = Step(
                node.name, "op", f"{plain.removesuffix('_')}.{overload}", self._refs(list(args)), self._refs(dict(node.kwargs))
            )
            self.steps.append(step)
        if name_of(node).endswith("_") and not kind and node.op == "call_function":
            self.aliases[node.args[0]] = node

    def _ref(self, node) -> Ref:
        while node in self.aliases and self.aliases[node] is not node:
            node = self.aliases[node]
        return Ref("images" if node is self.images else node.name)

    def _refs(self, argument):
        if isinstance(argument, torch.fx.Node):
            return self._ref(argument)
        if isinstance(argument, list | tuple):
            return [self._refs(a) for a in argument]
        if isinstance(argument, dict):
            return {k: OF_IMAGES if isinstance(a, torch.device) else self._refs(a) for k, a in argument.items()}
        return argument

    def cut(self, name: str, dims: dict[int, Tensor] | None = None) -> Tensor:
        """The channels of a tensor that stay."""
        tensor = self.named[name].detach()
        for dim, labels in (self.graph.tensors.get(name, {}) if dims is None else dims).items():
            tensor = tensor.index_select(dim, self.kept(labels).nonzero().flatten().to(tensor.device))
        return tensor.clone()

    def kept(self, labels: Tensor) -> Tensor:
        """bool (size,) of labels along one dimension, (size,) or (size, others)."""
        stays = self.stays[labels]
        return stays if stays.dim() == 1 else stays.any(1)

    def sizes(self, value: Value) -> list[int]:
        """The size of each dimension that is left."""
        found = []
        for d, size in enumerate(value.shape):
            found.append(size if value.labels.shape[d] == 1 else int(self.along(value, d).sum()))
        return found

    def along(self, value: Value, dim: int) -> Tensor:
        labels = value.labels.movedim(dim, 0).flatten(1).expand(value.shape[dim], -1)
        return self.stays[labels].any(1)

    def _sized(self, node) -> tuple[str, list]:
        """The operation with sizes that fit the channels that stay."""
        name, args = str(node.target).removeprefix("aten."), list(node.args)
        own, value = (
            self.graph.values.get(node),
            self.graph.values.get(args[0]) if args and isinstance(args[0], torch.fx.Node) else None,
        )
        plain = name_of(node)
        dim = argument_of(node, "dim", 0)
        if plain in ("view", "_unsafe_view", "reshape"):
            sizes = self.sizes(own)
            return "reshape.default", [args[0], [-1 if self._of_images(node) else sizes[0], *sizes[1:]]]
        if plain == "unflatten":
            first = args[1] % len(value.shape)
            return name, [args[0], args[1], self.sizes(own)[first : first + len(args[2])]]
        if plain == "expand":
            sizes = self.sizes(own)
            same = len(value.shape) == len(sizes) and self._of_images(node)
            return name, [args[0], [-1 if same and d == 0 else size for d, size in enumerate(sizes)]]
        if plain in ("split", "chunk", "split_with_sizes"):
            return "split_with_sizes.default", [args[0], [self.sizes(one)[dim] for one in own], dim]
        if plain == "select":
            return name, [args[0], dim, int(self.along(value, dim)[: args[2] % value.shape[dim]].sum())]
        if plain in ("slice", "narrow") and value.labels.shape[dim] > 1:
            return self._slice(node, value, dim)
        if plain in ("pad", "constant_pad_nd"):
            return name, [args[0], self._pads(args[1], own), *args[2:]]
        return name, args

    def _slice(self, node, value: Value, dim: int) -> tuple[str, list]:
        kept = self.along(value, dim)
        chosen = torch.arange(len(kept))
        if name_of(node) == "narrow":
            chosen = chosen[node.args[2] : node.args[2] + node.args[3]]
        else:
            chosen = chosen[slice(argument_of(node, "start"), argument_of(node, "end"), argument_of(node, "step", 1))]
        places = (kept.cumsum(0) - 1)[chosen[kept[chosen]]].tolist()
        if places == list(range(places[0], places[-1] + 1)):
            return "slice.Tensor", [node.args[0], dim, places[0], places[-1] + 1]
        raise ValueError(f"{self.graph.where(node)} takes every few channels, which is not handled")

    def _pads(self, pads: list[int], own: Value) -> list[int]:
        found = list(pads)
        for i in range(0, len(pads), 2):
            d = len(own.shape) - 1 - i // 2
            if own.labels.shape[d] > 1:
                kept = self.along(own, d)
                found[i], found[i + 1] = int(kept[: pads[i]].sum()), int(kept[len(kept) - pads[i + 1] :].sum())
        return found

    def _of_images(self, node) -> bool:
        """Whether the first dimension is the images': a tensor made of parameters alone has none."""
        if node not in self._depends:
            self._depends[node] = node is self.images or any(self._of_images(n) for n in node.all_input_nodes)
        return self._depends[node]

    @functools.cached_property
    def _depends(self) -> dict:
        return {}


def _conv(narrowing: Narrowing, node, path: str) -> nn.Conv2d:
    graph, layer = narrowing.graph, narrowing.graph.layers[path]
    weight_name, bias_name = graph.tensor_of(node.args[1]), graph.tensor_of(argument_of(node, "bias"))
    if layer.baked:
        per_group = len(layer.inputs) // layer.groups
        cuts = {0: layer.outputs} if layer.groups > 1 and layer.whole_groups else {0: layer.outputs, 1: layer.inputs[:per_group]}
        weight, bias = _computed(narrowing.module.get_submodule(path))
        narrowing.named[f"{path}.weight"] = weight
        weight = narrowing.cut(f"{path}.weight", cuts)
        bias = None if bias is None else bias.detach()[narrowing.kept(layer.outputs)]
    else:
        weight, bias = narrowing.cut(weight_name), narrowing.cut(bias_name) if bias_name else None
    groups = layer.groups
    if layer.groups > 1 and layer.whole_groups:
        groups = weight.shape[0] // (len(layer.outputs) // layer.groups)
    settings = {key: argument_of(node, key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), **settings, groups=groups, bias=bias is not None
    )
    return _with(conv, weight=weight, bias=bias)


def _computed(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that a convolution computes from its parameters."""
    found = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("conv2d", "_conv_forward"):
                found.append((args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")))
            return function(*args, **(kwargs or {}))

    size = max(k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)) + 1
    with torch.no_grad(), Seen():
        module(torch.zeros(1, module.in_channels, size, size).to(module.weight))
    return found[-1]


def _linear(narrowing: Narrowing, node, path: str) -> nn.Linear:
    graph = narrowing.graph
    weight, bias_name = narrowing.cut(graph.tensor_of(node.args[1])), graph.tensor_of(argument_of(node, "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias_name is not None)
    return _with(linear, weight=weight, bias=narrowing.cut(bias_name) if bias_name else None)


def _batch_norm(narrowing: Narrowing, node, path: str) -> nn.Module:
    graph = narrowing.graph
    names = [graph.tensor_of(argument) for argument in node.args[1:5]]
    weight, bias, mean, var = (None if name is None else narrowing.cut(name) for name in names)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(node.meta["val"].shape)]
    norm = kind(len(mean), eps=node.args[7], momentum=node.args[6], affine=weight is not None)
    return _with(norm, weight=weight, bias=bias, running_mean=mean, running_var=var)


def _dropout(narrowing: Narrowing, node, path: str) -> nn.Dropout:
    return nn.Dropout(node.args[1])


def _with(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(module, name, nn.Parameter(tensor) if name in module._parameters else tensor)
    return module


MODULES = {"conv2d": _conv, "linear": _linear, "batch_norm": _batch_norm, "dropout": _dropout}


def described(network: Narrow, module: Callable[[nn.Module], list]) -> list:
    """[steps, modules, tensors] as JSON; module: the description of one module."""
    steps = [[step.out, step.kind, step.target, _encoded(step.args), _encoded(step.kwargs)] for step in network.steps]
    layers = {step.target: network.get_submodule(step.target) for step in network.steps if step.kind == "module"}
    names = {step.target for step in network.steps if step.kind == "tensor"}
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {
        name: [list(own[name].shape), str(own[name].dtype).removeprefix("torch."), own[name].requires_grad] for name in names
    }
    return [steps, {path: module(layer) for path, layer in layers.items()}, dict(sorted(tensors.items()))]


def made(description: list, module: Callable[[list], nn.Module]) -> Narrow:
    """The network that `described` described. Raises ValueError, or whatever comes of another thing in its place."""
    steps, layers, tensors = description
    found = {}
    for name, (shape, dtype, parameter) in tensors.items():
        tensor = torch.zeros(shape, dtype=_dtype(dtype))
        found[name] = nn.Parameter(tensor) if parameter else tensor
    steps = [Step(out, kind, target, _decoded(args), _decoded(kwargs)) for out, kind, target, args, kwargs in steps]
    return Narrow(steps, {path: module(item) for path, item in layers.items()}, found)


def _dtype(name: str) -> torch.dtype:
    if not isinstance(found := getattr(torch, name, None), torch.dtype):
        raise ValueError(f"no type of numbers is called {name!r}")
    return found


# What is no JSON among the arguments of operations, by a key of its own.
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.strided)}


def _encoded(argument):
    if isinstance(argument, Ref):
        return {"ref": argument.name}
    if argument is OF_IMAGES:
        return {"device": True}
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.memory_format | torch.layout):
        return {"format": str(argument)}
    if isinstance(argument, list | tuple):
        return [_encoded(a) for a in argument]
    if isinstance(argument, dict):
        return {"map": {k: _encoded(a) for k, a in argument.items()}}
    return argument


def _decoded(argument):
    if isinstance(argument, list):
        return [_decoded(a) for a in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "map":
        return {k: _decoded(a) for k, a in value.items()}
    return {"ref": Ref, "dtype": _dtype, "format": _FORMATS.__getitem__, "device": lambda _: OF_IMAGES}[kind](value)
