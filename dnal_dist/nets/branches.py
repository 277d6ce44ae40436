"""Branches that a network works without: what a sum adds to a shortcut, or to other branches.

Where a gate site inside such a branch closes altogether, the rest of the branch sees zeros, and what it adds is one number for each
channel.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dnal_dist.nets.graph import Graph, Value, name_of
from dnal_dist.nets.rules import ELEMENTWISE, MOVES, SAME
from dnal_dist.nets.sites import Gating


class Branch(NamedTuple):
    """One operand of a sum."""

    sum: str
    """Name of the sum's node."""
    operand: str
    """Name of the node that it adds."""
    layers: tuple[str, ...]
    """Paths of the layers that only this branch needs, in forward order."""
    tensors: frozenset[str]
    """Names of the parameters and buffers that it reads."""
    sites: tuple[str, ...]
    """Gate sites inside it, in forward order, each of which may close as a whole."""
    within: tuple[str, ...]
    """All gate sites inside it, without those of the channels that it adds."""
    outputs: Tensor
    """Labels of the channels that it adds to."""
    needed: bool
    """Whether the sum has no other way than its branches, so that one of them must stay."""


class Nodes:
    """The nodes of a graph that depend on the images, each with those among them that it reads. What a node changes in place is,
    from there on, that node."""

    def __init__(self, graph: Graph):
        now: dict = {}
        self.reads: dict[torch.fx.Node, list[torch.fx.Node]] = {}
        for node in graph.nodes:
            operands = [now.get(a, a) for a in node.all_input_nodes]
            is_images = node.op == "placeholder" and graph.tensor_of(node) is None
            if is_images or any(a in self.reads for a in operands):
                self.reads[node] = [a for a in operands if a in self.reads]
            if node.op == "call_function" and name_of(node).endswith("_"):
                now |= {known: node for known, last in now.items() if last is now.get(node.args[0], node.args[0])}
                now[node.args[0]] = node
        self.calls: dict[str, set] = {}
        """The nodes of each convolution and Linear."""
        self.readers: dict[str, set] = {}
        """The nodes that read each parameter or buffer."""
        for node in self.reads:
            if name_of(node) in ("conv2d", "linear"):
                self.calls.setdefault(graph.where(node), set()).add(node)
            for name in filter(None, map(graph.tensor_of, node.all_input_nodes)):
                self.readers.setdefault(name, set()).add(node)
        self.users: dict[torch.fx.Node, list[torch.fx.Node]] = {node: [] for node in self.reads}
        self.before: dict[torch.fx.Node, int] = {}
        """The nodes that a node needs, itself among them, as the bits of a number."""
        for i, (node, operands) in enumerate(self.reads.items()):
            self.before[node] = 1 << i
            for operand in operands:
                self.users[operand].append(node)
                self.before[node] |= self.before[operand]

    def adds(self, node) -> bool:
        """Whether it is the sum of two feature maps of one shape."""
        if node.op != "call_function" or name_of(node).removesuffix("_") != "add" or len(self.reads[node]) != 2:
            return False
        first, second = (tuple(operand.meta["val"].shape) for operand in self.reads[node])
        return len(first) == 4 and first == second

    def operands(self, node) -> list:
        """What a sum of feature maps adds up, sums that only it reads taken apart. Nothing, if `node` is no sum or part of one."""
        if not self.adds(node) or (len(self.users[node]) == 1 and self.adds(self.users[node][0])):
            return []
        found, queue = [], [node]
        while queue:
            for operand in self.reads[queue.pop()]:
                inner = self.adds(operand) and len(self.users[operand]) == 1
                (queue if inner else found).append(operand)
        return sorted(set(found), key=lambda operand: self.before[operand].bit_length())

    def is_constant(self, graph: Graph, node, constant, is_empty: Callable[[Tensor], bool]) -> bool:
        """Whether a node gives one number for each channel, if the nodes `constant` do. is_empty: whether no channel of some labels
        is left."""
        value = graph.values.get(node)
        if not isinstance(value, Value) or self.adds(node) or any(s > 1 for d, s in enumerate(value.labels.shape) if d != 1):
            return False
        if is_empty(value.labels):
            return True
        others = [a for a in node.all_input_nodes if a not in self.reads]
        if not self.reads[node] or not all(a in constant for a in self.reads[node]) or any(a.op != "placeholder" for a in others):
            return False
        name, shape = name_of(node).removesuffix("_"), value.shape
        if name in ("conv2d", "linear"):
            return is_empty(graph.value(node.args[0]).labels) or name == "linear" or _is_pointwise(node)
        if any(math.prod(a.meta["val"].shape[-2:]) > 1 for a in others if len(shape) == 4 and a.meta["val"].dim() > 1):
            return False  # one number for each position
        if name in MOVES:
            return math.prod(shape[2:]) == 1 and math.prod(node.args[0].meta["val"].shape[2:]) == 1
        if name in ("mean", "adaptive_avg_pool2d"):
            return math.prod(shape[2:]) == 1
        return name in ELEMENTWISE or name in SAME or name == "batch_norm"


def _is_pointwise(node) -> bool:
    padding = node.args[4] if len(node.args) > 4 else 0
    return math.prod(node.args[1].meta["val"].shape[2:]) == 1 and not any(padding if isinstance(padding, list) else [padding])


def find(graph: Graph, gating: Gating) -> list[Branch]:
    """The branches of all sums."""
    nodes, found, sites = Nodes(graph), [], _Sites(graph, gating)
    order = list(nodes.reads)
    sums = {node: operands for node in order if len(operands := nodes.operands(node)) > 1}
    for node, operands in sums.items():
        branches = []
        for operand in operands:
            others = 0
            for other in operands:
                others |= nodes.before[other] if other is not operand else 0
            own = nodes.before[operand] & ~others
            inside = [n for i, n in enumerate(order) if own >> i & 1]
            # Another sum within it has branches of its own, and what is read elsewhere is needed there.
            if not any(n in sums for n in inside) and _is_closed(nodes, inside, operand):
                branches.append(_branch(graph, nodes, node, operand, inside, sites))
        branches = [branch for branch in branches if branch.sites]
        found += [branch._replace(needed=len(branches) == len(operands)) for branch in branches]
    return found


def _is_closed(nodes: Nodes, inside: list, operand) -> bool:
    members = set(inside)
    return operand in members and all(
        nodes.adds(user) if n is operand else user in members for n in inside for user in nodes.users[n]
    )


def _branch(graph: Graph, nodes: Nodes, node, operand, inside: list, sites: "_Sites") -> Branch:
    members = set(inside)
    # What is called or read elsewhere, too, stays.
    layers = dict.fromkeys(graph.where(n) for n in inside if name_of(n) in ("conv2d", "linear"))
    layers = tuple(path for path in layers if path in graph.layers and nodes.calls[path] <= members)
    tensors = {name for n in inside for a in n.all_input_nodes if (name := graph.tensor_of(a)) and nodes.readers[name] <= members}
    added, within, inner = graph.values[operand].labels.flatten(), [], []
    for site in sites.written_by(layers):
        gates = sites.gates[site]
        if not gates & sites.gating.of(added):
            within.append(site)
        constant: set = set()
        for n in inside:
            if nodes.is_constant(graph, n, constant, lambda labels, gates=gates: sites.gating.of(labels) <= gates):
                constant.add(n)
        if operand in constant:
            inner.append(site)
    return Branch(node.name, operand.name, layers, frozenset(tensors), tuple(inner), tuple(within), added, needed=False)


class _Sites:
    """Which layers write the gates of each site."""

    def __init__(self, graph: Graph, gating: Gating):
        self.gating, self.gates = gating, {}
        ends = itertools.accumulate(gating.sites.values())
        for (site, channels), end in zip(gating.sites.items(), ends, strict=True):
            self.gates[site] = frozenset(range(end - channels, end))
        site_of = [site for site, channels in gating.sites.items() for _ in range(channels)]
        self.of_layer = {path: gating.of(layer.outputs) for path, layer in graph.layers.items()}
        self.writers: dict[str, set[str]] = {site: set() for site in gating.sites}
        for path, gates in self.of_layer.items():
            for gate in gates - {gating.always}:
                self.writers[site_of[gate]].add(path)

    def written_by(self, layers: tuple[str, ...]) -> list[str]:
        """Sites, in forward order, that one of `layers` writes as a whole and no other layer writes to."""
        own = {site for site, gates in self.gates.items() if any(gates == self.of_layer[path] for path in layers)}
        return [site for site in self.gates if site in own and self.writers[site] <= set(layers)]
