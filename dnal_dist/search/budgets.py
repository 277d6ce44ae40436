"""A budget in place of a penalty weight: what it asks for, and the least that a network can cost."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dnal_dist.common.errors import InputError
from dnal_dist.nets import GatedNetwork, cost, masks
from dnal_dist.nets.branches import Branch
from dnal_dist.recipe import amount, duration
from dnal_dist.search import timing
from dnal_dist.search.timing import Table

# Share of a latency that may be left unused once it is measured: two measurements differ by more than the usual tolerance.
MEASURED = 0.05


class Budget(NamedTuple):
    """The cost that a network may have, `least` to `most`. `unit` is "macs", "params" or "latency" (in nanoseconds, as `table`
    predicts it), `full` the cost of all channels. `others` are not to be exceeded either: the one that is used most counts."""

    unit: str
    least: int
    most: int
    full: int
    table: Table | None = None
    others: tuple["Budget", ...] = ()
    relative: bool = False
    """Whether it is a share of the full network's cost."""

    def of(self, cost) -> int | Tensor:
        """The component of a Cost, or of an Expected, in the budget's unit."""
        return getattr(cost, self.unit)

    def used(self, net: GatedNetwork, image_size: int, gates: Tensor) -> Tensor:
        """The cost in this unit at gates (N,), differentiable."""
        if self.table is not None:
            return 1e9 * self.table.predict(net, image_size, gates)
        return self.of(cost.expected(net, image_size, gates))

    def spent(self, net: GatedNetwork, image_size: int, gates: Tensor) -> Tensor:
        """Likewise, or if more of another budget is used, as much of this one."""
        found = self.used(net, image_size, gates)
        for other in self.others:
            found = torch.maximum(found, other.used(net, image_size, gates) / other.most * self.most)
        return found

    def on_the_way(self, fraction: float) -> "Budget":
        """The budget after `fraction` of the way here from the full cost, an even way in its logarithm."""
        most = int(self.full * (self.most / self.full) ** fraction)
        others = tuple(other.on_the_way(fraction) for other in self.others)
        return self._replace(least=math.ceil(most * self.least / self.most), most=most, others=others)

    @property
    def latency(self) -> "Budget | None":
        return next((one for one in (self, *self.others) if one.unit == "latency"), None)

    def corrected(self, factor: float, slack: float = 0.0) -> "Budget":
        """The budget with a latency of `factor` times what the table predicts, of which the share `slack` may be left unused."""
        others = tuple(other.corrected(factor, slack) for other in self.others)
        if self.table is None:
            return self._replace(others=others)
        least = min(self.least, math.ceil((1 - slack) * self.most))
        return self._replace(least=least, table=self.table.corrected(factor), others=others)

    def __contains__(self, found: int) -> bool:
        return self.least <= found <= self.most

    def records(self, net: GatedNetwork, image_size: int, keep: Tensor) -> list[dict]:
        """Each budget, and what of it a network with the channels of `keep` uses, as a run's records hold them."""
        rows = []
        for one in (self, *self.others):
            used = whole(one.used(net, image_size, keep.double()))
            rows.append({"unit": one.unit, "least": one.least, "most": one.most, "full": one.full, "used": used})
        return rows

    def missed(self, net: GatedNetwork, image_size: int, keep: Tensor) -> str | None:
        """An error message if the network with the channels of `keep`, bool (N,), misses the budget."""
        rows = self.records(net, image_size, keep)
        if all(row["used"] <= row["most"] for row in rows) and any(row["used"] >= row["least"] for row in rows):
            return None
        row = max(rows, key=lambda row: row["used"] / row["most"])
        used, least, most = (_written(row["unit"], row[key]) for key in ("used", "least", "most"))
        return (
            f"key 'architecture.target.{row['unit']}': missed, the network costs {used} where {least} to {most} "
            f"were asked for; raise architecture.tolerance, or choose another target"
        )


def whole(cost: Tensor) -> int:
    """Rounded up, but for what a sum of whole numbers is off by."""
    return math.ceil(float(cost) - 1e-6)


def _written(unit: str, cost: int) -> str:
    return f"{cost / 1e6:.4g} ms" if unit == "latency" else f"{cost:,}"


def read(settings, net: GatedNetwork, image_size: int, network: dict | None = None) -> Budget | None:
    """What a recipe's `architecture` settings ask of `net`, which `network` builds; None if they give a penalty weight instead.

    Raises InputError if a target is above the full cost, or below what the network costs with every channel closed that may be.
    """
    if settings.target is None:
        return None
    chosen = settings.target.chosen
    table = None
    if settings.target.latency is not None:
        table = timing.load(settings.target.table, network or {}, settings.round_to, len(net.graph.layers))
    first, *others = [_budget(settings, net, image_size, unit, text, table) for unit, text in chosen]
    found = first._replace(others=tuple(others))
    if settings.candidates == "one":
        _check_one_is_enough(net, image_size, found)
    return found


def _check_one_is_enough(net: GatedNetwork, image_size: int, asked: Budget) -> None:
    """Raises InputError unless the network with the dearest branch of each cell alone costs what is asked for."""
    key = "key 'architecture.candidates': one"
    if not net.cells():
        raise InputError(f"{key}, but no sum of this network adds several branches; remove it")
    if not reaches(net, image_size, asked, []):
        rows = asked.records(net, image_size, _dearest(net, image_size, asked.unit, []))
        row = max(rows, key=lambda row: row["used"] / row["most"])
        raise InputError(
            f"{key} leaves at most {row['used'] / row['full']:.2%} of the network's {row['unit']}, and architecture.target asks "
            f"for {row['most'] / row['full']:.2%}; lower the target, or leave it at all"
        )


def reaches(net: GatedNetwork, image_size: int, asked: Budget, gone: list[Branch], round_to: int = 1) -> bool:
    """Whether one branch of each cell, none of `gone`, can cost as much as is asked for, and as little."""
    rows = asked.records(net, image_size, _dearest(net, image_size, asked.unit, gone))
    if all(row["used"] < row["least"] for row in rows):
        return False
    least = cheapest(net, image_size, asked.unit, round_to, masks.of_branches(net, gone))
    return all(row["used"] <= row["most"] for row in asked.records(net, image_size, least))


def _dearest(net: GatedNetwork, image_size: int, unit: str, gone: list[Branch]) -> Tensor:
    """The keep mask, bool (N,), of all channels but those of `gone` and, of the other branches of each cell, but the dearest."""
    cost_of = {row["layer"]: row["params" if unit == "params" else "macs"] for row in cost.by_layer(net, image_size)}
    names, others = {branch.operand for branch in gone}, list(gone)
    for branches in net.cells():
        left = [branch for branch in branches if branch.operand not in names]
        others += sorted(left, key=lambda branch: sum(cost_of[path] for path in branch.layers))[:-1]
    return ~masks.of_branches(net, others)


def _budget(settings, net: GatedNetwork, image_size: int, unit: str, text, table: Table | None) -> Budget:
    value, relative = duration(text) if unit == "latency" else amount(text)
    found = Budget(unit, 0, 0, 0, table if unit == "latency" else None, relative=relative)
    full = whole(found.used(net, image_size, torch.ones(net.num_gates, dtype=torch.float64)))
    most = int(value * full if relative else value * 1e9 if unit == "latency" else value)
    floor = whole(found.used(net, image_size, cheapest(net, image_size, unit, settings.round_to).double()))
    key, full_words, floor_words = f"key 'architecture.target.{unit}': {text}", _written(unit, full), _written(unit, floor)
    if most >= full:
        raise InputError(f"{key} is not below the {full_words} of the full network, so nothing would be learned; lower it")
    if most < floor:
        raise InputError(
            f"{key}{f' is {_written(unit, most)}, which' if relative else ''} is below {floor_words}, the least that this network "
            f"can cost ({floor / full:.2%} of the full one: a channel in each layer that no shortcut goes around); raise it"
        )
    return found._replace(least=max(floor, math.ceil(most * (1 - settings.tolerance))), most=most, full=full)


def cheapest(net: GatedNetwork, image_size: int, unit: str, round_to: int = 1, barred: Tensor | None = None) -> Tensor:
    """The keep mask, bool (N,), of the least channels that the network works with, through the cheapest candidates of its cells;
    none of `barred`, bool (N,)."""
    gates = torch.full((net.num_gates,), 1e-3, dtype=torch.float64, requires_grad=True)
    price_unit = "macs" if unit == "latency" else unit
    (price,) = torch.autograd.grad(getattr(cost.expected(net, image_size, gates), price_unit), gates)
    price = price if barred is None else price.masked_fill(barred, torch.inf)
    return rounded(net, masks.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), -price)[0], -price, round_to)


def rounded(net: GatedNetwork, keep: Tensor, strength: Tensor, round_to: int) -> Tensor:
    """`keep` with the strongest closed channels opened that make the number of each site a multiple of `round_to`, or all."""
    keep = keep.clone()
    for part, rank in zip(net.by_site(keep).values(), net.by_site(strength.detach().cpu()).values(), strict=True):
        missing = min(len(part), math.ceil(int(part.sum()) / round_to) * round_to) - int(part.sum())
        closed = (~part).nonzero().flatten()
        part[closed[rank[closed].argsort(descending=True, stable=True)[:missing]]] = True
    return keep
