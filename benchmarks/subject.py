"""What is timed: a network with a batch, its compact form, and the published formulation of it, equal before anything is timed."""

import copy
from typing import NamedTuple

import torch
from formulation import Formulation
from torch import Tensor

from dnal_dist import nets
from dnal_dist.nets import GatedNetwork, compact, cost, frozen_statistics, masks
from dnal_dist.search.budgets import rounded

# Fraction of the MACs that the finetune's compact network has.
COMPACT = 0.15
# Largest relative difference, in float64, of outputs and alpha's gradient that counts as equal.
EQUAL = 1e-6


class Case(NamedTuple):
    network: str
    batch: int
    image_size: int
    width: float = 1.0
    multiple: int = 1
    """Of so many channels each site of the compact network keeps a multiple, or all."""


class Subject:
    """The networks of a case, on the CPU: ours, the compact one of about COMPACT of its MACs, and the published formulation.

    Raises ValueError if their outputs or alpha's gradients differ.
    """

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.network: GatedNetwork = nets.build(case.network, width=case.width)
        self.keep = thinned(self.network, case.image_size, multiple=case.multiple)
        self.formulation = Formulation(self.network)
        self.formulation.set_mask(self.keep)
        self.difference = difference(self.network, self.keep, self.formulation)
        if max(self.difference.values()) > EQUAL:
            raise ValueError(f"{case.network}: ours and the published formulation differ: {self.difference}")
        self.compact = compact.compact(self.network, self.keep)

    def of(self, batch: int) -> "Subject":
        """The same networks with another batch."""
        other = copy.copy(self)
        other.case = self.case._replace(batch=batch)
        return other

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random images, float32 (n, 3, H, W), and labels, int64 (n,)."""
        generator = torch.Generator(device).manual_seed(1)
        size, count = self.case.image_size, self.case.batch
        images = torch.randn(count, 3, size, size, generator=generator, device=device)
        return images, torch.randint(self.network.num_classes, (count,), generator=generator, device=device)


def thinned(network: GatedNetwork, image_size: int, fraction: float = COMPACT, multiple: int = 1) -> Tensor:
    """A keep mask, bool (N,), drawn with a fixed seed, of about `fraction` of the MACs: each site keeps one channel at least, and a
    multiple of `multiple`, or all."""
    drawn = torch.rand(network.num_gates, generator=torch.Generator().manual_seed(0))
    for part in network.by_site(drawn).values():
        part[part.argmin()] = 0.0
    full, low, high = cost.count(network, image_size).macs, 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        above = cost.count(network, image_size, rounded(network, drawn <= middle, -drawn, multiple)).macs > fraction * full
        low, high = (low, middle) if above else (middle, high)
    return masks.rescue(network, rounded(network, drawn <= low, -drawn, multiple))[0]


def difference(network: GatedNetwork, keep: Tensor, formulation: Formulation) -> dict[str, float]:
    """Relative differences, ours to the formulation's, in float64 on the CPU: of the logits without gates, with soft gates and of
    the compact network to the masked one's, and of alpha's gradient."""
    network, theirs = copy.deepcopy(network).double(), copy.deepcopy(formulation).double()
    generator = torch.Generator().manual_seed(2)
    # So large that each BatchNorm sees more than two values: of two it makes 1 and -1, give or take any rounding before.
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    alpha = torch.randn(network.num_gates, generator=generator, dtype=torch.float64)
    found = {}
    theirs.set_gates("mask")
    with torch.no_grad():
        found["finetune"] = _apart(compact.compact(network.eval(), keep)(images), theirs.eval()(images))
    network.train(), theirs.train()
    theirs.set_gates("absent")
    with torch.no_grad():
        found["pretrain"] = _apart(network(images), theirs(images))
    theirs.set_gates("soft", 2.0)
    theirs.set_alpha(alpha)
    alpha.requires_grad_()
    with frozen_statistics(network):
        ours, other = network(images, torch.sigmoid(2.0 * alpha)), theirs(images)
    found["search"] = _apart(ours.detach(), other.detach())
    labels = torch.arange(2)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(ours, labels), alpha)
    others = torch.autograd.grad(torch.nn.functional.cross_entropy(other, labels), theirs.alphas())
    found["alpha's gradient"] = _apart(gradient, torch.cat(others))
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
