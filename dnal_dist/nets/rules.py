"""What each operation of an exported graph does to channels: one rule for each kind. An operation without a rule leaves what it
reads whole."""

import torch

from dnal_dist.nets import layer_rules
from dnal_dist.nets.classes import OPEN
from dnal_dist.nets.graph import Graph, Rule, Value, name_of, squeezed


def _elementwise(graph: Graph, node) -> Value:
    """Each element from the same element of each operand."""
    shape = tuple(node.meta["val"].shape)
    operands = [value for a in node.args if (value := graph.value(a)) is not None]
    if graph.gated.streams_are_free and _is_sum_of_maps(graph, node, operands):
        first, second = (graph.depths[a] for a in node.all_input_nodes)
        labels = graph.classes.add(*(v.labels for v in operands), (first > second) - (first < second))
        graph.free_sums[node] = tuple(labels.unique().tolist())
        return graph.out(node, labels, _zero(node, [v.gates for v in operands]))
    padded = [v.labels.reshape((1,) * (len(shape) - len(v.shape)) + tuple(v.labels.shape)) for v in operands]
    sizes = [(*(1,) * (len(shape) - len(v.shape)), *v.shape) for v in operands]
    varies = [any(p.shape[d] > 1 for p in padded) for d in range(len(shape))]
    labels, gates = None, []
    for value, own, size in zip(operands, padded, sizes, strict=True):
        spread = any(varies[d] and size[d] == 1 for d in range(len(shape)))
        if spread:
            # One value for many channels: it belongs to none of them.
            rows = own.unique()
            if any(varies[d] and own.shape[d] > 1 for d in range(len(shape))):
                spread = False  # it varies along another dimension, as one row for many
            elif rows.numel() > 1 or int(rows[0]) != OPEN:
                graph.classes.freeze(rows, f"one channel meets many in {graph.where(node) or 'the network'}")
        if not spread:
            if labels is not None:
                graph.classes.unite(labels, own)
                labels = torch.broadcast_tensors(labels, own)[0]
            else:
                labels = own
        gates.append(None if spread else value.gates)
    labels = torch.zeros((1,) * len(shape), dtype=torch.long) if labels is None else labels
    return graph.out(node, labels, _zero(node, gates))


def _is_sum_of_maps(graph: Graph, node, operands: list[Value]) -> bool:
    """Whether it adds two feature maps whose channels may differ."""
    return (
        name_of(node) in ("add", "add_")
        and node.kwargs.get("alpha", 1) == 1
        and len(operands) == len(node.all_input_nodes) == 2
        and all(len(v.shape) == 4 and v.shape == operands[0].shape and v.along(1) is not None for v in operands)
        and all(graph.tensor_of(a) is None and v.gates is not None for a, v in zip(node.all_input_nodes, operands, strict=True))
    )


def _zero(node, gates: list[frozenset | None]) -> frozenset | None:
    """Which gates make an elementwise result zero, from those that make its operands zero."""
    name = name_of(node).rstrip("_")
    if name == "mul" and len(gates) == 2:
        return gates[0] if gates[0] is not None else gates[1]
    if name == "div":
        return gates[0] if gates and isinstance(node.args[0], torch.fx.Node) else None
    if all(g is None for g in gates):
        return None
    found = iter(gates)
    # Whatever is not zero may have any value.
    others = torch.tensor([-2.3, -0.4, 0.7, 1.9])

    def stand_in(argument):
        if not isinstance(argument, torch.fx.Node):
            return argument
        return torch.zeros(4) if next(found) is not None else others

    try:
        zero = not bool(node.target(*(stand_in(a) for a in node.args), **node.kwargs).float().any())
    except Exception:
        zero = False
    if not zero:
        return None
    return frozenset().union(*(g for g in gates if g is not None))


def _pool(graph: Graph, node) -> Value | list[Value]:
    """Neighbouring positions of each channel."""
    x = graph.value(node.args[0])
    spatial = max(len(x.shape) - 2, 1)
    if any(size > 1 for size in x.labels.shape[-spatial:]):
        return graph.unknown(node, f"{name_of(node)} mixes channels in {graph.where(node) or 'the network'}")
    found = node.meta["val"]
    if isinstance(found, list | tuple):
        return [Value(x.labels, tuple(t.shape), x.gates) for t in found]
    return Value(x.labels, tuple(found.shape), x.gates)


def _reduce(graph: Graph, node) -> Value:
    x = graph.value(node.args[0])
    dims = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], list | tuple | int) else list(range(len(x.shape)))
    dims = [d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)]
    labels = x.labels
    for d in dims:
        if labels.shape[d] > 1:
            if not any(size > 1 for other, size in enumerate(labels.shape) if other not in dims) or name_of(node) not in (
                "sum",
                "mean",
            ):
                return graph.unknown(node, f"{name_of(node)} is taken over channels in {graph.where(node) or 'the network'}")
            if name_of(node) == "mean":
                graph.classes.freeze(labels, f"a mean is taken over channels in {graph.where(node) or 'the network'}")
            # A sum of groups: what is added up stays or goes together.
            graph.classes.unite(labels, labels.narrow(d, 0, 1))
            labels = labels.narrow(d, 0, 1)
    keepdim = len(node.meta["val"].shape) == len(x.shape)
    if not keepdim:
        labels = labels[tuple(0 if d in dims else slice(None) for d in range(len(x.shape)))]
    preserves = name_of(node) in ("sum", "mean", "amax", "amin", "var", "std")
    return graph.out(node, labels, x.gates if preserves else None)


def _softmax(graph: Graph, node) -> Value:
    x = graph.value(node.args[0])
    d = node.args[1] % len(x.shape)
    if x.labels.shape[d] > 1:
        if not any(size > 1 for other, size in enumerate(x.labels.shape) if other != d):
            return graph.unknown(node, f"a softmax is taken over channels in {graph.where(node) or 'the network'}")
        graph.classes.unite(x.labels, x.labels.narrow(d, 0, 1))
    return graph.out(node, x.labels, None)


def _move(graph: Graph, node) -> Value | list[Value]:
    """Data is moved: labels move with it."""
    values = [graph.value(a) for a in node.all_input_nodes]
    if any(v is None for v in values):
        return graph.unknown(node, f"{name_of(node)} is of a kind without a rule")

    def labels_of(argument):
        return graph.value(argument).full if isinstance(argument, torch.fx.Node) else argument

    name = name_of(node)
    if name in ("view", "_unsafe_view", "reshape"):
        moved = labels_of(node.args[0]).reshape(node.args[1])
    else:
        moved = node.target(*torch.fx.map_arg(node.args, labels_of), **torch.fx.map_arg(node.kwargs, labels_of))
    gates = None if any(v.gates is None for v in values) else frozenset().union(*(v.gates for v in values))
    if isinstance(moved, list | tuple):
        return [Value(squeezed(m), tuple(m.shape), gates) for m in moved]
    found = Value(squeezed(moved), tuple(moved.shape), gates)
    if name in ("view", "_unsafe_view", "reshape", "unflatten"):
        _even(graph, values[0], found)
    if name == "channel_shuffle":
        rows = values[0].full[0].flatten(1)[:, 0].view(node.args[1], -1)
        graph.classes.unite(rows, rows[:1])
    return found


def _even(graph: Graph, before: Value, after: Value) -> None:
    """A dimension that falls into several: each row of it must keep as many channels."""
    vary = [d for d, size in enumerate(after.labels.shape) if size > 1]
    if len(vary) > 1 and len([s for s in before.labels.shape if s > 1]) < len(vary):
        for d in vary[:-1]:
            graph.classes.unite(after.labels, after.labels.narrow(d, 0, 1))


def _cat(graph: Graph, node) -> Value:
    values = [graph.value(a) for a in node.args[0]]
    if any(v is None for v in values):
        return graph.unknown(node, f"{name_of(node)} is of a kind without a rule")
    if any(v.gates is not None for v in values):
        for value in values:
            if value.gates is None:
                graph.classes.freeze(
                    value.labels, f"a closed channel of it is not zero where it is concatenated in {graph.where(node)}"
                )
        gates = frozenset().union(*(v.gates for v in values if v.gates is not None))
    else:
        gates = None
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(values[0].shape)
    others = [max(v.labels.shape[d] for v in values) for d in range(len(values[0].shape))]
    parts = [
        v.labels.expand(*(v.shape[d] if d == dim else (others[d] if v.labels.shape[d] == 1 else -1) for d in range(len(others))))
        for v in values
    ]
    return graph.out(node, torch.cat(parts, dim), gates)


def _pad(graph: Graph, node) -> Value:
    """Zeros around; around channels, too."""
    x, pads = graph.value(node.args[0]), node.args[1]
    mode = layer_rules.argument_of(node, "mode", "constant")
    value = layer_rules.argument_of(node, "value", 0)
    labels, last = x.labels, len(x.shape) - 1
    for i in range(0, len(pads), 2):
        d = last - i // 2
        if labels.shape[d] > 1 and (pads[i] or pads[i + 1]):
            if mode != "constant":
                return graph.unknown(node, f"{name_of(node)} is of a kind without a rule")
            ends = [graph.classes.new(n).view(*(-1 if e == d else 1 for e in range(last + 1))) for n in pads[i : i + 2]]
            if graph.gated.streams_are_free and not value:
                graph.classes.padding.update(torch.cat([e.flatten() for e in ends]).tolist())
            other = [1 if e == d else s for e, s in enumerate(labels.shape)]
            ends = [e.expand(*(e.shape[d] if k == d else other[k] for k in range(last + 1))) for e in ends]
            labels = torch.cat([ends[0], labels, ends[1]], d)
    return graph.out(node, labels, x.gates if not value else None)


def _getitem(graph: Graph, node) -> Value:
    found = graph.value(node.args[0])
    return found[node.args[1]] if isinstance(found, list) else graph.unknown(node, "an item of what has no rule")


def _made(graph: Graph, node) -> Value:
    """A tensor that is made in forward, from nothing."""
    shape = tuple(node.meta["val"].shape)
    return Value(torch.zeros((1,) * len(shape), dtype=torch.long), shape, None)


def _same(graph: Graph, node) -> Value:
    return graph.value(node.args[0])


ELEMENTWISE = (
    *("relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "mish", "tanh", "leaky_relu", "elu", "celu", "selu", "abs", "neg"),
    *(
        "sqrt",
        "clamp",
        "clamp_min",
        "clamp_max",
        "sign",
        "sin",
        "square",
        "pow",
        "softshrink",
        "hardshrink",
        "sigmoid",
        "exp",
        "erf",
    ),
    *(
        "hardsigmoid",
        "softplus",
        "reciprocal",
        "rsqrt",
        "log",
        "log_sigmoid",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "maximum",
        "minimum",
    ),
)
POOLS = (
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices", "lp_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d"),
)
MOVES = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "split", "split_with_sizes", "chunk", "slice", "select"),
    *(
        "expand",
        "expand_as",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "unbind",
        "stack",
        "narrow",
        "movedim",
        "swapaxes",
        "repeat",
    ),
    *("flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)
SAME = ("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy")
MADE = ("full", "zeros", "ones", "arange", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "scalar_tensor")

RULES: dict[str, Rule] = {
    **{
        "conv2d": layer_rules.conv,
        "linear": layer_rules.linear,
        "batch_norm": layer_rules.batch_norm,
        "cat": _cat,
        "concat": _cat,
        "pad": _pad,
    },
    **{"constant_pad_nd": _pad, "getitem": _getitem, "prelu": layer_rules.prelu, "softmax": _softmax},
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), _reduce),
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(MADE, _made),
}
