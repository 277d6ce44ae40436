"""Whether the channels of free sums may stand in another order in the compact network."""

import torch
from torch import Tensor

from dnal_dist.nets.graph import Graph, Value, name_of
from dnal_dist.nets.sites import Gating


def may_change(graph: Graph, gating: Gating) -> bool:
    """Whether nothing depends on the order of a free sum's channels, which only sums, layers and what sees each by itself read."""
    sums = torch.tensor(sorted(graph.classes.sums), dtype=torch.long)
    streams = {_channels(graph.values[node], gating) for node in graph.free_sums}
    for node in graph.nodes:
        read = [value for a in node.all_input_nodes if isinstance(value := graph.values.get(a), Value)]
        if node in graph.free_sums or not any(bool(torch.isin(value.labels, sums).any()) for value in read):
            continue
        if name_of(node) in ("conv2d", "linear"):
            if graph.layers[graph.where(node)].groups > 1:
                return False
            read = read[:1]
        elif node in graph.values:
            read.append(graph.values[node])
        found = {_channels(value, gating) for value in read if isinstance(value, Value) and value.labels.numel() > 1}
        if len(found) > 1 or not found <= streams:
            return False
    return True


def _channels(value: Value, gating: Gating) -> tuple[int, ...] | None:
    """The labels of a feature map's channels or of its flattened features, without repetition and zeros around them; None if they
    change along other dimensions."""
    labels: Tensor | None = value.along(1) if len(value.shape) > 1 else None
    if labels is None:
        return None
    return tuple(labels[gating.of_label[labels] != gating.never].unique_consecutive().tolist())
