"""A budget in place of a penalty weight: what it asks for, the weight in closed loop, and the channels that meet it exactly."""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dnal_dist.common.errors import InputError
from dnal_dist.nets import GatedNetwork, masks
from dnal_dist.nets.cost import count, expected
from dnal_dist.recipe import amount, duration
from dnal_dist.search import timing
from dnal_dist.search.timing import Table

# Most masks that the exact step counts beyond those of its first pass; a twentieth for latency, whose predictions take longer.
TRIES = 4000
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
        return self.of(expected(net, image_size, gates))

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
            used = _whole(one.used(net, image_size, keep.double()))
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


def _whole(cost: Tensor) -> int:
    """Rounded up, but for what a sum of whole numbers is off by."""
    return math.ceil(float(cost) - 1e-6)


def _written(unit: str, cost: int) -> str:
    return f"{cost / 1e6:.4g} ms" if unit == "latency" else f"{cost:,}"


def budget(settings, net: GatedNetwork, image_size: int, network: dict | None = None) -> Budget | None:
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
    return first._replace(others=tuple(others))


def _budget(settings, net: GatedNetwork, image_size: int, unit: str, text, table: Table | None) -> Budget:
    value, relative = duration(text) if unit == "latency" else amount(text)
    found = Budget(unit, 0, 0, 0, table if unit == "latency" else None, relative=relative)
    full = _whole(found.used(net, image_size, torch.ones(net.num_gates, dtype=torch.float64)))
    most = int(value * full if relative else value * 1e9 if unit == "latency" else value)
    floor = _whole(found.used(net, image_size, cheapest(net, image_size, unit, settings.round_to).double()))
    key, full_words, floor_words = f"key 'architecture.target.{unit}': {text}", _written(unit, full), _written(unit, floor)
    if most >= full:
        raise InputError(f"{key} is not below the {full_words} of the full network, so nothing would be learned; lower it")
    if most < floor:
        raise InputError(
            f"{key}{f' is {_written(unit, most)}, which' if relative else ''} is below {floor_words}, the least that this network "
            f"can cost ({floor / full:.2%} of the full one: a channel in each layer that no shortcut goes around); raise it"
        )
    return found._replace(least=max(floor, math.ceil(most * (1 - settings.tolerance))), most=most, full=full)


def cheapest(net: GatedNetwork, image_size: int, unit: str, round_to: int = 1) -> Tensor:
    """The keep mask, bool (N,), of the least channels that the network works with, through the cheapest candidates of its cells."""
    gates = torch.full((net.num_gates,), 1e-3, dtype=torch.float64, requires_grad=True)
    price_unit = "macs" if unit == "latency" else unit
    (price,) = torch.autograd.grad(getattr(expected(net, image_size, gates), price_unit), gates)
    return rounded(net, masks.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), -price)[0], -price, round_to)


def rounded(net: GatedNetwork, keep: Tensor, strength: Tensor, round_to: int) -> Tensor:
    """`keep` with the strongest closed channels opened that make the number of each site a multiple of `round_to`, or all."""
    keep = keep.clone()
    for part, rank in zip(net.by_site(keep).values(), net.by_site(strength.detach().cpu()).values(), strict=True):
        missing = min(len(part), math.ceil(int(part.sum()) / round_to) * round_to) - int(part.sum())
        closed = (~part).nonzero().flatten()
        part[closed[rank[closed].argsort(descending=True, stable=True)[:missing]]] = True
    return keep


def select(net: GatedNetwork, image_size: int, strength: Tensor, target: Budget, round_to: int = 1) -> Tensor:
    """The keep mask, bool (N,), of the strongest channels whose exact cost is `target`, or as near below it as was found.

    strength (N,) ranks the channels of the whole network, alpha for example. First the rank decides: as many as fit, with one
    channel in each site that no shortcut goes around. Then the strongest closed channels that still fit are added. If that leaves
    more than the tolerance unused, a few channels are exchanged: at each site the strongest closed one may come and the weakest
    open one go. Each site keeps a multiple of `round_to`, or all. A branch is either closed altogether or has a channel in each of
    its sites, so that none is kept for nothing.
    """
    choice = Choice(net, image_size, strength, target, round_to)
    counts = choice.by_rank()
    counts = choice.fill(counts)
    if choice.cost(counts) not in target:
        counts = choice.exchange(counts)
    return choice.mask(counts)


class Choice:
    """Keep masks as one number of channels for each site, the strongest ones of it."""

    def __init__(self, net: GatedNetwork, image_size: int, strength: Tensor, target: Budget, round_to: int = 1):
        self.net, self.image_size, self.target, self.round_to = net, image_size, target, round_to
        strength = strength.detach().cpu()
        self.orders = [part.argsort(descending=True, stable=True) for part in net.by_site(strength).values()]
        self.ranked = strength.argsort(descending=True, stable=True)
        closed = rounded(net, masks.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), strength)[0], strength, round_to)
        if _whole(target.spent(net, image_size, closed.double())) > target.most:
            closed = cheapest(net, image_size, target.unit, round_to)
        self.least = [int(part.sum()) for part in net.by_site(closed).values()]
        self.sites = torch.repeat_interleave(torch.arange(len(self.orders)), torch.tensor([len(order) for order in self.orders]))
        number = {site: i for i, site in enumerate(net.gate_sites)}
        self.branches = [[number[site] for site in branch.sites] for branch in net.branches]
        self.branch_of = {site: branch for branch in self.branches for site in branch}
        self.sorted = [part.sort(descending=True, stable=True).values.tolist() for part in net.by_site(strength).values()]
        self._costs: dict[tuple[int, ...], int] = {}

    def mask(self, counts: tuple[int, ...]) -> Tensor:
        keep = torch.zeros(self.net.num_gates, dtype=torch.bool)
        for part, order, number in zip(self.net.by_site(keep).values(), self.orders, counts, strict=True):
            part[order[:number]] = True
        return keep

    def cost(self, counts: tuple[int, ...]) -> int:
        if counts not in self._costs:
            # As `count` has it, which first closes what is read by nothing: here a branch is closed altogether or works.
            self._costs[counts] = _whole(self.target.spent(self.net, self.image_size, self.mask(counts).double()))
        return self._costs[counts]

    def by_rank(self) -> tuple[int, ...]:
        """As many of the strongest channels of the whole network as fit."""

        def first(number: int) -> tuple[int, ...]:
            open_ = torch.bincount(self.sites[self.ranked[:number]], minlength=len(self.least)).tolist()
            counts = [max(self._down(n, site), least) for site, (n, least) in enumerate(zip(open_, self.least, strict=True))]
            for branch in self.branches:
                self._close_if_broken(counts, branch)
            return tuple(counts)

        low, high = 0, len(self.ranked)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(first(middle)) <= self.target.most else (low, middle - 1)
        return first(low)

    def _down(self, number: int, site: int) -> int:
        """The largest number of channels up to `number` that `site` may have."""
        return number if number >= len(self.orders[site]) else number // self.round_to * self.round_to

    def _next(self, number: int, site: int, step: int) -> int:
        """The number of channels that `site` may have beside `number`, above or below it."""
        if step > 0:
            return min(number // self.round_to * self.round_to + self.round_to, len(self.orders[site]))
        return self._down(number - 1, site)

    def fill(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """`counts` with the strongest closed channels added that fit, until the cost is the target; a site whose next channel does
        not fit is left alone. The cost grows with each channel, so the last one that fits is searched in leaps."""
        sites = set(range(len(self.orders)))
        while self.cost(counts) < self.target.least:
            adding, path, leap = self._adding(counts, sites), [(-1, counts)], 1
            while self.cost(path[-1][1]) < self.target.least:
                further = list(itertools.islice(adding, leap))
                if not further:
                    return path[-1][1]
                path, leap = path + further, 2 * leap
            number = bisect.bisect_left(path, self.target.least, key=lambda step: self.cost(step[1]))
            site, more = path[number]
            if self.cost(more) in self.target:
                return more
            counts = path[number - 1][1]
            sites.remove(site)
        return counts

    def _adding(self, counts: tuple[int, ...], sites: set[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The strongest closed channel of `sites` opened, and the next one, and so on: (its site, the counts with it)."""
        while left := [site for site in sites if counts[site] < len(self.orders[site])]:
            site = max(left, key=lambda s: self.sorted[s][counts[s]])
            counts = self.changed(counts, site, 1)
            yield site, counts

    def exchange(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """The nearest to `counts`, in few changes, that costs the target; or, if none is found, the dearest below."""
        middle = (self.target.least + self.target.most) / 2
        seen, best, order = {counts}, counts, itertools.count()
        # Nearest to the target first, and few changes before many.
        queue = [(0.0, 0, counts, 0)]
        while queue and len(seen) < (TRIES if self.target.latency is None else TRIES // 20):
            _, _, here, changes = heapq.heappop(queue)
            for site, step in itertools.product(range(len(here)), (1, -1)):
                if not self.least[site] <= here[site] + step <= len(self.orders[site]):
                    continue
                there = self.changed(here, site, step)
                if there in seen:
                    continue
                seen.add(there)
                found = self.cost(there)
                if found in self.target:
                    return there
                if self.cost(best) < found <= self.target.most:
                    best = there
                far = abs(found - middle) / middle + 0.01 * changes
                heapq.heappush(queue, (far, next(order), there, changes + 1))
        return best

    def changed(self, counts: tuple[int, ...], site: int, step: int) -> tuple[int, ...]:
        """`counts` with more or fewer channels at `site`, as few as may be, and its branch opened or closed with it."""
        changed = [*counts[:site], self._next(counts[site], site, step), *counts[site + 1 :]]
        branch = self.branch_of.get(site, [])
        if step > 0:
            for other in branch:
                changed[other] = changed[other] or self._next(0, other, 1)
        self._close_if_broken(changed, branch)
        return tuple(changed)

    def _close_if_broken(self, counts: list[int], branch: list[int]) -> None:
        """In place: without a channel in each of its sites a branch computes nothing, so its other channels are let go."""
        if not all(counts[site] for site in branch):
            for site in branch:
                counts[site] = self.least[site]


def reopen(net: GatedNetwork, image_size: int, keep: Tensor, alpha: Tensor, floor: float) -> tuple[Tensor, bool]:
    """`keep` with as many channels opened again as bring the MACs to the share `floor`; and whether any had to be.

    The largest alpha of each site come first, the same share of every site: after a collapse alpha (N,) still ranks the channels of
    a site, but no longer one site against another.
    """
    least = floor * count(net, image_size).macs
    rank = torch.cat([a.argsort(descending=True, stable=True).argsort() / len(a) for a in net.by_site(alpha).values()])
    ranked = rank.argsort(stable=True)

    def with_first(number: int) -> Tensor:
        mask = keep.clone()
        mask[ranked[:number]] = True
        return mask

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if count(net, image_size, with_first(middle)).macs >= least:
            high = middle
        else:
            low = middle + 1
    return with_first(low), low > 0
