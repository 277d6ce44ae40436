"""What layers do to channels: the rules of those with parameters."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets.graph import Graph, Value, Weighted


def argument_of(node, name: str, default=None):
    """An argument by its name in the operation's schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name and i < len(node.args):
            return node.args[i]
    return default


def conv(graph: Graph, node) -> Value:
    x, path = graph.value(node.args[0]), graph.where(node)
    groups = argument_of(node, "groups", 1)
    weight = graph.tensor_of(node.args[1])
    if weight is None and node.args[1] in graph.values:
        return graph.unknown(node, f"the weight of {path} depends on the image")
    if not issubclass(graph.kinds[path], nn.Conv2d) or x is None or (inputs := x.along(1)) is None:
        return graph.unknown(node, f"{path or 'the network'} convolves what no nn.Conv2d of it holds")
    size_out, per_group, *_ = node.args[1].meta["val"].shape
    outputs = graph.points[path] if path in graph.points else graph.classes.new(size_out)
    whole = False
    if groups == 1:
        graph.read(inputs, x, f"{path} reads it where a closed channel is not zero")
    else:
        per_out = size_out // groups
        by_group, out_by_group = inputs.view(groups, per_group), outputs.view(groups, per_out)
        whole = per_group == 1 or groups >= per_group
        if _chooses(graph, node, x, per_group, per_out):
            graph.read(inputs, x, f"{path} reads it where a closed channel is not zero")
        elif whole:
            graph.classes.unite(by_group, out_by_group[:, :1])
            graph.classes.unite(out_by_group, out_by_group[:, :1])
        else:
            graph.classes.unite(by_group, by_group[:1])
            graph.classes.unite(out_by_group, out_by_group[:1])
            graph.read(inputs, x, f"{path} reads it where a closed channel is not zero")
    positions = math.prod(node.meta["val"].shape[2:])
    if path in graph.layers:
        before = graph.layers[path]
        graph.classes.unite(before.inputs, inputs)
        positions += before.positions
    graph.layers[path] = Weighted(path, inputs, outputs, groups, whole, positions, weight is None)
    graph.points[path] = outputs
    if weight is None:
        graph.bake(node.args[1])
    else:
        graph.hold(weight, {0: outputs} if groups > 1 and whole else {0: outputs, 1: inputs[:per_group]})
    if (bias := graph.tensor_of(argument_of(node, "bias"))) is not None:
        graph.hold(bias, {0: outputs})
    return graph.out(node, outputs.view(1, -1, 1, 1), {path})


def _chooses(graph: Graph, node, x: Value, per_group: int, per_out: int) -> bool:
    """Whether a depthwise convolution closes channels of its own: what it reads stays, and is read by others, too."""
    stays = x.gates is not None and not any(graph.gated.has(path) for path in x.gates)
    return stays and per_group == per_out == 1 and len(node.args[0].users) > 1


def linear(graph: Graph, node) -> Value:
    x, path, weight = graph.value(node.args[0]), graph.where(node), graph.tensor_of(node.args[1])
    if weight is None and node.args[1] in graph.values:
        return graph.unknown(node, f"the weight of {path} depends on the image")
    if not issubclass(graph.kinds[path], nn.Linear) or x is None or (inputs := x.along(-1)) is None:
        return graph.unknown(node, f"{path or 'the network'} multiplies what no nn.Linear of it holds")
    outputs = graph.points[path] if path in graph.points else graph.classes.new(node.args[1].meta["val"].shape[0])
    graph.read(inputs, x, f"{path} reads it where a closed channel is not zero")
    positions = math.prod(node.meta["val"].shape[1:-1])
    if path in graph.layers:
        graph.classes.unite(graph.layers[path].inputs, inputs)
        positions += graph.layers[path].positions
    graph.layers[path] = Weighted(path, inputs, outputs, 1, False, positions, weight is None)
    graph.points[path] = outputs
    if weight is None:
        graph.bake(node.args[1])
    else:
        graph.hold(weight, {0: outputs, 1: inputs})
    if (bias := graph.tensor_of(argument_of(node, "bias"))) is not None:
        graph.hold(bias, {0: outputs})
    shape = node.meta["val"].shape
    return graph.out(node, outputs.view(*(1,) * (len(shape) - 1), -1), {path})


def batch_norm(graph: Graph, node) -> Value:
    x, path = graph.value(node.args[0]), graph.where(node)
    tensors = [name for argument in node.args[1:5] if (name := graph.tensor_of(argument)) is not None]
    if x is None or (labels := x.along(1)) is None or not issubclass(graph.kinds[path], _BatchNorm):
        return graph.unknown(node, f"{path or 'the network'} normalises what no BatchNorm of it holds")
    for name in tensors:
        graph.hold(name, {0: labels})
    if (before := graph.where(node.args[0])) in graph.layers:
        graph.norms[before] = path
    if path in graph.points:
        graph.classes.unite(graph.points[path], labels)
    graph.points[path] = labels
    return graph.out(node, labels.view(1, -1, *(1,) * (len(x.shape) - 2)), {path})


def prelu(graph: Graph, node) -> Value:
    x, slope = graph.value(node.args[0]), graph.tensor_of(node.args[1])
    labels = x.along(1)
    if slope is None or labels is None:
        return graph.unknown(node, "prelu without a parameter of the network")
    if math.prod(node.args[1].meta["val"].shape) > 1:
        graph.hold(slope, {0: labels})
    return graph.out(node, x.labels, x.gates)
