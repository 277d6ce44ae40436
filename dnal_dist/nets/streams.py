"""The cost of a network by its gates, from its graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.nets.branches import Branch
from dnal_dist.nets.graph import Weighted
from dnal_dist.nets.sites import Gating

if TYPE_CHECKING:
    from dnal_dist.nets.gate import GatedNetwork


class Streams(NamedTuple):
    """What the cost of a network is computed from: each tensor of parameters has factor * rows * columns elements, where rows and
    columns are sums of gates, one sum a stream; none if a site of its branch has no open channel."""

    number: int
    stream: Tensor
    gate: Tensor
    """Pairs: what goes by number `gate` in the network's gating is counted in stream `stream`."""
    layer: Tensor
    """Row of the table of layers, (tensors,), likewise those that follow."""
    factor: Tensor
    rows: Tensor
    columns: Tensor
    positions: Tensor
    """How often each element is multiplied."""
    is_left: Tensor
    """Whether it is what is left of a branch that lost a site, and there only then; bool."""
    tensor: Tensor
    site: Tensor
    """Pairs: tensor `tensor` is in a branch with site `site`, which is not its own."""
    sites: int
    site_gate: Tensor
    """The site of each gate."""
    inputs: Tensor
    """Stream of the input channels of each layer, (layers,)."""
    outputs: Tensor

    def to(self, device: torch.device | str) -> Streams:
        return self._replace(**{name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)})


def costs(streams: Streams, gating: Gating, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MACs, parameters, live input and live output channels of each layer, (L,) each, if each gate, (N,), is the probability that
    its channel stays."""
    sums = gates.new_zeros(streams.number).index_add(0, streams.stream, gating.values(gates)[streams.gate])
    some = 1 - gates.new_ones(streams.sites).scatter_reduce(0, streams.site_gate, 1 - gates, "prod")
    works = gates.new_ones(len(streams.layer)).scatter_reduce(0, streams.tensor, some[streams.site], "prod")
    sizes = streams.factor.to(gates.dtype) * sums[streams.rows] * sums[streams.columns]
    sizes = sizes * torch.where(streams.is_left, 1 - works, works)
    params = gates.new_zeros(len(streams.inputs)).index_add(0, streams.layer, sizes)
    macs = gates.new_zeros(len(streams.inputs)).index_add(0, streams.layer, sizes * streams.positions.to(gates.dtype))
    return macs, params, sums[streams.inputs], sums[streams.outputs]


def exact(network: GatedNetwork, positions: dict[str, int]) -> Streams:
    """The streams of a network by the exact rule; positions: of each layer. A weight that is computed counts as the plain one that
    it becomes."""
    graph, table = network.graph, _Table(network, network.gating.of_label)
    layers = {layer.path: i for i, layer in enumerate(graph.layers.values())}
    used = graph.reached - (graph.baked - graph.tensors.keys() - set(map(graph.tensor_of, graph.values)))
    norms = {norm: layers[layer] for layer, norm in graph.norms.items()}
    for layer in graph.layers.values():
        table.add_weight(layer, layer.inputs, layer.outputs, positions[layer.path])
    for name, parameter in network.named_parameters():
        path, _, own = name.rpartition(".")
        # What a weight is computed from is not in the compact network.
        if name not in used or (path in layers and own == "weight"):
            continue
        held = (network.gating.of_label[labels] for labels in graph.tensors.get(name, {}).values())
        held = (numbers if numbers.dim() == 1 else numbers[:, 0] for numbers in held if _is_even(numbers))
        cut = [numbers for numbers in held if bool((numbers != network.gating.always).any())][:2]
        factor = parameter.numel() / math.prod([len(numbers) for numbers in cut])
        a, b = ([table.stream(numbers) for numbers in cut] + [table.one, table.one])[:2]
        table.add(name, layers.get(path, norms.get(path, len(layers) - 1)), factor, a, b, 0)
    for branch in {branch.operand: branch for branch in network.branches}.values():
        table.add(branch.operand, layers[branch.layers[-1]], 1, table.of(branch.outputs), table.one, 0, branch)
    return table.streams()


def paper(network: GatedNetwork, positions: dict[str, int]) -> Streams:
    """The streams by the rule of the paper's tables: what a sum adds up is open where its nearest branches are, outputs close only
    where a layer has gates of its own, branches do not close as a whole, and each BatchNorm and bias output is an operation."""
    graph, table = network.graph, _Table(network, network.gating.nearest, closes=False)
    for i, layer in enumerate(graph.layers.values()):
        module, norm = network.get_submodule(layer.path), graph.norms.get(layer.path)
        is_plain = getattr(network.get_submodule(layer.path.rpartition(".")[0]), "plain", False)
        everything = torch.zeros_like
        outputs = layer.outputs if {layer.path, norm} & network.gated_paths else everything(layer.outputs)
        table.add_weight(layer, everything(layer.inputs) if is_plain else layer.inputs, outputs, positions[layer.path])
        vectors = 1 if isinstance(module, nn.Linear) else (module.bias is not None) + (norm is not None and not is_plain)
        of_norm = int(norm is not None and not is_plain and not isinstance(module, nn.Linear))
        table.add(layer.path, i, vectors, table.of(outputs), table.one, 1)
        table.add(layer.path, i, of_norm, table.of(outputs), table.one, 0)
    return table.streams()


def _is_even(numbers: Tensor) -> bool:
    return numbers.dim() == 1 or bool((numbers == numbers[:, :1]).all())


class _Table:
    """The rows of Streams as they are found. of_label: the number of each label in the network's gating."""

    def __init__(self, network: GatedNetwork, of_label: Tensor, closes: bool = True):
        self.network, self.of_label = network, of_label
        self.known: dict[tuple[int, ...], int] = {}
        self.numbers: list[tuple[int, ...]] = []
        self.rows: list[tuple] = []
        self.pairs: list[tuple[int, int]] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.one = self.stream(torch.tensor([network.gating.always]))
        self.site_number = {site: i for i, site in enumerate(network.gate_sites)}
        self.gates_of = [tuple(network.gates_of(site).tolist()) for site in network.gate_sites]
        self.branches: dict[str, list[Branch]] = {}
        for branch in network.branches if closes else ():
            for name in {*branch.layers, *branch.tensors}:
                self.branches.setdefault(name, []).append(branch)

    def stream(self, numbers: Tensor) -> int:
        own = tuple(numbers.flatten().tolist())
        if own not in self.known:
            self.known[own] = len(self.known)
            self.numbers.append(own)
        return self.known[own]

    def of(self, labels: Tensor) -> int:
        return self.stream(self.of_label[labels])

    def add_weight(self, layer: Weighted, inputs: Tensor, outputs: Tensor, positions: int) -> None:
        weight = self.network.get_submodule(layer.path).weight
        self.inputs.append(self.of(inputs))
        self.outputs.append(self.of(outputs))
        # Each output of a grouped convolution reads its group alone.
        factor = weight[0].numel() / (1 if layer.whole_groups else len(inputs))
        columns = self.one if layer.whole_groups else self.inputs[-1]
        self.add(layer.path, len(self.inputs) - 1, factor, self.outputs[-1], columns, positions)

    def add(
        self, name: str, layer: int, factor: float, rows: int, columns: int, positions: int, left: Branch | None = None
    ) -> None:
        """A tensor of parameters: of the layer at path `name`, or of this name; or what is left of a branch."""
        for branch in self.branches.get(name, ()) if left is None else [left]:
            others = (self.site_number[site] for site in branch.sites)
            self.pairs += [(len(self.rows), site) for site in others if self.gates_of[site] != self.numbers[rows]]
        self.rows.append((layer, factor, rows, columns, positions, left is not None))

    def streams(self) -> Streams:
        sums = [(number, gate) for number, gates in enumerate(self.numbers) for gate in gates]
        columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*self.rows, strict=True)]
        layer, factor, rows, columns, positions, is_left = columns
        sizes = list(self.network.gate_sites.values())
        return Streams(
            number=len(self.numbers),
            stream=torch.tensor([number for number, _ in sums]),
            gate=torch.tensor([gate for _, gate in sums]),
            layer=layer.long(),
            factor=factor,
            rows=rows.long(),
            columns=columns.long(),
            positions=positions,
            is_left=is_left.bool(),
            tensor=torch.tensor([tensor for tensor, _ in self.pairs], dtype=torch.long),
            site=torch.tensor([site for _, site in self.pairs], dtype=torch.long),
            sites=len(sizes),
            site_gate=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
            inputs=torch.tensor(self.inputs),
            outputs=torch.tensor(self.outputs),
        )
