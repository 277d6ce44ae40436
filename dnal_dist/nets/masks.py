"""Keep masks: which channels are live, useful and present."""

import base64
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dnal_dist.nets.branches import Branch
    from dnal_dist.nets.gate import GatedNetwork


def rescue(net: "GatedNetwork", keep: Tensor, strength: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """`keep`, bool (N,), with channels opened so that something of the image reaches every layer around which there is no way.

    Where all of a tensor closed, its strongest channel opens; where all branches of a sum that has no other way did, the strongest
    of each closed site on one of them. strength (N,) ranks channels, alpha for example; by default the magnitude of their
    BatchNorm's weight. Returns the mask and the names of the sites that were rescued.
    """
    keep = keep.cpu().clone()
    strength = (net.strength() if strength is None else strength).detach().cpu()
    opened = []

    def open_strongest(group: Tensor) -> None:
        if not keep[group].any():
            opened.append(int(group[strength[group].argmax()]))
            keep[opened[-1]] = True

    for group in net.must_have():
        open_strongest(group)
    for ways in net.ways():
        if not any(all(keep[group].any() for group in way) for way in ways):
            for group in max(ways, key=lambda way: min(float(strength[group].max()) for group in way)):
                open_strongest(group)
    ends = torch.tensor(list(net.gate_sites.values())).cumsum(0)
    names = list(net.gate_sites)
    return keep, list(dict.fromkeys(names[int((ends <= gate).sum())] for gate in opened))


def of_branches(net: "GatedNetwork", branches: Iterable["Branch"]) -> Tensor:
    """The channels, bool (N,), whose closing closes each of `branches`."""
    found = torch.zeros(net.num_gates, dtype=torch.bool)
    for site in (site for branch in branches for site in branch.sites):
        found[net.gates_of(site)] = True
    return found


def all_open(net: "GatedNetwork") -> Tensor:
    """The keep mask, bool (N,), that keeps every channel."""
    return torch.ones(net.num_gates, dtype=torch.bool)


def useful(net: "GatedNetwork", keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that have a say in what the network computes: where all channels of a site in a branch
    closed, what lies before it in that branch is read by nothing."""
    keep = keep.cpu().clone()
    by_site = net.by_site(keep)
    for branch in net.branches:
        closed = [i for i, site in enumerate(branch.sites) if not by_site[site].any()]
        for site in branch.sites[: max(closed, default=0)]:
            by_site[site][:] = False
    return keep


def present(net: "GatedNetwork", keep: Tensor) -> Tensor:
    """The channels of `keep`, bool (N,), that the compact network has. A branch with a closed site is a constant, of which only the
    channels that it adds are left."""
    keep = useful(net, keep)
    by_site = net.by_site(keep)
    for branch in net.branches:
        if not all(by_site[site].any() for site in branch.sites):
            for site in branch.within:
                by_site[site][:] = False
    return keep


def pack(keep: Tensor) -> str:
    """A keep mask, bool (N,), as text: base64 of its bits, the first channel in the highest bit."""
    return base64.b64encode(np.packbits(keep.cpu().numpy()).tobytes()).decode()


def unpack(text: str, number: int) -> Tensor:
    """The keep mask, bool (number,), that `pack` wrote. Raises ValueError if it is of another length."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if not number <= len(bits) < number + 8:
        raise ValueError(f"a mask of {number} channels was expected, found {len(bits)} bits")
    return torch.from_numpy(bits[:number].astype(bool))
