"""The table of latencies of a network's layers, from which search.timing predicts those of its compact networks."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnal_dist import nets, recipe
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.export.bench import Bench, CommandBench, cell
from dnal_dist.nets import compact
from dnal_dist.nets.gate import GatedNetwork
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.parallel import MULTIPLE
from dnal_dist.nets.whole import deployed
from dnal_dist.search import timing
from dnal_dist.search.budgets import rounded
from dnal_dist.search.timing import GROUPS, Grid, Table

# Fractions of a layer's channels that are timed, in each kind of multiples.
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
# Whole networks by which the factor and the glue are found.
NETWORKS = 10


class Subject(NamedTuple):
    """A recipe's network, and what times it."""

    network: dict
    """As nets.build takes it."""
    net: GatedNetwork
    image_size: int
    round_to: int
    """Multiples of channels that its sites will keep."""
    bench: Bench | CommandBench
    tell: Callable[[str], None]
    """Gets a line for each part of the work."""


def subject(settings: recipe.Recipe, bench: Bench | CommandBench, tell: Callable[[str], None]) -> Subject:
    torch.manual_seed(0)
    net = nets.build(**settings.network).eval().to(bench.device)
    return Subject(settings.network, net, settings.data.image_size, settings.architecture.round_to, bench, tell)


@torch.no_grad()
def table(of: Subject) -> Table:
    """The table of a network. Raises InputError."""
    kinds, shapes = _layers(of.net, of.image_size)
    grids, known = {}, dict.fromkeys(kinds)
    for number, kind in enumerate(known, 1):
        of.tell(f"layers of kind {number} of {len(known)}: {kind}")
        grids[kind] = _grid(*shapes[kind], of)
    for kind, ratios in grids.items():
        seconds = [[ratio * of.bench.unit for ratio in row] for row in ratios.seconds]
        grids[kind] = ratios.model_copy(update={"seconds": seconds})
    found = Table(network=of.network, kinds=grids, layers=kinds, round_to=of.round_to, **of.bench.facts())
    return _fitted(found, list(checked(found, of, NETWORKS, 0)))


def _layers(net: GatedNetwork, image_size: int) -> tuple[list[str], dict[str, tuple]]:
    """The kind of each layer, and of each kind the layer's module, the shape of its input, and which sides are free."""
    seen: dict[str, tuple[int, ...]] = {}
    modules = {path: net.get_submodule(path) for path in net.graph.layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: tuple(inputs[0].shape[1:])}))
        for path, module in modules.items()
    ]
    net(torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    kinds, shapes = [], {}
    for path, layer in net.graph.layers.items():
        module, shape = modules[path], seen[path]
        free = [bool((net.gating.of_label[side] != net.gating.always).any()) for side in (layer.inputs, layer.outputs)]
        if isinstance(module, nn.Linear):
            words = f"linear {module.in_features}-{module.out_features}"
        else:
            kernel = "x".join(map(str, module.kernel_size))
            words = f"conv {module.in_channels}-{module.out_channels} {kernel}/{module.stride[0]}"
            words += f" of {shape[1]}x{shape[2]}" + (f" in {module.groups} groups" if module.groups > 1 else "")
        words += " with norm" * (path in net.graph.norms) + " (fixed inputs)" * (not free[0]) + " (fixed outputs)" * (not free[1])
        kinds.append(words)
        shapes[words] = (module, shape, free, path in net.graph.norms)
    return kinds, shapes


def _points(channels: int, free: bool, round_to: int) -> list[int]:
    """The numbers of channels that are timed: multiples of the largest group that kernels work in, and just below them those of the
    smaller groups, and others, as far as `round_to` leaves any."""
    if not free:
        return [channels]
    largest = round_to if round_to % GROUPS[0] == 0 else GROUPS[0]
    aligned = {math.ceil(part * channels / largest) * largest for part in FRACTIONS}
    # Of three kinds the last two are enough: where any number may be kept, most are of the last.
    finer = [group for group in (*GROUPS[1:], 1) if group % math.gcd(round_to, largest) == 0][-2:]
    found = {channels} | aligned | {n - group for group in finer for n in {*aligned, 2 * group}}
    return sorted(n for n in found if 0 < n <= channels)


def _grid(module: nn.Module, shape: tuple[int, ...], free: list[bool], norm: bool, of: Subject) -> Grid:
    """Ratios to the reference in place of seconds."""
    linear = isinstance(module, nn.Linear)
    ins, outs = (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
    whole_only = not linear and module.groups > 1
    inputs, outputs = _points(ins, free[0] and not whole_only, of.round_to), _points(outs, free[1], of.round_to)
    rows = []
    for i in inputs:
        rows.append([])
        for o in outputs:
            rows[-1].append(of.bench.layer(*_narrow(module, shape, i, o, norm)))
    return Grid(inputs=inputs, outputs=outputs, seconds=rows)


def _narrow(module: nn.Module, shape: tuple[int, ...], inputs: int, outputs: int, norm: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer like `module` of fewer channels, and the shape of its input."""
    if isinstance(module, nn.Linear):
        return nn.Linear(inputs, outputs), (*shape[:-1], inputs)
    groups = 1
    if module.groups > 1:
        groups = max(1, round(module.groups * outputs / module.out_channels))
        if module.groups == module.in_channels == module.out_channels:
            groups = outputs = groups + -groups % MULTIPLE  # as it is deployed
        outputs = max(groups, outputs // groups * groups)
        inputs = max(1, module.in_channels // module.groups) * groups
    size = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    layer = nn.Conv2d(inputs, outputs, groups=groups, bias=module.bias is not None, **size)
    return cell(layer, norm), (inputs, *shape[1:])


def masks(net: GatedNetwork, count: int, round_to: int, seed: int) -> Iterator[Tensor]:
    """Random keep masks, bool (N,): of a tenth to nine tenths of all channels, and in each site of half to one and a half
    times that fraction."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        fraction, parts = 0.1 + 0.8 * (number + 0.5) / count, []
        for channels in net.gate_sites.values():
            own = fraction * float(torch.rand((), generator=generator) + 0.5)
            kept = min(channels, max(1, round(own * channels)))
            parts.append(torch.randperm(channels, generator=generator) < kept)
        keep = rescue(net, torch.cat(parts))[0]
        yield rounded(net, keep, torch.rand(net.num_gates, generator=generator), round_to)


def checked(found: Table, of: Subject, count: int, seed: int) -> Iterator[tuple[Tensor, float, float]]:
    """Random compact networks: the mask, seconds as predicted, and as measured."""
    for number, keep in enumerate(masks(of.net, count, of.round_to, seed), 1):
        of.tell(f"whole network {number} of {count}")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = deployed(compact.compact(of.net, keep)).eval()
            measured = of.bench.network(module, of.image_size)
            yield keep, float(found.predict(of.net, of.image_size, keep.double())), measured


def _fitted(found: Table, rows: list[tuple[Tensor, float, float]]) -> Table:
    """With the factor and the glue that fit whole networks best, relative to their times."""
    if not rows:
        return found
    layers = float(len(found.layers))
    sides = torch.tensor([[predicted / measured, layers / measured] for _, predicted, measured in rows], dtype=torch.float64)
    factor, glue = torch.linalg.lstsq(sides, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    if factor <= 0:
        factor, glue = statistics.median(measured / predicted for _, predicted, measured in rows), 0.0
    return found.model_copy(update={"factor": factor, "glue": glue})


def kept(path: Path, of: Subject) -> tuple[Table, bool]:
    """The table in a file, or measured and written there; and whether it was. Raises InputError, also for another table there."""
    if path.exists():
        found = timing.load(str(path), of.network, of.round_to)
        own = of.bench.facts()
        if other := next((name for name, value in own.items() if getattr(found, name) != value), None):
            there = getattr(found, other)
            text = ", ".join(f"{name} {version}" for name, version in there.items()) if isinstance(there, dict) else there
            raise InputError(f"--profile {path}: holds a table of {other} {text or 'unknown'}; name another file, or remove it")
        return found, False
    found = table(of)
    try:
        atomic.put(path, (found.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--profile {path}: cannot be written ({reason(error)}); {remedy(error)}") from None
    return found, True
