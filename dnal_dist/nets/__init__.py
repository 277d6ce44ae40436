"""Gated networks by name."""

from collections.abc import Sequence

import torch

from dnal_dist.common.errors import InputError
from dnal_dist.nets.gate import AnyNetwork, gate
from dnal_dist.nets.gated import Feed, GatedBatchNorm, GatedNetwork, Layer, computing_again, frozen_statistics
from dnal_dist.nets.libraries import make
from dnal_dist.nets.mobilenet import mobilenetv2_cifar, mobilenetv2_imagenet
from dnal_dist.nets.resnet import resnet50_imagenet, resnet56_cifar, resnet_digits
from dnal_dist.nets.supernet import proxyless_supernet, supernet_digits
from dnal_dist.nets.vgg import vgg16_cifar, vgg16_imagenet, vgg_digits

__all__ = [
    "NETWORKS",
    "AnyNetwork",
    "Feed",
    "GatedBatchNorm",
    "GatedNetwork",
    "Layer",
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
    streams: what layers close that write to one residual stream. "tied": the same channels, for which one of NETWORKS is read
    likewise; "free", and None for NETWORKS: each its own.

    Raises InputError for an unknown name, and for a width or number of classes that takes more memory than there is.
    """
    example = torch.zeros(2, 3, image_size, image_size)
    if ":" in name:
        if width != 1:
            raise InputError(f"key 'model.width': {name} has no width; give what it takes by key 'model.arguments'")
        if streams == "free":
            raise InputError(f"key 'architecture.streams': free is for {', '.join(NETWORKS)}; remove it")
        return gate(make(name, num_classes, arguments), example, ignore, check)
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
    return gate(network, example, ignore, check) if streams == "tied" else network


def on_meta(
    name: str, num_classes: int | None, width: float, image_size: int, streams: str | None = None, **others
) -> GatedNetwork:
    """The same network on the meta device, where it has shapes and no memory. Raises InputError also if it cannot take images of
    image_size x image_size pixels."""
    if ":" in name or streams == "tied":  # it must have been read for this
        return build(name, num_classes, width, image_size, streams=streams, **others).to("meta")
    with torch.device("meta"):
        network = build(name, num_classes, width, image_size, **others)
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
