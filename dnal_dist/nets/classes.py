"""Labels of channels, and which of them stay or go together."""

from typing import NamedTuple

import torch
from torch import Tensor

OPEN = 0
"""The label of what is always there."""


class Sum(NamedTuple):
    """What one channel of a free sum adds up."""

    members: tuple[int, ...]
    """Labels of the channels."""
    nearest: tuple[int, ...]
    """Those that the branches of most layers end with; what comes around them along a shortcut is not among them."""


class Classes:
    """Disjoint sets of labels, with the reason why a set stays whole."""

    def __init__(self):
        self.parents = [OPEN]
        self.reasons = {OPEN: "it meets what has no channels to close"}
        self.sums: dict[int, Sum] = {}
        """The labels of free sums."""
        self.padding: set[int] = set()
        """Labels of zeros, which nothing writes."""
        self._known: dict[Sum, int] = {}

    def new(self, number: int) -> Tensor:
        first = len(self.parents)
        self.parents.extend(range(first, first + number))
        return torch.arange(first, first + number)

    def find(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = label = self.parents[self.parents[label]]
        return label

    def members(self, label: int) -> tuple[int, ...]:
        """What a label stands for: itself or, of a sum's, what was added."""
        return self.sums[label].members if label in self.sums else (label,)

    def unite(self, some: Tensor, others: Tensor) -> None:
        """Unite element by element; the shapes broadcast. What was added up in a sum is united too."""
        pairs = torch.stack([t.flatten() for t in torch.broadcast_tensors(some, others)], 1)
        for pair in torch.unique(pairs, dim=0).tolist():
            # The two labels themselves where neither is a sum's, which is faster.
            known = not self.sums.keys().isdisjoint(pair)
            first, *rest = (member for label in pair for member in self.members(label)) if known else pair
            for other in rest:
                a, b = sorted((self.find(first), self.find(other)))
                if a != b:
                    self.parents[b] = a
                    if b in self.reasons:
                        self.reasons.setdefault(a, self.reasons.pop(b))

    def add(self, some: Tensor, others: Tensor, deeper: int) -> Tensor:
        """Labels of a free sum, element by element. deeper: which operand has more layers behind it, the first (1), the second (-1)
        or neither (0)."""
        both = torch.broadcast_tensors(some, others)
        pairs = torch.stack([t.flatten() for t in both], 1)
        unique, places = torch.unique(pairs, dim=0, return_inverse=True)
        found = []
        for a, b in unique.tolist():
            near = [self.nearest(label) for label in ((a,) if deeper > 0 else (b,) if deeper < 0 else (a, b))]
            own = Sum(tuple(sorted({*self.members(a), *self.members(b)})), tuple(sorted({m for part in near for m in part})))
            if own not in self._known:
                self._known[own] = int(self.new(1))
                self.sums[self._known[own]] = own
            found.append(self._known[own])
        return torch.tensor(found)[places].view(both[0].shape)

    def nearest(self, label: int) -> tuple[int, ...]:
        return self.sums[label].nearest if label in self.sums else (label,)

    def freeze(self, labels: Tensor, reason: str) -> None:
        for label in labels.unique().tolist():
            for member in self.members(label):
                self.reasons.setdefault(self.find(member), reason)

    def reason(self, label: int) -> str | None:
        return self.reasons.get(self.find(label))
