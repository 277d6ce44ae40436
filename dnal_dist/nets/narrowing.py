"""From a graph and the channels that stay to a network of fewer channels."""

import functools
import itertools
import operator

import torch
from torch import Tensor, nn

from dnal_dist.nets import orders
from dnal_dist.nets.branches import Nodes
from dnal_dist.nets.graph import Graph, Value, name_of
from dnal_dist.nets.layer_rules import argument_of
from dnal_dist.nets.modules import Channels, Place
from dnal_dist.nets.narrow import NUMBER, OF_IMAGES, Narrow, Ref, Step, operation
from dnal_dist.nets.narrow_layers import MODULES
from dnal_dist.nets.rules import MADE
from dnal_dist.nets.sites import Gating


class Narrowing:
    """From a graph, its module's tensors and the gates that stay open to a Narrow network."""

    def __init__(self, graph: Graph, module: nn.Module, gating: Gating, keep: Tensor):
        """keep: bool (N,)."""
        self.graph, self.module, self.stays = graph, module, gating.stays(keep)
        self.nodes = Nodes(graph)
        self.sums = {node: self._operands(node) for node in graph.free_sums}
        """What free sums add up."""
        self.ranks = gating.ranks(self.stays) if orders.may_change(graph, gating) else None
        self.named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
        self.named |= graph.constants
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict = {}
        self.results: dict[torch.fx.Node, Ref] = {}
        """Of free sums."""
        self.images = next(n for n in graph.nodes if n.op == "placeholder" and graph.tensor_of(n) is None)
        self.written: set = set()
        self.constant: dict[torch.fx.Node, Tensor] = {}
        """What nodes give of which closed channels have left one number a channel, (1, channels, ...)."""
        self.constants: dict[str, torch.fx.Node] = {}
        """Those that the network has, by their names."""

    def build(self) -> Narrow:
        self._find_constants()
        (output,) = [node for node in self.graph.nodes if node.op == "output"]
        final = output.all_input_nodes[0]
        wanted, queue = set(), [final]
        while queue:
            node = queue.pop()
            if node not in wanted and node not in self.constant:
                wanted.add(node)
                queue.extend(self.sums.get(node) or (node.args[:1] if self._kind(node) in MODULES else node.all_input_nodes))
        for node in self.graph.nodes:
            if node in wanted and node is not self.images:
                self._add(node)
        return Narrow(self.steps, self.layers, self.tensors, self.images.meta["val"].shape[-1])

    @torch.no_grad()
    def _find_constants(self) -> None:
        nodes = self.nodes
        for node in nodes.reads:
            if nodes.is_constant(self.graph, node, self.constant, lambda labels: not bool(self.stays[labels].any())):
                self.constant[node] = self._evaluated(node)
                if name_of(node).endswith("_") and node.op == "call_function":
                    self.aliases[node.args[0]] = node

    def _evaluated(self, node) -> Tensor:
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
        read = [a for a in node.all_input_nodes if a in self.nodes.reads]
        operands = {a: self.constant[now] for a, now in zip(read, self.nodes.reads[node], strict=True)}
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
        if name not in MODULES or not isinstance(node.args[0], torch.fx.Node):
            return ""
        path = self.graph.where(node)
        return name if name == "dropout" or path in self.graph.layers or path in self.graph.points else ""

    def _add(self, node) -> None:
        kind = self._kind(node)
        if node.op == "placeholder":
            name = self.graph.tensor_of(node)
            tensor = self.cut(name)
            parameter = isinstance(self.named[name], nn.Parameter)
            self.tensors[name] = nn.Parameter(tensor, self.named[name].requires_grad) if parameter else tensor
            self.steps.append(Step(node.name, "tensor", name, [], {}))
        elif node in self.sums:
            self._add_up(node)
        elif kind:
            path = self.graph.where(node) if kind != "dropout" else node.name
            if path not in self.layers:
                self.layers[path] = self._layer(kind, node, path)
            x = self._chosen(node, path) if kind == "conv2d" else self._ref(node.args[0])
            self.steps.append(Step(node.name, "module", path, [x], {}))
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

    def _layer(self, kind: str, node, path: str) -> nn.Module:
        """The module of a layer; what of it does not train still does not."""
        made = MODULES[kind](self, node, path)
        for name, parameter in made.named_parameters():
            # A weight that is computed trains if anything does that it is computed from.
            own = self.module.get_submodule(path).parameters()
            known = isinstance(self.named.get(f"{path}.{name}"), nn.Parameter)
            parameter.requires_grad_(self.named[f"{path}.{name}"].requires_grad if known else any(p.requires_grad for p in own))
        return made

    def _chosen(self, node, path: str) -> Ref:
        """What a convolution reads: of a depthwise one that closes channels of its own, those that stay."""
        layer, x = self.graph.layers[path], self._ref(node.args[0])
        if layer.groups == 1 or not layer.whole_groups or len(layer.inputs) != len(layer.outputs):
            return x
        inputs, outputs = self.kept(layer.inputs), self.kept(layer.outputs)
        if torch.equal(inputs, outputs):
            return x
        name = self._free_name(f"{path}.channels")
        self.layers[name] = Channels((inputs.cumsum(0) - 1)[outputs].tolist())
        self.steps.append(Step(f"{node.name}.channels", "module", name, [x], {}))
        return Ref(f"{node.name}.channels")

    def _operands(self, node) -> list:
        """What a free sum adds up, those that only it reads taken apart."""
        found = []
        for operand in self.nodes.reads[node]:
            inner = operand in self.graph.free_sums and len(self.nodes.users[operand]) == 1
            found.extend(self._operands(operand) if inner else [operand])
        return found

    def _add_up(self, node) -> None:
        """A sum of parts that each have some of its channels."""
        order = self.order(self.graph.values[node].along(1)).tolist()
        at = {channel: i for i, channel in enumerate(order)}
        kept = {operand: self.order(self.graph.values[operand].along(1)).tolist() for operand in self.sums[node]}
        parts = [(operand, [at[channel] for channel in kept[operand]]) for operand in self.sums[node]]
        # Constants last: only the others know height and width.
        parts = sorted((part for part in parts if part[1]), key=lambda part: part[0] in self.constant)
        done: Ref | None = None
        for i, (operand, places) in enumerate(parts):
            out = node.name if i == len(parts) - 1 else f"{node.name}.{i}"
            part = self._ref(operand)
            if places == list(range(len(order))):
                if done is not None:
                    self.steps.append(Step(out, "op", "add.Tensor", [done, part], {}))
                    part = Ref(out)
            else:
                path = self._free_name(f"{self.graph.where(node)}.place".lstrip("."))
                self.layers[path] = Place(places, len(order))
                self.steps.append(Step(out, "module", path, [part] if done is None else [part, done], {}))
                part = Ref(out)
            done = part
        self.results[node] = done

    def _free_name(self, first: str) -> str:
        """A name that nothing has yet."""
        taken = self.tensors.keys() | self.named.keys() | self.graph.kinds.keys() | self.layers.keys()
        return next(name for i in itertools.count() if (name := f"{first}{i or ''}") not in taken)

    def _ref(self, node) -> Ref:
        while node in self.aliases and self.aliases[node] is not node:
            node = self.aliases[node]
        if node in self.constant and node not in self.written:
            self.written.add(node)
            name = self._free_name(f"{self.graph.where(node)}.constant".lstrip("."))
            self.tensors[name], self.constants[name] = nn.Parameter(self.constant[node]), node
            self.steps.append(Step(node.name, "tensor", name, [], {}))
        return self.results.get(node) or Ref("images" if node is self.images else node.name)

    def _refs(self, argument):
        if isinstance(argument, torch.fx.Node):
            return self._ref(argument)
        if isinstance(argument, list | tuple):
            return [self._refs(a) for a in argument]
        if isinstance(argument, dict):
            return {k: OF_IMAGES if isinstance(a, torch.device) else self._refs(a) for k, a in argument.items()}
        return argument

    def cut(self, name: str) -> Tensor:
        """The channels of a parameter or buffer that stay."""
        return self.cut_of(self.named[name], self.graph.tensors.get(name, {}))

    def cut_of(self, tensor: Tensor, dims: dict[int, Tensor]) -> Tensor:
        """The channels of a tensor that stay. dims: the labels along dimensions."""
        tensor = tensor.detach()
        for dim, labels in dims.items():
            tensor = tensor.index_select(dim, self.order(labels).to(tensor.device))
        return tensor.clone()

    def order(self, labels: Tensor) -> Tensor:
        """Where the channels that stay are along a dimension of these labels, in their order in the compact network."""
        kept = self.kept(labels).nonzero().flatten()
        if self.ranks is None or labels.dim() > 1:
            return kept
        return kept[self.ranks[labels[kept]].argsort(stable=True)]

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
            first, *sizes = self.sizes(own)
            same = len(value.shape) == len(own.shape) and self._of_images(node)
            return name, [args[0], [-1 if same else self._number(first), *sizes]]
        if plain == "repeat" and not self._of_images(node):
            return name, [args[0], [self._number(args[1][0]), *args[1][1:]]]
        if plain in MADE:
            return name, [[self._number(a[0]), *a[1:]] if isinstance(a, list | tuple) and a else a for a in args]
        if plain in ("split", "chunk", "split_with_sizes"):
            return "split_with_sizes.default", [args[0], [self.sizes(one)[dim] for one in own], dim]
        if plain == "select":
            return name, [args[0], dim, int(self.along(value, dim)[: args[2] % value.shape[dim]].sum())]
        if plain in ("slice", "narrow") and value.labels.shape[dim] > 1:
            return self._slice(node, value, dim)
        if plain in ("pad", "constant_pad_nd"):
            return name, [args[0], self._pads(args[1], own), *args[2:]]
        return name, args

    def _number(self, size):
        return NUMBER if size == self.images.meta["val"].shape[0] else size

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
