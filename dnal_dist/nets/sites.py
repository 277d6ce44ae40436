"""Which gates decide on the channels of a graph."""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist.nets.gated import ConvBN
from dnal_dist.nets.graph import Graph


class Ungated(NamedTuple):
    """Output channels of a layer that stay, and why."""

    layer: str
    channels: int
    reason: str


class Gating:
    """The gates of a graph's labels. A label goes by its number: that of its gate, `always`, `never`, or that of a set of gates of
    which one must be open."""

    def __init__(self, graph: Graph):
        classes = graph.classes
        self.graph = graph
        roots = [classes.find(label) for label in range(len(classes.parents))]
        self.sites, gates = _sites(graph, roots)
        self.always, self.never = len(gates), len(gates) + 1
        written = {root for label, root in enumerate(roots) if label not in classes.padding}
        zeros = {roots[label] for label in classes.padding} - written - classes.reasons.keys()
        self._sets: dict[tuple[int, ...], int] = {}
        single = [gates.get(root, self.never if root in zeros else self.always) for root in roots]
        self.of_label, self.nearest = list(single), list(single)
        for label, own in classes.sums.items():
            self.of_label[label] = self._number(single[member] for member in own.members)
            self.nearest[label] = self._number(single[member] for member in own.nearest)
        self.of_label, self.nearest = torch.tensor(self.of_label), torch.tensor(self.nearest)
        """The number of each label; and likewise with the nearest branches of sums alone."""
        self.members = [{gate} for gate in range(len(gates))] + [{self.always}, set(), *map(set, self._sets)]
        """The gates of each number, with `always` among them."""
        pairs = [(i, gate) for i, own in enumerate(self._sets) for gate in own]
        self._pairs = {torch.device("cpu"): torch.tensor(pairs, dtype=torch.long).view(-1, 2).T}

    def _number(self, numbers) -> int:
        found = set(numbers) - {self.never}
        if self.always in found or not found:
            return self.always if found else self.never
        return found.pop() if len(found) == 1 else self._sets.setdefault(tuple(sorted(found)), self.never + 1 + len(self._sets))

    def values(self, gates: Tensor) -> Tensor:
        """By number, the chance that a channel is there if each gate, (N,), is the chance that its own stays."""
        found = [gates, gates.new_ones(1), gates.new_zeros(1)]
        if self._sets:
            if gates.device not in self._pairs:
                self._pairs[gates.device] = self._pairs[torch.device("cpu")].to(gates.device)
            sets, members = self._pairs[gates.device]
            found.append(1 - gates.new_ones(len(self._sets)).scatter_reduce(0, sets, (1 - gates)[members], "prod"))
        return torch.cat(found)

    def __deepcopy__(self, _) -> "Gating":
        return self  # nothing in it changes

    def stays(self, keep: Tensor) -> Tensor:
        """bool (labels,): whether a channel is there under `keep`, bool (N,)."""
        return (self.values(keep.cpu().float()) > 0)[self.of_label]

    def of(self, labels: Tensor | Collection[int]) -> set[int]:
        """All gates of some labels, with `always` among them."""
        numbers = self.of_label[labels if isinstance(labels, Tensor) else list(labels)].unique().tolist()
        return set().union(*(self.members[number] for number in numbers))

    def ranks(self, stays: Tensor) -> Tensor:
        """By label of a free sum, (labels,), the first of what it adds up that stays: in this order a stream that gains channels
        keeps those before in front."""
        found, stays = torch.full((len(self.of_label),), -1), stays.tolist()
        for label, own in self.graph.classes.sums.items():
            if self.of_label[label] != self.always:
                found[label] = min((member for member in own.members if stays[member]), default=0)
        return found

    def ungated(self) -> list[Ungated]:
        found: dict[tuple[str, str], int] = {}
        for layer in self.graph.layers.values():
            for label in layer.outputs[self.of_label[layer.outputs] == self.always].tolist():
                key = layer.path, self.graph.classes.reason(label) or "nothing reads it that mixes channels"
                found[key] = found.get(key, 0) + 1
        return [Ungated(path, count, reason) for (path, reason), count in found.items()]


def freeze(graph: Graph) -> None:
    """No gates for what the network shall have none for."""
    written: set[int] = set()
    for path, outputs in graph.points.items():
        if graph.gated.has(path):
            written.update(map(graph.classes.find, outputs.tolist()))
    for path, outputs in graph.points.items():
        reason = "it is in `ignore`" if graph.gated.only is None else "the network gives it no gates"
        if not graph.gated.has(path):
            # Of `ignore` all; else what no other module with gates writes, too.
            others = [x for x in outputs.tolist() if graph.gated.only is None or graph.classes.find(x) not in written]
            graph.classes.freeze(torch.tensor(others, dtype=torch.long), reason)


def _sites(graph: Graph, roots: list[int]) -> tuple[dict[str, int], dict[int, int]]:
    """Sites with their number of gates, and for each class that may close its gate.

    A site is the classes that the same modules write and that the same tensors consist of, in the order of their first channel; its
    name is the first module's path.
    """
    writers: dict[int, list[str]] = {}
    for path, labels in graph.points.items():
        if path in graph.needed:
            for root in dict.fromkeys(roots[label] for label in labels.tolist()):
                if root not in graph.classes.reasons:
                    writers.setdefault(root, []).append(path)
    member: dict[int, list[int]] = {}
    parts = (tuple(roots[one] for label in part for one in graph.classes.members(label)) for part in graph.parts)
    for number, part in enumerate(dict.fromkeys(tuple(dict.fromkeys(part)) for part in parts)):
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
    return names, {root: gate for gate, root in enumerate(itertools.chain(*sites.values()))}
