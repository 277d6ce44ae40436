"""Whether the compact network of a gated one computes what the gated one does."""

import contextlib
import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dnal_dist.common.errors import InputError
from dnal_dist.nets.masks import rescue

if TYPE_CHECKING:
    from dnal_dist.nets.gate import GatedNetwork

# Largest relative difference, in float64, between the network with closed gates and its compact one.
EXACT = 1e-10
# What a network, or its compact form, may raise.
FAULTS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)


@torch.no_grad()
def check_exact(network: "GatedNetwork", seed: int = 0) -> float:
    """Close half of the gates at random, then also one site of every branch, in float64, and compare with the compact network:
    returns the difference of the logits relative to their size. Raises InputError if it is above EXACT. The network is left as it
    was."""
    generator = torch.Generator().manual_seed(seed)
    double = copy.deepcopy(network).cpu().double().eval()
    for name, tensor in [*double.named_parameters(), *double.named_buffers()]:
        # A weight near zero, as some networks begin with, would hide what it multiplies.
        small = tensor.is_floating_point() and (tensor.dim() <= 1 or float(tensor.abs().max()) < 1e-2)
        if small and "running_var" not in name:
            tensor.add_(torch.empty_like(tensor).uniform_(0.1, 0.5, generator=generator))
    keep = torch.rand(network.num_gates, generator=generator) < 0.5
    masks = [rescue(double, keep)[0]]
    if network.branches:  # and with one site of every branch closed
        for branch in network.branches:
            site = int(torch.randint(len(branch.sites), (), generator=generator))
            keep[network.gates_of(branch.sites[site])] = False
        masks.append(rescue(double, keep)[0])
    images = torch.randn(3, 3, network.image_size, network.image_size, generator=generator, dtype=torch.float64)
    # Three for what the compact network may hold of the two that its graph was read with; one is enough after that.
    return max(_difference(network, double, mask, images[2 * i :]) for i, mask in enumerate(masks))


def _difference(network: "GatedNetwork", double: "GatedNetwork", keep: Tensor, images: Tensor) -> float:
    """Of the last image, which the network takes alone; of all where it does not treat an image as it would by itself."""
    name = type(network.own).__name__
    try:
        compact = double.cut(keep).double().eval()
        found = compact(images)
        with contextlib.suppress(*FAULTS):
            masked = double(images[-1:], keep.double())
            if masked.dim() == 2 and found.shape == (len(images), masked.shape[1]):
                difference = apart(masked, found[-1:])
                if difference <= EXACT:
                    return difference
        masked = double(images, keep.double())
        if masked.shape != found.shape or masked.dim() != 2:
            raise ValueError(f"it returns {tuple(masked.shape)}, not (n, classes)")
    except FAULTS as error:
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name} has no compact network: {type(error).__name__} {why}") from None
    difference = apart(masked, found)
    if not difference <= EXACT:
        raise InputError(
            f"{name}: its compact network differs from the masked one by {difference:.1e}; "
            "name the modules that do something special in `ignore`"
        )
    return difference


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
