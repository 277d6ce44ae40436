"""Gates for any network: `gate(module, example)`."""

import copy
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.errors import InputError
from dnal_dist.nets import branches
from dnal_dist.nets.activation import ReLU6
from dnal_dist.nets.gated import ConvBN, GatedBatchNorm, GatedNetwork, Gates, Layer, shared
from dnal_dist.nets.gated_modules import gated_kind, plain_norm
from dnal_dist.nets.graph import Graph, read
from dnal_dist.nets.narrow import Narrow
from dnal_dist.nets.narrowing import Narrowing
from dnal_dist.nets.rules import RULES
from dnal_dist.nets.streams import Streams, streams_of

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
        self.gate_sites, self.__dict__["gate_of"] = _sites(graph)
        self.num_classes = graph.outputs.shape[-1]
        self.ungated = _ungated(graph, self.gate_of, self.num_gates)
        self.branches = branches.find(graph, self.gate_of, self.gate_sites)
        self._rows = self._layers()
        self._groups = self._must_have()
        self._costs = streams_of(self)
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
        for module in self.modules():
            if type(module) is nn.ReLU6:
                module.__class__ = ReLU6
        for path, norm in self.named_modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, GatedBatchNorm):
                if (kind := plain_norm(norm)) is None:
                    name = type(norm).__name__.removeprefix("Gated")
                    raise InputError(f"{path} is a {name}, whose statistics would move in architecture steps; use nn.BatchNorm2d")
                norm.__class__ = kind

    def __setattr__(self, name: str, value) -> None:
        # The module may have a child of any name, such as "graph"; this has its own beside it.
        taken = any(name in self.__dict__.get(held, {}) for held in ("_modules", "_parameters", "_buffers"))
        if taken and not isinstance(value, nn.Module | Tensor | None):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
            branch = next((branch.sites for branch in self.branches if layer.path in branch.layers), ())
            found.append(Layer(layer.path, self.graph.norms.get(layer.path), site, (), layer.positions, branch=branch))
        return found

    def coupled(self) -> dict[str, list[str]]:
        """By site, the other layers whose output channels close with its own."""
        ends, sites = torch.tensor([*self.gate_sites.values()]).cumsum(0), list(self.gate_sites)
        found: dict[str, list[str]] = {site: [] for site in sites}
        for layer in self.graph.layers.values():
            gates = self.gate_of[layer.outputs].unique()
            for i in sorted({int((ends <= gate).sum()) for gate in gates.tolist() if gate < self.num_gates}):
                own = (layer.path, layer.path.rpartition(".")[0], self.graph.norms.get(layer.path))
                if sites[i].partition("#")[0] not in own:
                    found[sites[i]].append(layer.path)
        return found

    def shortcuts(self) -> list[str]:
        return [block for block in dict.fromkeys(shared(branch.layers) for branch in self.branches) if block]

    def inner(self, branch: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(site for own in self.branches if own.sites == branch for site in own.within)

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
        within = {tuple(self.gates_of(site).tolist()) for branch in self.branches for site in branch.sites}
        return [torch.tensor(group) for group in sorted(groups - within) if group and group[-1] < self.num_gates]

    def ways(self) -> list[list[list[Tensor]]]:
        """For each sum that nothing but branches writes to, the gates of each branch's sites: of one branch all must be open."""
        found: dict[str, list[list[Tensor]]] = {}
        for branch in self.branches:
            if branch.needed:
                found.setdefault(branch.sum, []).append([self.gates_of(site) for site in branch.sites])
        return list(found.values())

    def gates_of(self, site: str) -> Tensor:
        """The gates of a site, indices of the flat vector."""
        first = sum(number for _, number in itertools.takewhile(lambda item: item[0] != site, self.gate_sites.items()))
        return torch.arange(first, first + self.gate_sites[site])


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
        if issubclass(graph.kinds.get(first.rpartition(".")[0], nn.Module), ConvBN):
            first = first.rpartition(".")[0]  # one module by its recipes' name
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
    """Close half of the gates at random, then also one site of every branch, in float64, and compare with the compact network:
    returns the difference of the logits relative to their size. Raises InputError if it is above EXACT. The network is left as it
    was."""
    from dnal_dist.nets.masks import rescue

    generator = torch.Generator().manual_seed(seed)
    double = copy.deepcopy(network).cpu().double().eval()
    for name, tensor in [*double.named_parameters(), *double.named_buffers()]:
        # A weight near zero, as some networks begin with, would hide what it multiplies.
        small = tensor.is_floating_point() and (tensor.dim() <= 1 or float(tensor.abs().max()) < 1e-2)
        if small and "running_var" not in name:
            tensor.add_(torch.empty_like(tensor).uniform_(0.1, 0.5, generator=generator))
    keep = torch.rand(network.num_gates, generator=generator) < 0.5
    masks = [rescue(double, keep)[0]]
    if network.branches:  # and with one site of every branch closed
        for branch in network.branches:
            site = int(torch.randint(len(branch.sites), (), generator=generator))
            keep[network.gates_of(branch.sites[site])] = False
        masks.append(rescue(double, keep)[0])
    images = torch.randn(3, 3, network.image_size, network.image_size, generator=generator, dtype=torch.float64)
    return max(_difference(network, double, mask, images) for mask in masks)


def _difference(network: AnyNetwork, double: AnyNetwork, keep: Tensor, images: Tensor) -> float:
    name = type(network._own).__name__
    try:
        compact = double.cut(keep).double().eval()
        masked, compact_logits = double(images, keep.double()), compact(images)
        if masked.shape != compact_logits.shape or masked.dim() != 2:
            raise ValueError(f"it returns {tuple(masked.shape)}, not (n, classes)")
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name} has no compact network: {type(error).__name__} {why}") from None
    difference = float((masked - compact_logits).abs().max() / masked.abs().max().clamp_min(1e-30))
    if not difference <= EXACT:
        raise InputError(
            f"{name}: its compact network differs from the masked one by {difference:.1e}; "
            "name the modules that do something special in `ignore`"
        )
    return difference
