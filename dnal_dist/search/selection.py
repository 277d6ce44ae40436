"""The channels that meet a budget exactly."""

import bisect
import heapq
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from dnal_dist.nets import GatedNetwork, masks
from dnal_dist.nets.cost import count
from dnal_dist.search.budgets import Budget, cheapest, rounded, whole

# Most masks that the exact step counts beyond those of its first pass; a twentieth for latency, whose predictions take longer.
TRIES = 4000


def select(net: GatedNetwork, image_size: int, strength: Tensor, target: Budget, round_to: int = 1, exact: bool = True) -> Tensor:
    """The keep mask, bool (N,), of the strongest channels whose exact cost is `target`, or as near below it as was found.

    strength (N,) ranks the channels of the whole network, alpha for example. First the rank decides: as many as fit, with one
    channel in each site that no shortcut goes around. Then the strongest closed channels that still fit are added. If that leaves
    more than the tolerance unused, and if `exact`, a few channels are exchanged: at each site the strongest closed one may come and
    the weakest open one go. Each site keeps a multiple of `round_to`, or all. A branch is either closed altogether or has a channel
    in each of its sites, so that none is kept for nothing. Channels of strength -inf stay closed.
    """
    choice = Choice(net, image_size, strength, target, round_to)
    counts = choice.by_rank()
    counts = choice.fill(counts)
    if exact and choice.cost(counts) not in target:
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
        if whole(target.spent(net, image_size, closed.double())) > target.most:
            closed = cheapest(net, image_size, target.unit, round_to, strength == -torch.inf)
        self.least = [int(part.sum()) for part in net.by_site(closed).values()]
        self.most = [int(part.sum()) for part in net.by_site(strength > -torch.inf).values()]
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
            self._costs[counts] = whole(self.target.spent(self.net, self.image_size, self.mask(counts).double()))
        return self._costs[counts]

    def by_rank(self) -> tuple[int, ...]:
        """As many of the strongest channels of the whole network as fit."""

        def first(number: int) -> tuple[int, ...]:
            open_ = torch.bincount(self.sites[self.ranked[:number]], minlength=len(self.least)).tolist()
            counts = [max(self._down(n, site), least) for site, (n, least) in enumerate(zip(open_, self.least, strict=True))]
            for branch in self.branches:
                self._close_if_broken(counts, branch)
            return tuple(counts)

        low, high = 0, sum(self.most)
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
        while left := [site for site in sites if counts[site] < self.most[site]]:
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
                if not self.least[site] <= here[site] + step <= self.most[site]:
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
