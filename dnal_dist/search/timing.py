"""A network's latency from a table of its own layers' times, measured on a device: what `latency --profile` writes."""

import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.files import read_regular
from dnal_dist.nets import GatedNetwork
from dnal_dist.nets.streams import costs

# Of a table, and of a layer.
MOST_BYTES, MOST_CHANNELS = 64 << 20, 1 << 18
# Kernels treat channels in groups of so many, and the rest apart: 24 channels can take as long as 32, and 15 longer than 16.
GROUPS = (16, 8, 4)
ALIGNED = GROUPS[-1]
# Share of a layer's own time that is left of it, however much the glue takes off.
LEAST = 0.2


class Grid(BaseModel):
    """Seconds of one kind of layer by its input and output channels. Multiples of each of GROUPS have points of their own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    inputs: list[int] = Field(min_length=1)
    """One alone where the time depends on the outputs only."""
    outputs: list[int] = Field(min_length=1)
    seconds: list[list[float]]

    @model_validator(mode="after")
    def _is_full(self):
        points = [*self.inputs, *self.outputs]
        if min(points) < 1 or max(points) > MOST_CHANNELS or any(sorted(set(side)) != side for side in (self.inputs, self.outputs)):
            raise ValueError(f"its channels are not numbers up to {MOST_CHANNELS} in ascending order")
        if [len(row) for row in self.seconds] != [len(self.outputs)] * len(self.inputs) or min(map(min, self.seconds)) <= 0:
            raise ValueError("its times are not one for each pair of channels, above 0")
        return self

    def at(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Interpolated seconds, float64 (n,), differentiable in the channels, (n,) each."""
        table = torch.tensor(self.seconds, dtype=torch.float64, device=outputs.device)
        total = torch.einsum("ni,ij,nj->n", _shares(self.inputs, inputs), table, _shares(self.outputs, outputs))
        # From one channel to none the layer goes.
        return total * outputs.clamp(max=1) * (inputs.clamp(max=1) if len(self.inputs) > 1 else 1)


def _shares(points: list[int], x: Tensor) -> Tensor:
    """The share of each point of the table in the time of each of x, (n,) channels: (n, points)."""
    between, number = _between(points, _main(points), x), x.detach().round()
    whole = _of_whole_numbers(tuple(points)).to(x.device)[number.nan_to_num(0).clamp(0, points[-1]).long()]
    # What is no whole number is on its way to one, and so may be what is: its slope is that of its way.
    return between + torch.where((x.detach() - number).abs()[:, None] <= 1e-6, whole - between.detach(), 0)


@lru_cache
def _of_whole_numbers(points: tuple[int, ...]) -> Tensor:
    """Shares as above, of each whole number up to the last point: of points that are multiples of the same groups, as far as the
    table has some."""
    numbers, ranks, those = torch.arange(points[-1] + 1, dtype=torch.float64), _rank(torch.tensor(points)), _main(points)
    shares = torch.zeros(len(numbers), len(points), dtype=torch.float64)
    for rank in range(len(GROUPS) + 1):
        own = (ranks == rank).nonzero().flatten().tolist()
        # One alone has no slope, and goes with those of the larger group.
        those = own if len(own) > 1 else sorted({*own, *those})
        shares = torch.where((_rank(numbers) >= rank)[:, None], _between(points, those, numbers), shares)
    return shares


def _main(points: Sequence[int]) -> list[int]:
    """The indices of the first point, the last, and of the multiples of the largest group, which is the best to be on the way to:
    few channels have no other slope than the one from the least to all."""
    return [i for i, number in enumerate(points) if number % GROUPS[0] == 0 or i in (0, len(points) - 1)]


def _between(points: Sequence[int], those: list[int], x: Tensor) -> Tensor:
    """Shares, (n, points), of the two of `those` points around each of x; they sum to 1."""
    at = torch.tensor([points[i] for i in those], dtype=x.dtype, device=x.device)
    upper = torch.searchsorted(at, x.detach()).clamp(min(1, len(those) - 1), len(those) - 1)
    lower = (upper - 1).clamp_min(0)
    share = (x - at[lower]) / (at[upper] - at[lower]).clamp_min(1) * (upper > lower)
    # At the ends too there is a slope, beyond them none.
    share = torch.where((x < at[0]) | (x > at[-1]), share.detach().clamp(0, 1), share)
    index = torch.tensor(those, device=x.device)
    found = x.new_zeros(len(x), len(points))
    return found.scatter_add(1, index[upper, None], share[:, None]).scatter_add(1, index[lower, None], (1 - share)[:, None])


def _rank(channels: Tensor) -> Tensor:
    """0 for multiples of the largest group, 1 for those of the next, and so on."""
    return sum((channels % group != 0).long() for group in GROUPS)


class Table(BaseModel):
    """Times of the layers of one network on one device, in one runtime; the network's are factor * their sum + glue."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    format: Literal[1] = 1
    network: dict
    """As nets.build takes it."""
    device: str
    runtime: str
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    round_to: int = Field(1, ge=1)
    """Of the groups of kernels only those that are multiples of it were timed."""
    versions: dict[str, str] = {}
    """Of the libraries that computed."""
    kinds: dict[str, Grid]
    layers: list[str]
    """The kind of each layer of the network, in forward order."""
    factor: float = Field(1.0, gt=0)
    """Of whole networks to the sums of their layers, which were timed one by one."""
    glue: float = 0.0
    """Seconds beside the layers, for each layer that there is: sums, pooling, the runtime's own; below 0 where a runtime goes from
    layer to layer with less than a layer alone takes to begin and to end."""

    @cached_property
    def _of_kind(self) -> dict[str, Tensor]:
        return {kind: torch.tensor([i for i, own in enumerate(self.layers) if own == kind]) for kind in self.kinds}

    def corrected(self, factor: float) -> "Table":
        """The table of which each prediction is `factor` times this one's."""
        return self.model_copy(update={"factor": self.factor * factor, "glue": self.glue * factor})

    def predict(self, net: GatedNetwork, image_size: int, gates: Tensor) -> Tensor:
        """Seconds for a batch if each gate, (N,), is the probability that its channel stays; differentiable."""
        gates = gates.double()
        streams = net.streams(image_size, "exact", gates.device)
        macs, _, inputs, outputs = costs(streams, net.gating, gates)
        full, _, all_inputs, all_outputs = costs(streams, net.gating, torch.ones_like(gates))
        layers = list(net.graph.layers.values())
        by_outputs = torch.tensor([layer.groups > 1 for layer in layers], device=gates.device)
        pairs = outputs / all_outputs * torch.where(by_outputs, 1.0, inputs / all_inputs)
        # Of a branch that is closed no layer is left.
        there = (macs / full / pairs.clamp_min(1e-12)).clamp(0, 1)
        total = gates.new_zeros(())
        for kind, those in self._of_kind.items():
            times = self.kinds[kind].at(inputs[those], outputs[those])
            times = self.factor * times
            total = total + (there[those] * torch.maximum(times + self.glue, LEAST * times)).sum()
        return total


def load(path: str, network: dict, round_to: int | None = None, layers: int | None = None) -> Table:
    """The table in a file, of the network that recipes build by `network`, which has so many layers and whose sites keep multiples
    of `round_to`. Raises InputError."""
    key = f"key 'architecture.target.table': {path}"
    again = "write it by python -m dnal_dist.latency RECIPE --profile FILE"
    try:
        table = Table.model_validate(json.loads(read_regular(Path(path), MOST_BYTES)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{key}: not a table of latencies ({first['loc']}: {first['msg']}); {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{key}: cannot be read ({reason(error)}); {again}") from None
    if set(table.layers) - table.kinds.keys() or layers not in (None, len(table.layers)):
        raise InputError(f"{key}: lacks the times of some layers; {again}")
    if other := next((name for name in network if table.network.get(name) != network[name]), None):
        raise InputError(f"{key}: measured for {other} {table.network.get(other)!r}, not {network[other]!r}; {again}")
    step = math.gcd(table.round_to, GROUPS[0])
    if step % ALIGNED == 0 and round_to is not None and round_to % step:
        raise InputError(
            f"key 'architecture.round_to': {round_to}, but {path} knows the times of multiples of {table.round_to} channels only; "
            f"set it to {table.round_to}, or write another file by python -m dnal_dist.latency RECIPE --profile FILE"
        )
    return table
