"""From a keep mask to a physically smaller network: plain torch modules, the same function as the masked network."""

import itertools
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.nets import narrow
from dnal_dist.nets.convolution import Conv2d, faster
from dnal_dist.nets.gate import GatedNetwork
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.modules import Channels, Constant, Place, Sum

# What it takes to build each kind of module again, as its constructor's arguments.
_ARGUMENTS = {
    nn.Conv2d: lambda m: [
        *(m.in_channels, m.out_channels, list(m.kernel_size), list(m.stride)),
        m.padding if isinstance(m.padding, str) else list(m.padding),
        *(list(m.dilation), m.groups, m.bias is not None),
    ],
    nn.Linear: lambda m: (m.in_features, m.out_features, m.bias is not None),
    nn.BatchNorm2d: lambda m: _norm(m),
    nn.BatchNorm1d: lambda m: _norm(m),
    nn.Dropout: lambda m: (m.p,),
    nn.ReLU: lambda m: (m.inplace,),
    nn.ReLU6: lambda m: (m.inplace,),
    nn.MaxPool2d: lambda m: (m.kernel_size, m.stride, m.padding),
    nn.AdaptiveAvgPool2d: lambda m: (m.output_size,),
    nn.Flatten: lambda m: (),
    Place: lambda m: (m.places, m.width),
    # Of networks that older releases wrote.
    Constant: lambda m: (m.value.shape[1],),
    Channels: lambda m: (m.those,),
    Sum: lambda m: ([describe(branch) for branch in m.branches], m.adds, m.width, m.carry, m.stride),
}
# Modules of the largest description that is read, bytes of its file, and channels of the widest stream.
MOST_MODULES, MOST_BYTES, MOST_CHANNELS = 20_000, 64 << 20, 1 << 20
_KINDS = {kind.__name__: kind for kind in _ARGUMENTS}
_ARGUMENTS[Conv2d] = _ARGUMENTS[nn.Conv2d]


def _norm(module: nn.Module) -> tuple:
    return (module.num_features, module.eps, module.momentum) + (() if module.affine else (False,))


def describe(network: nn.Sequential | narrow.Narrow) -> list:
    """The structure of a compact network as JSON: one [kind, arguments] for each module; of one that runs steps a single item."""
    if isinstance(network, narrow.Narrow):
        return [["Narrow", narrow.described(network, _described)]]
    return [_described(module) for module in network]


def _described(module: nn.Module) -> list:
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return [type(module).__name__, list(_ARGUMENTS[type(module)](module)), *([frozen] if frozen else [])]


def _made(item: list) -> nn.Module:
    kind, arguments, *frozen = item
    module = faster(_checked(_KINDS[kind](*arguments)))
    for name in itertools.chain(*frozen):
        module.get_parameter(name).requires_grad_(False)
    return module


def build(description: list) -> nn.Sequential | narrow.Narrow:
    """The network that `describe` described, freshly initialised. Raises ValueError if it is no such description."""
    if len(description) == 1 and description[0][:1] == ["Narrow"]:
        try:
            return narrow.made(description[0][1], _made)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise ValueError(f"not a compact network: {error}") from None
    network, modules = nn.Sequential(), 0
    for item in description:
        try:
            kind, (*arguments,) = item
            if kind == "Sum":
                arguments[0] = [build(branch) for branch in arguments[0]]
            network.append(_checked(_KINDS[kind](*arguments)))
            modules += 1
            if modules > MOST_MODULES:
                raise ValueError(f"more than {MOST_MODULES} modules")
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"not part of a compact network: {str(item)[:80]} ({error})") from None
    return network


def _checked(module: nn.Module) -> nn.Module:
    """Raise ValueError for what a constructor takes and no forward pass does, or only with more memory than there is."""
    if isinstance(module, nn.Conv2d | nn.MaxPool2d):
        names = ("kernel_size", "stride", "padding", "dilation")
        own = [0 if (size := getattr(module, name)) in ("same", "valid") else size for name in names]
        for sizes in zip(*map(_pair, own), strict=True):
            kernel, stride, padding, dilation = sizes
            if not (all(type(size) is int for size in sizes) and min(kernel, stride, dilation) > 0 <= padding <= kernel * dilation):
                raise ValueError(f"{', '.join(names)} of {sizes}")
    elif isinstance(module, nn.AdaptiveAvgPool2d) and not all(type(n) is int and 0 < n <= 64 for n in _pair(module.output_size)):
        raise ValueError(f"output_size of {module.output_size}")
    elif isinstance(module, _BatchNorm) and not (module.eps > 0 and 0 <= (module.momentum or 0) <= 1):
        raise ValueError(f"eps, momentum of {module.eps}, {module.momentum}")
    elif isinstance(module, Sum | Place) and not 0 < module.width <= MOST_CHANNELS:
        raise ValueError(f"{module.width} channels")
    return module


def _pair(size) -> tuple:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def cut(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The first entries of tensors along each dimension, as many as these shapes have."""
    return {name: tensor[tuple(map(slice, shapes.get(name, ())))] for name, tensor in tensors.items()}


def _only_filled(wide: Tensor, part: Tensor, name: str) -> bool:
    """Whether all that a tensor has beside its first entries is what `deployed` adds."""
    fill = float(name.endswith("running_var"))
    rest = wide.clone()
    rest[tuple(map(slice, part.shape))] = fill
    return bool((rest == fill).all())


def restored(description: list, tensors: dict[str, Tensor], deployed: bool = False) -> nn.Module:
    """The network of a `description`, with these weights and statistics, of which others may follow in what is deployed. Raises
    ValueError if they do not fit, before memory is taken for whatever the description asks for."""
    with torch.device("meta"):
        empty = build(description)
        shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    if isinstance(empty, narrow.Narrow):
        _try(empty.eval())
    if deployed:
        own, tensors = tensors, cut(tensors, shapes)
        if not all(_only_filled(tensor, tensors[name], name) for name, tensor in own.items()):
            raise ValueError("the weights are those of a wider network than its description")
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("the weights do not fit the description of the network")
    network = build(description)
    network.load_state_dict(tensors)
    return network


def _try(empty: narrow.Narrow) -> None:
    """Run a network on the meta device. Raises ValueError if its steps do not fit one another."""
    try:
        with torch.no_grad():
            found = empty(torch.empty(2, 3, empty.image_size, empty.image_size, device="meta"))
        if not isinstance(found, Tensor) or len(found) != 2:
            raise ValueError("it gives no logits")
    except Exception as error:  # whatever an operation makes of what it is given
        raise ValueError(f"not a compact network: {error}") from None


def save(network: nn.Module, folder: Path, **facts) -> None:
    """Write `folder`/architecture.json (the description, and `facts` for readers) and weights.safetensors, in place of what was
    there. Raises OSError."""
    with atomic.folder(folder) as unfinished:
        weights = to_bytes({name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()})
        atomic.write(unfinished / "weights.safetensors", weights)
        text = json.dumps({**facts, "network": describe(network)}, indent=1) + "\n"
        atomic.write(unfinished / "architecture.json", text.encode())


def load(folder: Path | str) -> nn.Module:
    """The compact network saved in `folder`, or exported there, in eval mode. Raises InputError naming the folder and what is
    missing or wrong."""
    folder = Path(folder)
    try:
        found = json.loads(read_regular(folder / "architecture.json", MOST_BYTES))
        exported = "description" in found
        description = found["description" if exported else "network"]
        weights = folder / ("model.safetensors" if exported else "weights.safetensors")
        if weights.exists() and not weights.is_file():
            raise ValueError(f"{weights}: not a regular file")
        network = restored(description, load_file(weights), exported)
    except Exception as error:
        raise InputError(f"{folder}: no compact network can be loaded from here ({error})") from None
    return network.eval()


def compact(net: GatedNetwork, keep: Tensor) -> narrow.Narrow:
    """A smaller network with the function of `net` when the gates of the channels not in `keep`, bool (N,), are 0 and the others 1.

    Equal in eval mode up to rounding; `.keep` of the result is the mask it was made with. A site that would close although there is
    no way around it keeps one channel (see `rescue`), with a warning. `net` is left as it is.
    """
    keep, rescued = rescue(net, keep)
    if rescued:
        warnings.warn(f"all channels of {', '.join(rescued)} would close; the strongest one of each stays", stacklevel=2)
    with torch.no_grad():
        network = net.cut(keep)
    network.keep = keep
    return network.to(next(net.parameters()).device).train(net.training)
