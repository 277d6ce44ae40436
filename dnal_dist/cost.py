"""What a network costs: multiply-adds for one picture and parameters, for any choice of channels kept.

python -m dnal_dist.cost recipes/proxyless.yaml          the full network of a recipe, layer by layer
python -m dnal_dist.cost runs/digits                     what a run kept of it
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe, results
from dnal_dist.common import errors
from dnal_dist.nets import Feed, GatedNetwork, Layer


class Cost(NamedTuple):
    macs: int
    params: int


class Expected(NamedTuple):
    """Scalars, differentiable in the gates."""

    macs: Tensor
    params: Tensor


class Live(NamedTuple):
    """Channels of one layer that do something, as bool masks."""

    inputs: Tensor
    outputs: Tensor


def all_open(net: GatedNetwork) -> Tensor:
    """The keep mask, bool (N,), that keeps every channel."""
    return torch.ones(net.num_gates, dtype=torch.bool)


def useful(net: GatedNetwork, keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that have a say in what the network computes: where all channels of a site in a branch
    closed, what lies before it in that branch is read by nothing."""
    keep = keep.cpu().clone()
    by_site = net.by_site(keep)
    for branch in {layer.branch: None for layer in net.layers(1)}:
        closed = [i for i, site in enumerate(branch) if not by_site[site].any()]
        for site in branch[: max(closed, default=0)]:
            by_site[site][:] = False
    return keep


def present(net: GatedNetwork, keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that the compact network has. A branch with a closed site is a constant, of which only the
    last site is left."""
    keep = useful(net, keep)
    by_site = net.by_site(keep)
    for branch in {layer.branch: None for layer in net.layers(1)}:
        if not all(by_site[site].any() for site in branch):
            for site in branch[:-1]:
                by_site[site][:] = False
    return keep


def liveness(net: GatedNetwork, layers: list[Layer], keep: Tensor) -> dict[str, Live]:
    """By layer path, which input channels can differ from zero and which output channels are needed, under `keep`, bool (N,)."""
    by_site = net.by_site(keep.cpu())
    live: dict[str, Live] = {}
    for layer in layers:
        inputs, outputs = _channels(net.get_submodule(layer.path))
        live[layer.path] = Live(
            _alive(layer, layer.feeds, inputs, live), by_site[layer.site] if layer.site else torch.ones(outputs, dtype=torch.bool)
        )
    return live


def _alive(layer: Layer, feeds: tuple[Feed, ...], inputs: int, live: dict[str, Live]) -> Tensor:
    if not layer.feeds:
        return torch.ones(inputs, dtype=torch.bool)
    alive = torch.zeros(inputs // layer.spread, dtype=torch.bool)
    for feed in feeds:
        written = live[feed.writer].outputs
        alive[feed.offset : feed.offset + len(written)] |= written
    return alive.repeat_interleave(layer.spread)


def count(net: GatedNetwork, image_size: int, keep: Tensor | None = None, rule: str = "exact") -> Cost:
    """Cost of `net` for one picture of image_size x image_size when only the channels of `keep`, bool (N,), stay.

    exact: multiply-adds of Conv2d and Linear; all parameters. Residual-aware: a channel that a shortcut still feeds still costs.
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
    """Exact multiply-adds and parameters if each gate, (N,) floating, is the probability that its channel stays.

    Equals `count` when every gate is 0 or 1. A channel of a stream that several layers write to stays unless all of them close it;
    a branch costs nothing unless each of its sites has an open channel.
    """
    macs, params, _, _ = _layer_costs(net, image_size, gates)
    return Expected(macs.sum(), params.sum())


def _layer_costs(net: GatedNetwork, image_size: int, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected multiply-adds, parameters, live input and live output channels of each layer, (L,) each."""
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
    outputs = {layer.path: _channels(net.get_submodule(layer.path))[1] for layer in layers}
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
        is_fed=torch.tensor([bool(layer.feeds) and not _depthwise(net.get_submodule(layer.path)) for layer in layers]),
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
        "inputs": [1 if _depthwise(m) else _channels(m)[0] for m in modules],
        "outputs": [_channels(m)[1] for m in modules],
        # Weights for each pair of an input and an output channel.
        "area": [_area(m) * layer.spread for m, layer in zip(modules, layers, strict=True)],
        "positions": [layer.positions for layer in layers],
        # Parameters for each output channel beside the weights.
        "vectors": [(m.bias is not None) + 2 * (layer.norm is not None) for m, layer in zip(modules, layers, strict=True)],
        # Of a branch that lost an inner site, one constant for each output of its last layer stays.
        "last": [bool(layer.branch) and layer.branch[-1] == layer.site for layer in layers],
    }
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


def _paper_count(net: GatedNetwork, image_size: int, keep: Tensor) -> Cost:
    layers = net.layers(image_size)
    # Outputs close only where a layer has gates of its own.
    live = liveness(net, [layer if layer.gated else layer._replace(site=None) for layer in layers], keep)
    flops = params = 0
    for layer in layers:
        module = net.get_submodule(layer.path)
        inputs, _ = _channels(module)
        if not layer.plain:
            inputs = int(_alive(layer, tuple(feed for feed in layer.feeds if not feed.around), inputs, live).sum())
        outputs = int(live[layer.path].outputs.sum())
        weights = _area(module) * outputs * (1 if _depthwise(module) else inputs)
        vectors = outputs * (module.bias is not None)
        if isinstance(module, nn.Linear):
            flops, params = flops + weights + outputs, params + weights + outputs
        else:
            norm = 0 if layer.plain else outputs
            flops += layer.positions * weights + norm + vectors
            params += weights + 2 * norm + vectors
    return Cost(flops, params)


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1


def _channels(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def _area(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else module.kernel_size[0] * module.kernel_size[1]


def by_layer(net: GatedNetwork, image_size: int, keep: Tensor | None = None) -> list[dict]:
    """One row for each layer, in forward order: path, site, [kept, full] channels, multiply-adds and parameters (exact rule)."""
    keep = all_open(net) if keep is None else keep
    columns = [c.round().long().tolist() for c in _layer_costs(net, image_size, useful(net, keep).double())]
    rows = []
    for layer, macs, params, inputs, outputs in zip(net.layers(image_size), *columns, strict=True):
        module = net.get_submodule(layer.path)
        full_in, full_out = _channels(module)
        if not macs:
            # Nothing is left of it, or the constant that its branch came to.
            inputs, outputs = 0, params
        rows.append(
            {
                "layer": layer.path,
                "site": layer.site if layer.gated else None,
                "inputs": [outputs if _depthwise(module) else inputs * layer.spread, full_in],
                "outputs": [outputs, full_out],
                "macs": macs,
                "params": params,
            }
        )
    return rows


def pack(keep: Tensor) -> str:
    """A keep mask, bool (N,), as text: base64 of its bits, the first channel in the highest bit."""
    return base64.b64encode(np.packbits(keep.cpu().numpy()).tobytes()).decode()


def unpack(text: str, number: int) -> Tensor:
    """The keep mask, bool (number,), that `pack` wrote. Raises ValueError if it is of another length."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if not number <= len(bits) < number + 8:
        raise ValueError(f"a mask of {number} channels was expected, found {len(bits)} bits")
    return torch.from_numpy(bits[:number].astype(bool))


def _built(model: recipe.Network) -> GatedNetwork:
    try:
        return nets.build(model.name, model.num_classes, model.width)
    except ValueError as error:
        raise errors.InputError(str(error)) from None


def _of(path: Path, overrides: list[str]) -> tuple[recipe.Recipe, GatedNetwork, Tensor | None]:
    """Recipe, network without memory for its weights, and keep mask, if there is one yet, of a recipe or a run folder."""
    if path.is_dir() and not (path / "recipe.yaml").exists():
        raise errors.InputError(f"{path}: holds no recipe.yaml, so it is not a run folder; give a recipe or a run's `output`")
    settings = recipe.load(path / "recipe.yaml" if path.is_dir() else path, overrides)
    with torch.device("meta"):
        net = _built(settings.model)
        size = settings.data.image_size
        try:
            net.eval()(torch.empty(1, 3, size, size))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise errors.InputError(f"key 'data.image_size': the network cannot take pictures of {size}x{size} ({why})") from None
    return settings, net, _kept(path, net) if path.is_dir() else None


def _kept(folder: Path, net: GatedNetwork) -> Tensor | None:
    """The channels that a run kept; None, and a word of it on stderr, if that is not known."""
    pruned = results.load(folder).last("prune")
    if "mask" not in pruned:
        why = "its records do not tell which channels it kept" if pruned else "it is not pruned yet"
        print(f"warning: {folder}: {why}; this is the full network", file=sys.stderr)
        return None
    try:
        return unpack(pruned["mask"], net.num_gates)
    except (ValueError, TypeError) as error:
        raise errors.InputError(f"{folder}: the mask in metrics.jsonl is not one of this network ({error})") from None


def _tell(settings: recipe.Recipe, net: GatedNetwork, keep: Tensor | None) -> None:
    from rich.console import Console
    from rich.table import Table

    def spaced(number: int) -> str:
        return f"{number:,}".replace(",", " ")

    size, table = settings.data.image_size, Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer (* gated)", no_wrap=True)
    for name in ("inputs", "outputs", "multiply-adds", "share", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = by_layer(net, size, keep)
    total = max(1, sum(row["macs"] for row in rows))
    for row in rows:
        channels = [str(now) if now == full else f"{now} of {full}" for now, full in (row["inputs"], row["outputs"])]
        name = row["layer"].removesuffix(".conv") + (" *" if row["site"] else "")
        table.add_row(name, *channels, spaced(row["macs"]), f"{row['macs'] / total:.1%}", spaced(row["params"]))
    console = Console()
    # Long lines wrap; cut numbers would be wrong numbers.
    console.width = max(console.width, 120)
    console.print(table)
    of = "" if keep is None else f", {int(present(net, keep).sum())} of {len(keep)} channels kept"
    console.print(f"\n{settings.model.name}, pictures of {size}x{size}, {net.num_gates} gates{of}", highlight=False)
    for rule in ("exact", "paper"):
        full, now = count(net, size, None, rule), count(net, size, keep, rule)
        for what, one, other in zip(("multiply-adds", "parameters"), now, full, strict=True):
            share = "" if keep is None else f", {one / other:.2%} of {spaced(other)}"
            console.print(f"{what} ({rule} rule): [bold]{spaced(one)}[/bold]{share}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.cost",
        description="Print what a recipe's network costs for one picture, layer by layer, or what a run kept of it. Multiply-adds "
        "and parameters by the exact rule (those of the compact network) and by the rule of the paper's tables.",
    )
    parser.add_argument("path", type=Path, metavar="RECIPE|RUN", help="a YAML file such as recipes/proxyless.yaml, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, for example model.width=0.5")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_intermixed_args()
    try:
        settings, net, keep = _of(args.path, args.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not args.json:
        _tell(settings, net, keep)
        return
    size = settings.data.image_size
    facts = {"network": settings.model.name, "image_size": size, "gates": net.num_gates, "full": both_rules(net, size)}
    if keep is not None:
        facts["kept"] = both_rules(net, size, keep)
    print(json.dumps({**facts, "layers": by_layer(net, size, keep)}, indent=1))


if __name__ == "__main__":
    main()
