"""Gates for any network: `gate(module, example)`."""

import copy
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.errors import InputError
from dnal_dist.nets.gated import GatedBatchNorm, GatedNetwork, Gates, Layer, Streams
from dnal_dist.nets.gated_modules import gated_kind, plain_norm
from dnal_dist.nets.graph import Graph, read
from dnal_dist.nets.narrow import Narrow
from dnal_dist.nets.narrowing import Narrowing
from dnal_dist.nets.rules import RULES

# Largest relative difference, in float64, between the network with closed gates and its compact one.
EXACT = 1e-10


class Ungated(NamedTuple):
    """Output channels of a layer that stay, and why."""

    layer: str
    channels: int
    reason: str


class AnyNetwork(GatedNetwork):
    """Any module with gates: `net(images, gates)`. Parameters, buffers and modules are the module's own, under their names."""

    def __init__(self, module: nn.Module, graph: Graph, image_size: int, ignore: tuple[str, ...] = ()):
        super().__init__()
        # Not registered: what it has, this has under the same names.
        self.__dict__["_own"] = module
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self.image_size, self.graph = image_size, graph
        for path, outputs in graph.points.items():
            if any(path == name or path.startswith(f"{name}.") for name in ignore):
                graph.classes.freeze(outputs, "it is in `ignore`")
        self.gate_sites, self.gate_of = _sites(graph)
        self.num_classes = graph.outputs.shape[-1]
        self.ungated = _ungated(graph, self.gate_of, self.num_gates)
        self._rows = self._layers()
        self._groups = self._must_have()
        self._costs = _streams(self)
        # Whatever an image does not reach, such as auxiliary classifiers, does not train.
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in graph.reached)
        self.gates = Gates()
        for path in sorted(graph.needed):
            places = self.gate_of[graph.points[path]]
            if bool((places < self.num_gates).any()):
                gated = self.get_submodule(path)
                gated.__class__ = gated_kind(gated)
                gated.gates = self.gates
                gated.register_buffer("gate_places", places, persistent=False)
        for path, norm in self.named_modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, GatedBatchNorm):
                if (kind := plain_norm(norm)) is None:
                    name = type(norm).__name__.removeprefix("Gated")
                    raise InputError(f"{path} is a {name}, whose statistics would move in architecture steps; use nn.BatchNorm2d")
                norm.__class__ = kind

    def get_submodule(self, target: str) -> nn.Module:
        return self._own.get_submodule(target)

    def train(self, mode: bool = True) -> "AnyNetwork":
        self._own.train(mode)
        self.training = mode
        return self

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        self.gates.current = None if gates is None else torch.cat([gates, gates.new_ones(1)])
        try:
            logits = self._own(images)
        finally:
            self.gates.current = None
        if isinstance(logits, tuple | list):  # of auxiliary classifiers
            logits = logits[0]
        return logits

    def units(self) -> list[nn.Module]:
        return _blocks(self._own, "", self.graph.called)

    def layers(self, image_size: int) -> list[Layer]:
        self._require(image_size)
        return self._rows

    def _layers(self) -> list[Layer]:
        sites, ends = list(self.gate_sites), torch.tensor([*self.gate_sites.values()]).cumsum(0)
        found = []
        for layer in self.graph.layers.values():
            first = int(self.gate_of[layer.outputs].min())
            site = sites[int((ends <= first).sum())] if first < self.num_gates else None
            found.append(Layer(layer.path, self.graph.norms.get(layer.path), site, (), layer.positions))
        return found

    def coupled(self) -> dict[str, list[str]]:
        """By site, the other layers whose output channels close with its own."""
        ends, sites = torch.tensor([*self.gate_sites.values()]).cumsum(0), list(self.gate_sites)
        found: dict[str, list[str]] = {site: [] for site in sites}
        for layer in self.graph.layers.values():
            gates = self.gate_of[layer.outputs].unique()
            for i in sorted({int((ends <= gate).sum()) for gate in gates.tolist() if gate < self.num_gates}):
                if sites[i].partition("#")[0] not in (layer.path, self.graph.norms.get(layer.path)):
                    found[sites[i]].append(layer.path)
        return found

    def shortcuts(self) -> list[str]:
        return []

    def _require(self, image_size: int) -> None:
        if image_size not in (1, self.image_size):
            raise InputError(f"the network was read for images of {self.image_size} pixels, not {image_size}; read it for those")

    def cut(self, keep: Tensor) -> Narrow:
        """The network with the channels of `keep`, bool (N,)."""
        stays = torch.cat([keep.cpu(), torch.ones(1, dtype=torch.bool)])[self.gate_of]
        return Narrowing(self.graph, self, stays).build()

    def streams(self, image_size: int) -> Streams:
        self._require(image_size)
        return self._costs

    def must_have(self) -> list[Tensor]:
        return self._groups

    def _must_have(self) -> list[Tensor]:
        """What a tensor of the network consists of."""
        groups = {tuple(sorted(set(self.gate_of[list(part)].tolist()))) for part in self.graph.parts}
        return [torch.tensor(group) for group in sorted(groups) if group and group[-1] < self.num_gates]


def _blocks(module: nn.Module, path: str, called: set[str]) -> list[nn.Module]:
    """Modules with parameters that are called, none inside another; lists and sequences are opened."""
    found: list[nn.Module] = []
    for name, child in module.named_children():
        own = f"{path}{name}"
        if own not in called or isinstance(child, nn.Sequential):
            found.extend(_blocks(child, f"{own}.", called))
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def _sites(graph: Graph) -> tuple[dict[str, int], Tensor]:
    """Sites with their number of gates, and for each label its gate; the number of gates stands for what is always open.

    A site is the classes that the same modules write and that the same tensors consist of, in the order of their first channel; its
    name is the first module's path.
    """
    roots = torch.tensor([graph.classes.find(label) for label in range(len(graph.classes.parents))])
    writers: dict[int, list[str]] = {}
    for path, labels in graph.points.items():
        if path in graph.needed:
            for root in dict.fromkeys(roots[labels].tolist()):
                if root not in graph.classes.reasons:
                    writers.setdefault(root, []).append(path)
    member: dict[int, list[int]] = {}
    for number, part in enumerate(dict.fromkeys(tuple(dict.fromkeys(roots[list(part)].tolist())) for part in graph.parts)):
        for root in part:
            member.setdefault(root, []).append(number)
    sites: dict[tuple, list[int]] = {}
    for root, paths in writers.items():
        sites.setdefault((*paths, *member[root]), []).append(root)
    names: dict[str, int] = {}
    for (first, *_), members in sites.items():
        again = sum(name.partition("#")[0] == first for name in names)
        names[f"{first}#{again + 1}" if again else first] = len(members)
    gates = {root: gate for gate, root in enumerate(itertools.chain(*sites.values()))}
    return names, torch.tensor([gates.get(root, len(gates)) for root in roots.tolist()])


def _ungated(graph: Graph, gate_of: Tensor, number: int) -> list[Ungated]:
    found: dict[tuple[str, str], int] = {}
    for layer in graph.layers.values():
        for label in layer.outputs[gate_of[layer.outputs] == number].tolist():
            key = layer.path, graph.classes.reason(label) or "nothing reads it that mixes channels"
            found[key] = found.get(key, 0) + 1
    return [Ungated(path, count, reason) for (path, reason), count in found.items()]


def gate(module: nn.Module, example: Tensor, ignore: list[str] | tuple[str, ...] = (), check: bool = True) -> AnyNetwork:
    """A copy of `module`, any CNN, with a gate for every channel that can be closed.

    example: images (n, 3, H, W) of the size it will see. ignore: module paths whose outputs stay whole. check: call check_exact.
    `.ungated` says what else stays whole, and why. Raises InputError if the module cannot be read or has no channel to close, or if
    the compact network of a random mask differs from the network with those gates closed.
    """
    if not isinstance(example, Tensor):
        raise InputError(f"the example must be images (n, 3, H, W), not a {type(example).__name__}")
    if example.dim() != 4 or example.shape[1] != 3 or example.shape[2] != example.shape[3] or not example.is_floating_point():
        raise InputError(f"the example must be square images (n, 3, H, W) of floats, not {tuple(example.shape)} of {example.dtype}")
    paths = {path for path, _ in module.named_modules()}
    if isinstance(ignore, str) or (unknown := [path for path in ignore if path not in paths]):
        raise InputError(f"`ignore` is a list of module paths; there is no {ignore if isinstance(ignore, str) else unknown[0]!r}")
    module = copy.deepcopy(module)
    graph = read(module, example[:2] if len(example) > 1 else torch.cat([example, example]), RULES)
    if not graph.layers:
        raise InputError(f"{type(module).__name__} has no channel that can be closed: there is no Conv2d or Linear")
    network = AnyNetwork(module, graph, example.shape[-1], tuple(ignore))
    if not network.num_gates:
        most = max(network.ungated, key=lambda row: row.channels)
        raise InputError(
            f"{type(module).__name__} has no channel that can be closed: {most.layer} stays whole, since {most.reason}"
        )
    if check:
        check_exact(network)
    return network


@torch.no_grad()
def check_exact(network: AnyNetwork, seed: int = 0) -> float:
    """Close half of the gates at random, in float64, and compare with the compact network: returns the difference of the logits
    relative to their size. Raises InputError if it is above EXACT. The network is left as it was."""
    from dnal_dist.nets.masks import rescue

    generator = torch.Generator().manual_seed(seed)
    double = copy.deepcopy(network).cpu().double().eval()
    for name, tensor in [*double.named_parameters(), *double.named_buffers()]:
        # A weight near zero, as some networks begin with, would hide what it multiplies.
        small = tensor.is_floating_point() and (tensor.dim() <= 1 or float(tensor.abs().max()) < 1e-2)
        if small and "running_var" not in name:
            tensor.add_(torch.empty_like(tensor).uniform_(0.1, 0.5, generator=generator))
    keep, _ = rescue(double, torch.rand(network.num_gates, generator=generator) < 0.5)
    images = torch.randn(3, 3, network.image_size, network.image_size, generator=generator, dtype=torch.float64)
    try:
        masked, compact = double(images, keep.double()), double.cut(keep).double().eval()(images)
        if masked.shape != compact.shape or masked.dim() != 2:
            raise ValueError(f"it returns {tuple(masked.shape)}, not (n, classes)")
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{type(network._own).__name__} has no compact network: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    difference = float((masked - compact).abs().max() / masked.abs().max().clamp_min(1e-30))
    if not difference <= EXACT:
        raise InputError(
            f"{type(network._own).__name__}: its compact network differs from the masked one by {difference:.1e}; "
            "name the modules that do something special in `ignore`"
        )
    return difference


def _streams(network: "AnyNetwork") -> Streams:
    """The cost of the compact network by the gates. A weight that is computed counts as the plain one it becomes."""
    graph, gate_of = network.graph, network.gate_of
    known: dict[tuple[int, ...], int] = {}

    def of_gates(gates: Tensor) -> int:
        return known.setdefault(tuple(gates.tolist()), len(known))

    def stream(labels: Tensor) -> int:
        return of_gates(gate_of[labels])

    one, rows = of_gates(torch.tensor([network.num_gates])), []
    layers = {layer.path: i for i, layer in enumerate(graph.layers.values())}
    norms = {norm: layers[layer] for layer, norm in graph.norms.items()}
    for i, layer in enumerate(graph.layers.values()):
        weight = network.get_submodule(layer.path).weight
        # Each output of a grouped convolution reads its group alone.
        factor = weight[0].numel() / (1 if layer.whole_groups else len(layer.inputs))
        inputs = one if layer.whole_groups else stream(layer.inputs)
        rows.append((i, factor, stream(layer.outputs), inputs, layer.positions, layer.positions))
    for name, parameter in network.named_parameters():
        path, _, own = name.rpartition(".")
        # Of a layer its bias is left; what its weight is computed from is not in the compact network.
        within = any(name.startswith(f"{layer}.") for layer in layers)
        if name not in graph.reached or (within and (path not in layers or own != "bias")):
            continue
        held = (gate_of[labels] for labels in graph.tensors.get(name, {}).values())
        held = (
            gates if gates.dim() == 1 else gates[:, 0] for gates in held if gates.dim() == 1 or bool((gates == gates[:, :1]).all())
        )
        cut = [gates for gates in held if bool((gates < network.num_gates).any())][:2]
        factor = parameter.numel() / math.prod([len(gates) for gates in cut])
        a, b = ([of_gates(gates) for gates in cut] + [one, one])[:2]
        i = layers.get(path, norms.get(path, len(layers) - 1))
        # Of a BatchNorm's two vectors one is counted, as the paper does.
        rows.append((i, factor, a, b, 0, int(own == "bias")))
    inputs = [stream(layer.inputs) for layer in graph.layers.values()]
    outputs = [stream(layer.outputs) for layer in graph.layers.values()]
    pairs = [(number, gate) for gates, number in known.items() for gate in gates]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    layer, factor, first, second, positions, operations = columns
    return Streams(
        number=len(known),
        stream=torch.tensor([number for number, _ in pairs]),
        gate=torch.tensor([gate for _, gate in pairs]),
        layer=layer.long(),
        factor=factor,
        rows=first.long(),
        columns=second.long(),
        positions=positions,
        operations=operations,
        inputs=torch.tensor(inputs),
        outputs=torch.tensor(outputs),
    )
