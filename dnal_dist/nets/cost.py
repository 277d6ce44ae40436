"""MACs and parameters of a network, under a mask or under soft gates."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from dnal_dist.nets.gated import Feed, GatedNetwork, Layer
from dnal_dist.nets.masks import alive_inputs, all_open, channels_of, is_depthwise, kernel_area, liveness, useful
from dnal_dist.nets.streams import costs as stream_costs


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
    if rule == "paper":
        return _paper_count(net, image_size, keep)
    # Whole numbers up to 2^53 are exact in float64.
    macs, params = expected(net, image_size, useful(net, keep).double())
    return Cost(round(float(macs)), round(float(params)))


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
    macs, params, _, _ = _layer_costs(net, image_size, gates)
    return Expected(macs.sum(), params.sum())


def _layer_costs(net: GatedNetwork, image_size: int, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected MACs, parameters, live input and live output channels of each layer, (L,) each."""
    if (streams := net.streams(image_size)) is not None:
        return stream_costs(streams, gates)
    t = _terms(net, image_size, gates.device)
    # One more gate, always open, stands for outputs that nothing decides on.
    gates = torch.cat([gates, gates.new_ones(1)])
    closed = 1 - gates
    kept = gates.new_zeros(t.sites).index_add(0, t.gate_site, gates)
    some = 1 - gates.new_ones(t.sites).scatter_reduce(0, t.gate_site, closed, "prod")
    alive = 1 - gates.new_ones(len(t.channel_stream)).scatter_reduce(0, t.feed_channel, closed[t.feed_gate], "prod")
    streams = gates.new_zeros(t.streams).index_add(0, t.channel_stream, alive)
    number = {name: value.to(gates.dtype) for name, value in t.numbers.items()}
    inputs = torch.where(t.is_fed, streams[t.layer_stream], number["inputs"])
    outputs = torch.where(t.is_decided, kept[t.layer_site], number["outputs"])
    # Whether the other sites of the layer's branch have an open channel.
    works = gates.new_ones(len(inputs)).scatter_reduce(0, t.branch_layer, some[t.branch_site], "prod")
    weights = number["area"] * inputs * outputs * works
    params = weights + number["vectors"] * outputs * works + number["last"] * outputs * (1 - works)
    return number["positions"] * weights, params, inputs, outputs


class _Terms(NamedTuple):
    """A network's layers as index tensors, so that the cost takes a few vector operations, however many layers there are."""

    sites: int
    gate_site: Tensor
    """Site of each gate; the last gate, always open, has a site of its own."""
    streams: int
    channel_stream: Tensor
    """A stream is what some layers read together; this is the stream of each of all streams' channels."""
    feed_channel: Tensor
    feed_gate: Tensor
    """Pairs: gate `feed_gate` lets something into channel `feed_channel`."""
    layer_stream: Tensor
    is_fed: Tensor
    layer_site: Tensor
    is_decided: Tensor
    branch_layer: Tensor
    branch_site: Tensor
    """Pairs: layer `branch_layer` computes something that is read only if site `branch_site` has an open channel."""
    numbers: dict[str, Tensor]


_KNOWN: WeakKeyDictionary[GatedNetwork, dict] = WeakKeyDictionary()


def _terms(net: GatedNetwork, image_size: int, device: torch.device) -> _Terms:
    known = _KNOWN.setdefault(net, {})
    if (image_size, device) not in known:
        terms = _make_terms(net, net.layers(image_size))
        moved = {k: v.to(device) for k, v in terms._asdict().items() if isinstance(v, Tensor)}
        known[image_size, device] = terms._replace(numbers={k: v.to(device) for k, v in terms.numbers.items()}, **moved)
    return known[image_size, device]


def _make_terms(net: GatedNetwork, layers: list[Layer]) -> _Terms:
    site_number = {site: i for i, site in enumerate(net.gate_sites)}
    sizes = [*net.gate_sites.values(), 1]
    first_gate = dict(zip(net.gate_sites, np.cumsum([0, *sizes[:-2]]).tolist(), strict=True))
    outputs = {layer.path: channels_of(net.get_submodule(layer.path))[1] for layer in layers}
    written_by = {layer.path: layer.site for layer in layers}
    stream_number: dict[tuple[Feed, ...], int] = {}
    channel_stream, feed_channel, feed_gate = [], [], []
    for layer in layers:
        if not layer.feeds or layer.feeds in stream_number:
            continue
        base = len(channel_stream)
        width = max(feed.offset + outputs[feed.writer] for feed in layer.feeds)
        channel_stream += [len(stream_number)] * width
        stream_number[layer.feeds] = len(stream_number)
        for feed in layer.feeds:
            site, channels = written_by[feed.writer], range(outputs[feed.writer])
            feed_channel += [base + feed.offset + c for c in channels]
            feed_gate += [net.num_gates if site is None else first_gate[site] + c for c in channels]
    pairs = [(i, site_number[site]) for i, layer in enumerate(layers) for site in layer.branch if site != layer.site]
    return _Terms(
        sites=len(sizes),
        gate_site=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        streams=len(stream_number) or 1,
        channel_stream=torch.tensor(channel_stream, dtype=torch.long),
        feed_channel=torch.tensor(feed_channel, dtype=torch.long),
        feed_gate=torch.tensor(feed_gate, dtype=torch.long),
        layer_stream=torch.tensor([stream_number.get(layer.feeds, 0) for layer in layers]),
        # A depthwise convolution has one input for each output, whatever feeds it.
        is_fed=torch.tensor([bool(layer.feeds) and not is_depthwise(net.get_submodule(layer.path)) for layer in layers]),
        layer_site=torch.tensor([site_number.get(layer.site, 0) for layer in layers]),
        is_decided=torch.tensor([layer.site is not None for layer in layers]),
        branch_layer=torch.tensor([i for i, _ in pairs], dtype=torch.long),
        branch_site=torch.tensor([site for _, site in pairs], dtype=torch.long),
        numbers=_numbers(net, layers),
    )


def _numbers(net: GatedNetwork, layers: list[Layer]) -> dict[str, Tensor]:
    """What is fixed of each layer, (L,) each, float64."""
    modules = [net.get_submodule(layer.path) for layer in layers]
    columns = {
        "inputs": [1 if is_depthwise(m) else channels_of(m)[0] for m in modules],
        "outputs": [channels_of(m)[1] for m in modules],
        # Weights for each pair of an input and an output channel.
        "area": [kernel_area(m) * layer.spread for m, layer in zip(modules, layers, strict=True)],
        "positions": [layer.positions for layer in layers],
        # Parameters for each output channel beside the weights.
        "vectors": [(m.bias is not None) + 2 * (layer.norm is not None) for m, layer in zip(modules, layers, strict=True)],
        # Of a branch that lost an inner site, one constant for each output of its last layer stays.
        "last": [bool(layer.branch) and layer.branch[-1] == layer.site for layer in layers],
    }
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


def _paper_count(net: GatedNetwork, image_size: int, keep: Tensor) -> Cost:
    if (streams := net.streams(image_size)) is not None:
        macs, params, _, _ = stream_costs(streams._replace(positions=streams.operations), keep.double())
        return Cost(round(float(macs.sum())), round(float(params.sum())))
    layers = net.layers(image_size)
    # Outputs close only where a layer has gates of its own.
    live = liveness(net, [layer if layer.gated else layer._replace(site=None) for layer in layers], keep)
    flops = params = 0
    for layer in layers:
        module = net.get_submodule(layer.path)
        inputs, _ = channels_of(module)
        if not layer.plain:
            inputs = int(alive_inputs(layer, tuple(feed for feed in layer.feeds if not feed.around), inputs, live).sum())
        outputs = int(live[layer.path].outputs.sum())
        weights = kernel_area(module) * outputs * (1 if is_depthwise(module) else inputs)
        vectors = outputs * (module.bias is not None)
        if isinstance(module, nn.Linear):
            flops, params = flops + weights + outputs, params + weights + outputs
        else:
            norm = 0 if layer.plain else outputs
            flops += layer.positions * weights + norm + vectors
            params += weights + 2 * norm + vectors
    return Cost(flops, params)


def by_layer(net: GatedNetwork, image_size: int, keep: Tensor | None = None) -> list[dict]:
    """One row for each layer, in forward order: path, site, [kept, full] channels, MACs and parameters (exact rule)."""
    keep = all_open(net) if keep is None else keep
    columns = [c.round().long().tolist() for c in _layer_costs(net, image_size, useful(net, keep).double())]
    rows = []
    for layer, macs, params, inputs, outputs in zip(net.layers(image_size), *columns, strict=True):
        module = net.get_submodule(layer.path)
        full_in, full_out = channels_of(module)
        if not macs:
            # Nothing is left of it, or the constant that its branch came to.
            inputs, outputs = 0, params
        rows.append(
            {
                "layer": layer.path,
                "site": layer.site if layer.gated or net.streams(image_size) is not None else None,
                "inputs": [outputs if is_depthwise(module) else inputs * layer.spread, full_in],
                "outputs": [outputs, full_out],
                "macs": macs,
                "params": params,
            }
        )
    return rows
