"""From a graph and the channels that stay to a network of fewer channels."""

import functools
import itertools
import operator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnal_dist.nets.branches import Nodes
from dnal_dist.nets.graph import Graph, Value, name_of
from dnal_dist.nets.layer_rules import argument_of
from dnal_dist.nets.narrow import OF_IMAGES, Narrow, Ref, Step, operation


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
        self.written: set = set()
        self.constant: dict[torch.fx.Node, Tensor] = {}
        """What nodes give of which closed channels have left one number a channel, (1, channels, ...)."""

    def build(self) -> Narrow:
        self._find_constants()
        (output,) = [node for node in self.graph.nodes if node.op == "output"]
        final = output.all_input_nodes[0]
        wanted, queue = set(), [final]
        while queue:
            node = queue.pop()
            if node not in wanted and node not in self.constant:
                wanted.add(node)
                queue.extend([node.args[0]] if self._kind(node) in MODULES else node.all_input_nodes)
        for node in self.graph.nodes:
            if node in wanted and node is not self.images:
                self._add(node)
        return Narrow(self.steps, self.layers, self.tensors, self.images.meta["val"].shape[-1])

    @torch.no_grad()
    def _find_constants(self) -> None:
        nodes = Nodes(self.graph)
        if bool(self.stays.all()):
            return
        for node in nodes.reads:
            if nodes.is_constant(self.graph, node, self.constant, lambda labels: not bool(self.stays[labels].any())):
                self.constant[node] = self._evaluated(node, nodes)
                if name_of(node).endswith("_") and node.op == "call_function":
                    self.aliases[node.args[0]] = node

    def _evaluated(self, node, nodes: Nodes) -> Tensor:
        """What a node gives of constants, with one position for all."""
        value, kind, path = self.graph.values[node], self._kind(node), self.graph.where(node)
        like = next(t for t in self.named.values() if t.is_floating_point())
        sizes = self.sizes(value)
        zeros = like.new_zeros([1, sizes[1], 1, 1] if len(sizes) == 4 else [1, *sizes[1:]])
        if not zeros.numel():
            return zeros
        if name_of(node) in ("conv2d", "linear") and not bool(self.stays[self.graph.value(node.args[0]).labels].any()):
            bias = self.graph.tensor_of(argument_of(node, "bias"))
            return zeros if bias is None else zeros + self.cut(bias).view(zeros.shape)
        read = [a for a in node.all_input_nodes if a in nodes.reads]
        operands = {a: self.constant[now] for a, now in zip(read, nodes.reads[node], strict=True)}
        if kind:
            return MODULES[kind](self, node, path).to(like).eval()(operands[node.args[0]])
        target, args = self._sized(node)
        plain, _, overload = target.partition(".")
        found = {a: operands[a] if a in operands else self.cut(self.graph.tensor_of(a)) for a in node.all_input_nodes}
        args, kwargs = torch.fx.map_arg((tuple(args), node.kwargs), found.__getitem__)
        return operation(f"{plain.removesuffix('_')}.{overload}")(*args, **kwargs)

    def _kind(self, node) -> str:
        """The operation, if a module of the compact network does it."""
        name = name_of(node).removesuffix("_") if node.op == "call_function" else ""
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
        elif name_of(node) in ("to", "_to_copy") and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
            self.aliases[node] = node.args[0]  # it would fix the type of numbers
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
        if node in self.constant and node not in self.written:
            self.written.add(node)
            first = f"{self.graph.where(node)}.constant".lstrip(".")
            taken = self.tensors.keys() | self.named.keys() | self.graph.kinds.keys()
            name = next(name for i in itertools.count() if (name := f"{first}{i or ''}") not in taken)
            self.tensors[name] = nn.Parameter(self.constant[node])
            self.steps.append(Step(node.name, "tensor", name, [], {}))
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
        return node in self._depends

    @functools.cached_property
    def _depends(self) -> set:
        found = {self.images}
        for node in self.graph.nodes:
            if found & set(node.all_input_nodes):
                found.add(node)
        return found


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
