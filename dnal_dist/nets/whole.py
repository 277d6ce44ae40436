"""Compact networks in the form in which runtimes are fastest: every branch writes all channels of its stream."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from dnal_dist.nets import older
from dnal_dist.nets.modules import Place
from dnal_dist.nets.narrow import Narrow, Step
from dnal_dist.nets.parallel import Chains, merged, with_rows


def deployed(network: nn.Module) -> nn.Module:
    """`whole`, with the fewest and fastest layers (see nets.parallel). What training would go on from is `whole`."""
    network = whole(network)
    return merged(network) if isinstance(network, Narrow) else network


def whole(network: nn.Module) -> nn.Module:
    """The function of a compact network, in eval mode, without scatter or gather where layers add to channels of a stream.
    For deployment: closed channels at the end of a branch are zero rows of its last layer, which training would open again.

    network: from `compact`, of this or an older release.
    """
    if not isinstance(network, Narrow):
        return older.whole(network)
    network = copy.deepcopy(network)
    chains, steps = Chains(network), []
    for step in network.steps:
        place = network.called(step)
        end = chains.end(step.args[0].name) if isinstance(place, Place) else []
        for one in end:
            if one.kind == "tensor":
                network.replace(one.target, _rows(place, "", network.called(one), 1))
            else:
                with_rows(network.called(one), partial(_rows, place))
        if not end:
            steps.append(step)
        elif len(step.args) > 1:
            steps.append(Step(step.out, "op", "add.Tensor", step.args[::-1], {}))
        else:
            at = steps.index(end[-1])
            steps[at] = steps[at]._replace(out=step.out)
    return network.with_steps(steps)


def _rows(place: Place, name: str, tensor: Tensor, dim: int = 0) -> Tensor:
    """A layer's tensor of that name with its rows along `dim` at the channels of `place`; what is in the others gives zero."""
    shape = list(tensor.shape)
    shape[dim] = place.width
    at = torch.tensor(place.places, device=tensor.device)
    return tensor.detach().new_full(shape, float(name == "running_var")).index_copy_(dim, at, tensor.detach())
