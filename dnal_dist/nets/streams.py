"""The cost of a network that was read from its graph, by its gates."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """What the cost of a network is computed from: each tensor of parameters has factor * rows * columns elements, where rows and
    columns are sums of gates, one sum a stream; none if a site of its branch has no open channel."""

    number: int
    stream: Tensor
    gate: Tensor
    """Pairs: gate `gate` is counted in stream `stream`."""
    layer: Tensor
    """Row of the table of layers, (tensors,), likewise those that follow."""
    factor: Tensor
    rows: Tensor
    columns: Tensor
    positions: Tensor
    """How often each element is multiplied."""
    operations: Tensor
    """Likewise by the paper's rule: once for the BatchNorm and the bias of a convolution's output."""
    is_left: Tensor
    """Whether it is what is left of a branch that lost a site, and there only then; bool."""
    tensor: Tensor
    site: Tensor
    """Pairs: tensor `tensor` is in a branch with site `site`, which is not its own."""
    sites: int
    site_gate: Tensor
    """The site of each gate; the last gate, always open, has a site of its own."""
    inputs: Tensor
    """Stream of the input channels of each layer, (layers,)."""
    outputs: Tensor


def costs(streams: Streams, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MACs, parameters, live input and live output channels of each layer, (L,) each, if each gate, (N,), is the probability that
    its channel stays."""
    gates = torch.cat([gates, gates.new_ones(1)])
    move = {name: value.to(gates.device) for name, value in streams._asdict().items() if isinstance(value, Tensor)}
    streams = streams._replace(**move)
    sums = gates.new_zeros(streams.number).index_add(0, streams.stream, gates[streams.gate])
    some = 1 - gates.new_ones(streams.sites).scatter_reduce(0, streams.site_gate, 1 - gates, "prod")
    works = gates.new_ones(len(streams.layer)).scatter_reduce(0, streams.tensor, some[streams.site], "prod")
    sizes = streams.factor.to(gates.dtype) * sums[streams.rows] * sums[streams.columns]
    sizes = sizes * torch.where(streams.is_left, 1 - works, works)
    params = gates.new_zeros(len(streams.inputs)).index_add(0, streams.layer, sizes)
    macs = gates.new_zeros(len(streams.inputs)).index_add(0, streams.layer, sizes * streams.positions.to(gates.dtype))
    return macs, params, sums[streams.inputs], sums[streams.outputs]


def streams_of(network) -> Streams:
    """The streams of an AnyNetwork. A weight that is computed counts as the plain one it becomes."""
    graph, gate_of, table = network.graph, network.gate_of, _Table(network)
    layers = {layer.path: i for i, layer in enumerate(graph.layers.values())}
    norms = {norm: layers[layer] for layer, norm in graph.norms.items()}
    inputs = [table.stream(gate_of[layer.inputs]) for layer in graph.layers.values()]
    outputs = [table.stream(gate_of[layer.outputs]) for layer in graph.layers.values()]
    for i, layer in enumerate(graph.layers.values()):
        weight = network.get_submodule(layer.path).weight
        # Each output of a grouped convolution reads its group alone.
        factor = weight[0].numel() / (1 if layer.whole_groups else len(layer.inputs))
        columns = table.one if layer.whole_groups else inputs[i]
        table.add(layer.path, i, factor, outputs[i], columns, layer.positions, layer.positions)
    for name, parameter in network.named_parameters():
        path, _, own = name.rpartition(".")
        # Of a layer its bias is left; what its weight is computed from is not in the compact network.
        within = any(name.startswith(f"{layer}.") for layer in layers)
        if name not in graph.reached or (within and (path not in layers or own != "bias")):
            continue
        held = (gate_of[labels] for labels in graph.tensors.get(name, {}).values())
        held = (gates if gates.dim() == 1 else gates[:, 0] for gates in held if _is_even(gates))
        cut = [gates for gates in held if bool((gates < network.num_gates).any())][:2]
        factor = parameter.numel() / math.prod([len(gates) for gates in cut])
        a, b = ([table.stream(gates) for gates in cut] + [table.one, table.one])[:2]
        # Of a BatchNorm's two vectors one is counted, as the paper does.
        table.add(name, layers.get(path, norms.get(path, len(layers) - 1)), factor, a, b, 0, int(own == "bias"))
    for branch in {branch.operand: branch for branch in network.branches}.values():
        table.add_left(branch, layers[branch.layers[-1]], gate_of[branch.outputs])
    return table.streams(inputs, outputs)


def _is_even(gates: Tensor) -> bool:
    return gates.dim() == 1 or bool((gates == gates[:, :1]).all())


class _Table:
    """The rows of Streams as they are found."""

    def __init__(self, network):
        self.network, self.known, self.rows, self.pairs = network, {}, [], []
        self.one = self.stream(torch.tensor([network.num_gates]))
        self.site_number = {site: i for i, site in enumerate(network.gate_sites)}
        ends = torch.tensor(list(network.gate_sites.values())).cumsum(0).tolist()
        self.gates_of = [set(range(first, end)) for first, end in zip([0, *ends], ends, strict=False)]

    def stream(self, gates: Tensor) -> int:
        return self.known.setdefault(tuple(gates.flatten().tolist()), len(self.known))

    def add(self, name: str, layer: int, factor: float, rows: int, columns: int, positions: int, operations: int) -> None:
        """A tensor of parameters: of the layer at path `name`, or of this name."""
        own = set(next(gates for gates, number in self.known.items() if number == rows))
        for branch in self.network.branches:
            if name in branch.layers or name in branch.tensors:
                others = (self.site_number[site] for site in branch.sites)
                self.pairs += [(len(self.rows), site) for site in others if self.gates_of[site] != own]
        self.rows.append((layer, factor, rows, columns, positions, operations, 0))

    def add_left(self, branch, layer: int, gates: Tensor) -> None:
        """One number for each channel of what is left of a branch."""
        self.pairs += [(len(self.rows), self.site_number[site]) for site in branch.sites]
        self.rows.append((layer, 1, self.stream(gates), self.one, 0, 0, 1))

    def streams(self, inputs: list[int], outputs: list[int]) -> Streams:
        sums = [(number, gate) for gates, number in self.known.items() for gate in gates]
        columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*self.rows, strict=True)]
        layer, factor, rows, columns, positions, operations, is_left = columns
        sizes = [*self.network.gate_sites.values(), 1]
        return Streams(
            number=len(self.known),
            stream=torch.tensor([number for number, _ in sums]),
            gate=torch.tensor([gate for _, gate in sums]),
            layer=layer.long(),
            factor=factor,
            rows=rows.long(),
            columns=columns.long(),
            positions=positions,
            operations=operations,
            is_left=is_left.bool(),
            tensor=torch.tensor([tensor for tensor, _ in self.pairs], dtype=torch.long),
            site=torch.tensor([site for _, site in self.pairs], dtype=torch.long),
            sites=len(sizes),
            site_gate=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
            inputs=torch.tensor(inputs),
            outputs=torch.tensor(outputs),
        )
