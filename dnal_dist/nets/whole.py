"""Compact networks as runtimes like them: every branch writes all channels of its stream."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.nets import older
from dnal_dist.nets.modules import Place
from dnal_dist.nets.narrow import Narrow, Step
from dnal_dist.nets.parallel import merged


def deployed(network: nn.Module) -> nn.Module:
    """`whole`, with the parallel branches of a sum as one (see nets.parallel): the fastest form, whose branches no longer close one by
    one."""
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
    steps, made = [], {step.out: step for step in network.steps}
    for step in network.steps:
        if isinstance(place := network.called(step), Place) and _widened(network, made, step.args[0].name, place):
            step = Step(step.out, "op", "add.Tensor" if len(step.args) > 1 else "alias.default", step.args[::-1], {})
        steps.append(step)
    return network.with_steps(steps)


def _widened(network: Narrow, made: dict[str, Step], name: str, place: Place) -> bool:
    """Whether the layers that write the result `name`, and nothing else, now write it to all channels of a stream."""
    chain: list[Step] = []
    while not chain or isinstance(network.called(chain[-1]), _BatchNorm):
        step = made.get(name)
        if step is None or network.uses(name) != 1 or step.kind not in ("module", "tensor") or network.uses_of(step) != 1:
            return False
        chain.append(step)
        name = step.args[0].name if step.args else ""
    if chain[-1].kind == "module" and not (isinstance(conv := network.called(chain[-1]), nn.Conv2d) and conv.groups == 1):
        return False
    for step in chain:
        if step.kind == "tensor":
            network.replace(step.target, _rows(network.called(step), place, 1))
        else:
            _widen(network.called(step), place)
    return True


def _widen(module: nn.Conv2d | _BatchNorm, place: Place) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (tensor := getattr(module, name, None)) is not None:
            wide = _rows(tensor, place, 0, 1.0 if name == "running_var" else 0.0)
            setattr(module, name, nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide)
    if isinstance(module, nn.Conv2d):
        module.out_channels = place.width
    else:
        module.num_features = place.width


def _rows(tensor: Tensor, place: Place, dim: int, rest: float = 0.0) -> Tensor:
    """The tensor with its rows along `dim` at the channels of `place`, and `rest` in the others."""
    shape = list(tensor.shape)
    shape[dim] = place.width
    at = torch.tensor(place.places, device=tensor.device)
    return tensor.detach().new_full(shape, rest).index_copy_(dim, at, tensor.detach())
