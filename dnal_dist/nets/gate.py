"""Gates for any network: `gate(module, example)`."""

import contextlib
import copy
import itertools
from bisect import bisect_right
from collections.abc import Collection
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common.errors import InputError
from dnal_dist.nets import branches
from dnal_dist.nets.activation import ReLU6
from dnal_dist.nets.branches import Branch
from dnal_dist.nets.checking import check_exact
from dnal_dist.nets.convolution import faster
from dnal_dist.nets.gated import GatedBatchNorm, Gates, shared
from dnal_dist.nets.gated_modules import gated_kind, plain_norm
from dnal_dist.nets.graph import Gated, Graph, read
from dnal_dist.nets.narrow import Beside, Narrow
from dnal_dist.nets.narrowing import Narrowing
from dnal_dist.nets.rules import RULES
from dnal_dist.nets.sites import Gating, Ungated, freeze
from dnal_dist.nets.slim import Slim
from dnal_dist.nets.streams import Streams, exact, paper
from dnal_dist.nets.tracing import Tracer, exported


class Reading(NamedTuple):
    """What is known of a network from its graph alone."""

    graph: Graph
    gating: Gating
    branches: list[Branch]
    image_size: int
    trace: Tracer
    places: dict[int, dict[str, int]]
    """By image size, as they were asked for: at how many places each layer computes."""
    streams: dict[tuple, Streams]
    """By image size, rule and device, as they were asked for."""


def reading(module: nn.Module, example: Tensor, gated: Gated, trace: Tracer = exported) -> Reading:
    """The graph of `module` for images like `example` (n, 3, H, W), and what closes in it. Raises InputError."""
    paths = {path for path, _ in module.named_modules()}
    if unknown := [path for path in gated.ignore if path not in paths]:
        raise InputError(f"`ignore` is a list of module paths; there is no {unknown[0]!r}")
    # Whatever the caller's default is; where it is this anyway, each of the export's many calls is spared a look.
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        graph = read(module, example, RULES, gated, trace)
        freeze(graph)
        gating = Gating(graph)
        if not graph.layers:
            raise InputError(f"{type(module).__name__} has no channel that can be closed: there is no Conv2d or Linear")
        if not gating.sites:
            most = max(gating.ungated(), key=lambda row: row.channels)
            raise InputError(
                f"{type(module).__name__} has no channel that can be closed: {most.layer} stays whole, since {most.reason}"
            )
        size = example.shape[-1]
        return Reading(graph, gating, branches.find(graph, gating), size, trace, {size: graph.positions()}, {})


class GatedNetwork(Beside):
    """Any module with gates: `net(images, gates)`. Parameters, buffers and modules are the module's own, under their names.

    images (n, 3, H, W); gates flat, float32, (N,), in the order of gate_sites; None means no gates at all.
    """

    gate_sites: dict[str, int]
    """Gate sites, by the path of the module whose output they gate first -> channels, in forward order."""

    def __init__(self, module: nn.Module, found: Reading, image_size: int | None = None):
        """image_size: height and width of its images, if not those that it was read for."""
        super().__init__()
        # Not registered: what it has, this has under the same names.
        self.__dict__["own"] = module
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        own = self.__dict__
        own["graph"], own["gating"], own["branches"], read_size, own["_trace"], own["_places"], own["_streams"] = found
        own["image_size"] = image_size or read_size
        own["gate_sites"] = dict(self.gating.sites)
        own["num_classes"] = self.graph.outputs.shape[-1]
        # Whatever an image does not reach, such as auxiliary classifiers, does not train.
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in self.graph.reached)
        own["gates"], own["slim"] = Gates(list(self.gate_sites.values())), None
        numbers = {path: self.gating.of_label[self.graph.points[path]] for path in sorted(self.graph.needed)}
        own["gated_paths"] = {path for path, own in numbers.items() if bool((own < self.num_gates).any())}
        for path in self.gated_paths:
            gated = self.get_submodule(path)
            gated.__class__ = gated_kind(gated)
            gated.take(self.gates, numbers[path])
        for module in self.modules():
            if type(module) is nn.ReLU6:
                module.__class__ = ReLU6
            faster(module)
        for path, norm in self.named_modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, GatedBatchNorm):
                if (kind := plain_norm(norm)) is None:
                    name = type(norm).__name__.removeprefix("Gated")
                    raise InputError(f"{path} is a {name}, whose statistics would move in architecture steps; use nn.BatchNorm2d")
                norm.__class__ = kind

    def slim_to(self, keep: Tensor) -> None:
        """Compute the channels of `keep`, bool (N,), alone wherever there are gates, from here on; those of others must be 0."""
        self.__dict__["slim"] = None if keep.all() else Slim(self, keep)

    def get_submodule(self, target: str) -> nn.Module:
        return self.own.get_submodule(target)

    def train(self, mode: bool = True) -> "GatedNetwork":
        self.own.train(mode)
        self.training = mode
        return self

    def forward(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        self.gates.set(gates)
        try:
            logits = (self.own if gates is None or self.slim is None else self.slim)(images)
        finally:
            self.gates.set(None)
        if isinstance(logits, tuple | list):  # of auxiliary classifiers
            logits = logits[0]
        return logits

    @property
    def num_gates(self) -> int:
        return self.gating.always

    @property
    def ungated(self) -> list[Ungated]:
        """Channels that stay whole, and why."""
        return self.gating.ungated()

    def by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector over all gates (alpha, a keep mask, ...) as site -> its part, views of it."""
        if flat.shape != (self.num_gates,):
            raise ValueError(f"expected one value for each of the {self.num_gates} gates, got shape {tuple(flat.shape)}")
        return dict(zip(self.gate_sites, flat.split(list(self.gate_sites.values())), strict=True))

    def gates_of(self, site: str) -> Tensor:
        """The gates of a site, indices of the flat vector."""
        start = self._starts[site]
        return torch.arange(start, start + self.gate_sites[site])

    @cached_property
    def _starts(self) -> dict[str, int]:
        """The first gate of each site."""
        return dict(zip(self.gate_sites, itertools.accumulate([0, *self.gate_sites.values()]), strict=False))

    def site_at(self, gate: int) -> str:
        """The site of a gate."""
        return list(self._starts)[bisect_right(list(self._starts.values()), gate) - 1]

    def site_of(self, layer: str) -> str | None:
        """The site of the gates that are on a layer's own output channels, the first of several."""
        if not {layer, self.graph.norms.get(layer)} & self.gated_paths:
            return None
        return self.site_at(int(self.gating.of_label[self.graph.layers[layer].outputs].min()))

    def strength(self) -> Tensor:
        """The magnitude of each gate's BatchNorm weight, (N,); zero where there is none."""
        found = torch.zeros(self.num_gates + 1)
        for path in sorted(self.gated_paths, reverse=True):
            module = self.get_submodule(path)
            if isinstance(module, GatedBatchNorm) and module.weight is not None:
                found[self.gating.of_label[self.graph.points[path]]] = module.weight.detach().abs().float().cpu()
        return found[:-1]

    def units(self) -> list[nn.Module]:
        """The blocks of the network, in forward order."""
        return _blocks(self.own, "", self.graph.called)

    def coupled(self) -> dict[str, list[str]]:
        """By site, the other layers whose output channels close with its own."""
        found: dict[str, list[str]] = {site: [] for site in self.gate_sites}
        for layer in self.graph.layers.values():
            gates = self.gating.of(layer.outputs) - {self.gating.always}
            own = (layer.path, layer.path.rpartition(".")[0], self.graph.norms.get(layer.path))
            for site in dict.fromkeys(map(self.site_at, gates)):
                if site.partition("#")[0] not in own:
                    found[site].append(layer.path)
        return found

    def shortcuts(self) -> list[str]:
        """Module paths of the blocks with a way around them, in forward order."""
        layers: dict[str, list[str]] = {}
        for branch in self.branches:
            if not branch.needed:
                layers.setdefault(branch.sum, []).extend(branch.layers)
        return [block for block in dict.fromkeys(map(shared, layers.values())) if block]

    def cut(self, keep: Tensor) -> Narrow:
        """The network with the channels of `keep`, bool (N,)."""
        return Narrowing(self.graph, self, self.gating, keep).build()

    def streams(self, image_size: int, rule: str = "exact", device: torch.device | str = "cpu") -> Streams:
        """What costs by a rule, exact or paper, are computed from. Raises InputError if the network cannot take such images."""
        key = image_size, rule, torch.device(device)
        if key not in self._streams:
            self._streams[key] = (exact if rule == "exact" else paper)(self, self._positions(image_size)).to(device)
        return self._streams[key]

    def _positions(self, image_size: int) -> dict[str, int]:
        """At how many places each layer computes for one image."""
        if image_size not in self._places:
            images = torch.zeros(2, 3, image_size, image_size, device=next(self.parameters()).device)
            self._places[image_size] = read(self.own, images, RULES, self.graph.gated, self._trace).positions()
        return self._places[image_size]

    def must_have(self) -> list[Tensor]:
        """Groups of gates of which one must be open: those of what a tensor of the network consists of."""
        groups = {tuple(sorted(self.gating.of(part))) for part in self.graph.parts.keys() - set(self.graph.free_sums.values())}
        within = {tuple(self.gates_of(site).tolist()) for branch in self.branches for site in branch.sites}
        return [torch.tensor(group) for group in sorted(groups - within) if group and group[-1] < self.num_gates]

    def cells(self) -> list[list[Branch]]:
        """The branches of each sum that several write to, such as the candidates of a supernet's cell."""
        found: dict[str, list[Branch]] = {}
        for branch in self.branches:
            found.setdefault(branch.sum, []).append(branch)
        return [branches for branches in found.values() if len(branches) > 1]

    def ways(self) -> list[list[list[Tensor]]]:
        """For each sum that nothing but branches writes to, the gates of each branch's sites: of one branch all must be open."""
        found: dict[str, list[list[Tensor]]] = {}
        for branch in self.branches:
            if branch.needed:
                found.setdefault(branch.sum, []).append([self.gates_of(site) for site in branch.sites])
        return list(found.values())


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


def gate(
    module: nn.Module, example: Tensor, ignore: Collection[str] = (), check: bool = True, streams: str = "tied"
) -> GatedNetwork:
    """A copy of `module`, any CNN, with a gate for every channel that can be closed.

    example: images (n, 3, H, W) of the size it will see. ignore: module paths whose outputs stay whole. check: call check_exact.
    streams: what layers close that write to one residual stream: "tied", the same channels; "free", each its own.
    `.ungated` says what else stays whole, and why. Raises InputError if the module cannot be read or has no channel to close, or if
    the compact network of a random mask differs from the network with those gates closed.
    """
    if not isinstance(example, Tensor):
        raise InputError(f"the example must be images (n, 3, H, W), not a {type(example).__name__}")
    if example.dim() != 4 or example.shape[1] != 3 or example.shape[2] != example.shape[3] or not example.is_floating_point():
        raise InputError(f"the example must be square images (n, 3, H, W) of floats, not {tuple(example.shape)} of {example.dtype}")
    if isinstance(ignore, str):
        raise InputError(f"`ignore` is a list of module paths; there is no {ignore!r}")
    try:
        module = copy.deepcopy(module)
    except RuntimeError as error:
        raise InputError(
            f"{type(module).__name__} cannot be copied ({str(error).splitlines()[0]}); in place of torch.nn.utils.weight_norm and "
            "spectral_norm use those of torch.nn.utils.parametrizations"
        ) from None
    found = reading(module, example, Gated(streams == "free", tuple(ignore)))
    network = GatedNetwork(module, found)
    if check:
        check_exact(network)
    return network


def segments(network: nn.Module) -> list[list[nn.Module]]:
    """The parts of a network whose parameters are gathered, and whose activations are computed again, together: the units of a
    gated network, the modules that a compact one calls; in one of an older release each Sum, or a convolution or Linear with what
    follows it. In forward order."""
    if isinstance(network, GatedNetwork):
        return [[unit] for unit in network.units()]
    if not isinstance(network, nn.Sequential):
        return [[leaf] for leaf in network.leaves()]
    found: list[list[nn.Module]] = []
    for child in network.children():
        if not found or isinstance(child, nn.Conv2d | nn.Linear) or any(True for _ in child.children()):
            found.append([])
        found[-1].append(child)
    return [segment for segment in found if any(True for module in segment for _ in module.parameters())]
