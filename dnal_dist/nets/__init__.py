"""Gated networks by name."""

from collections.abc import Sequence

import torch

from dnal_dist.common.errors import InputError
from dnal_dist.nets.checking import check_exact
from dnal_dist.nets.gate import GatedNetwork, Reading, gate, reading
from dnal_dist.nets.gated import ConvBN, GatedBatchNorm, computing_again, frozen_statistics
from dnal_dist.nets.graph import Gated
from dnal_dist.nets.libraries import make
from dnal_dist.nets.mobilenet import mobilenetv2_cifar, mobilenetv2_imagenet
from dnal_dist.nets.resnet import resnet50_imagenet, resnet56_cifar, resnet_digits
from dnal_dist.nets.supernet import proxyless_supernet, supernet_digits
from dnal_dist.nets.tracing import symbolic
from dnal_dist.nets.vgg import vgg16_cifar, vgg16_imagenet, vgg_digits

__all__ = [
    "NETWORKS",
    "GatedBatchNorm",
    "GatedNetwork",
    "build",
    "computing_again",
    "frozen_statistics",
    "gate",
    "on_meta",
    "require_image_size",
]

NETWORKS = {
    network.__name__: network
    for network in (
        *(vgg16_cifar, resnet56_cifar, mobilenetv2_cifar),
        *(vgg16_imagenet, resnet50_imagenet, mobilenetv2_imagenet, proxyless_supernet),
        *(vgg_digits, resnet_digits, supernet_digits),
    )
}


# Height and width of the images that networks of this project are read for; what closes does not depend on it.
READ_SIZE = 64
_KNOWN: dict[tuple, Reading] = {}


def build(
    name: str,
    num_classes: int | None = None,
    width: float = 1.0,
    image_size: int = 224,
    arguments: dict | None = None,
    ignore: Sequence[str] = (),
    check: bool = False,
    streams: str | None = None,
) -> GatedNetwork:
    """The network called `name`, freshly initialised from torch's global generator.

    One of NETWORKS, its channel counts times `width`; or torchvision:NAME, timm:NAME or PACKAGE.MODULE:FUNCTION, made with
    `arguments` and read for images of image_size x image_size pixels (see `gate` for ignore and check).
    streams: what layers close that write to one residual stream. "tied": the same channels; "free": each its own; None: free with
    the gates of the paper for NETWORKS, tied for others.

    Raises InputError for an unknown name, and for a width or number of classes that takes more memory than there is.
    """
    if ":" in name:
        if width != 1:
            raise InputError(f"key 'model.width': {name} has no width; give what it takes by key 'model.arguments'")
        example = torch.zeros(2, 3, image_size, image_size)
        return gate(make(name, num_classes, arguments), example, ignore, check, streams or "tied")
    if name not in NETWORKS:
        raise InputError(
            f"key 'model.name': no network is called {name!r}; there are {', '.join(NETWORKS)}, torchvision:NAME, timm:NAME and "
            "PACKAGE.MODULE:FUNCTION"
        )
    if arguments or (ignore and streams != "tied"):
        what, hint = ("arguments", "") if arguments else ("ignore", " unless architecture.streams is tied")
        raise InputError(f"key 'model.{what}': {name} takes none{hint}; width scales its channels")
    try:
        network = NETWORKS[name](width=width) if num_classes is None else NETWORKS[name](num_classes, width)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"key 'model.width': the network cannot be built ({why}); lower it or model.num_classes") from None
    key = name, num_classes, width, streams == "tied", tuple(ignore)
    if key not in _KNOWN:
        only = tuple(path for path, module in network.named_modules() if isinstance(module, ConvBN) and module.gated)
        gated = Gated(ignore=tuple(ignore)) if streams == "tied" else Gated(True, only=only)
        _KNOWN[key] = reading(network, torch.zeros(2, 3, READ_SIZE, READ_SIZE), gated, symbolic)
    network = GatedNetwork(network, _KNOWN[key], image_size)
    if check and streams == "tied":
        check_exact(network)
    return network


def on_meta(
    name: str, num_classes: int | None, width: float, image_size: int, streams: str | None = None, **others
) -> GatedNetwork:
    """The same network on the meta device, where it has shapes and no memory. Raises InputError also if it cannot take images of
    image_size x image_size pixels."""
    if ":" in name:  # it must have been read for this
        return build(name, num_classes, width, image_size, streams=streams, **others).to("meta")
    with torch.device("meta"):
        network = build(name, num_classes, width, image_size, streams=streams, **others)
    require_image_size(network, image_size)
    return network


def require_image_size(network: GatedNetwork, size: int) -> None:
    """Raise InputError if `network`, which is left in training mode, cannot take images of size x size pixels."""
    with torch.no_grad(), frozen_statistics(network.train()):
        try:
            network(torch.zeros(2, 3, size, size, device=next(network.parameters()).device))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"key 'data.image_size': the network cannot take images of {size}x{size} pixels "
                f"({str(error).splitlines()[0]}); change it or key 'model.name'"
            ) from None
