"""MACs and parameters of a network, under a mask or under soft gates."""

from typing import NamedTuple

from torch import Tensor

from dnal_dist.nets.gate import GatedNetwork
from dnal_dist.nets.masks import all_open, useful
from dnal_dist.nets.streams import costs


class Cost(NamedTuple):
    macs: int
    params: int


class Expected(NamedTuple):
    """Scalars, differentiable in the gates."""

    macs: Tensor
    params: Tensor


def count(net: GatedNetwork, image_size: int, keep: Tensor | None = None, rule: str = "exact") -> Cost:
    """Cost of `net` for one image of image_size x image_size when only the channels of `keep`, bool (N,), stay.

    exact: MACs of Conv2d and Linear; all parameters. Residual-aware: a channel that a shortcut still feeds still costs.
    It is the cost of the compact network. paper: the rule behind the tables of arXiv 2103.02126, which adds one operation for each
    BatchNorm and bias output, counts no BatchNorm of Linear layers, takes an input channel for closed when the layer right before
    closed it, and keeps all outputs of a convolution without gates.
    """
    if rule not in ("exact", "paper"):
        raise ValueError(f"unknown rule {rule!r}: expected 'exact' or 'paper'")
    keep = all_open(net) if keep is None else keep
    # Whole numbers up to 2^53 are exact in float64.
    kept = (useful(net, keep) if rule == "exact" else keep).double()
    macs, params, _, _ = costs(net.streams(image_size, rule, kept.device), net.gating, kept)
    return Cost(round(float(macs.sum())), round(float(params.sum())))


def both_rules(net: GatedNetwork, image_size: int, keep: Tensor | None = None) -> dict[str, dict[str, int]]:
    """The cost by both rules, as a run's records hold it."""
    return {rule: count(net, image_size, keep, rule)._asdict() for rule in ("exact", "paper")}


def of_layers(net: GatedNetwork, image_size: int, keep: Tensor) -> dict[str, dict[str, dict[str, int]]]:
    """The exact cost of each layer by its path, of the full network and with the channels of `keep`, bool (N,), as a run's records
    hold it."""
    tables = {"full": by_layer(net, image_size), "compact": by_layer(net, image_size, keep)}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for which, rows in tables.items():
        for row in rows:
            found.setdefault(row["layer"], {})[which] = {key: row[key] for key in Cost._fields}
    return found


def expected(net: GatedNetwork, image_size: int, gates: Tensor) -> Expected:
    """Exact MACs and parameters if each gate, (N,) floating, is the probability that its channel stays.

    Equals `count` when every gate is 0 or 1. A channel of a stream that several layers write to stays unless all of them close it;
    a branch costs nothing unless each of its sites has an open channel.
    """
    macs, params, _, _ = costs(net.streams(image_size, "exact", gates.device), net.gating, gates)
    return Expected(macs.sum(), params.sum())


def by_layer(net: GatedNetwork, image_size: int, keep: Tensor | None = None) -> list[dict]:
    """One row for each layer, in forward order: path, the first site that closes its channels (None: they stay), [kept, full]
    channels, MACs and parameters (exact rule)."""
    keep = all_open(net) if keep is None else keep
    found = costs(net.streams(image_size), net.gating, useful(net, keep).double())
    rows = []
    for layer, *numbers in zip(net.graph.layers.values(), *(c.round().long().tolist() for c in found), strict=True):
        macs, params, inputs, outputs = numbers
        if not macs:
            # Nothing is left of it, or the constant that its branch came to.
            inputs, outputs = 0, params
        gates = net.gating.of(layer.outputs) - {net.gating.always}
        is_depthwise = layer.groups == len(layer.inputs) > 1
        rows.append(
            {
                "layer": layer.path,
                "site": net.site_at(min(gates)) if gates else None,
                "inputs": [outputs if is_depthwise else inputs, len(layer.inputs)],
                "outputs": [outputs, len(layer.outputs)],
                "macs": macs,
                "params": params,
            }
        )
    return rows
