"""Gated networks by name."""

from dnal_dist.nets.gated import Feed, GatedBatchNorm, GatedNetwork, Layer, computing_again, resting_statistics
from dnal_dist.nets.mobilenet import mobilenetv2_cifar, mobilenetv2_imagenet
from dnal_dist.nets.resnet import resnet50_imagenet, resnet56_cifar, resnet_digits
from dnal_dist.nets.supernet import proxyless_supernet, supernet_digits
from dnal_dist.nets.vgg import vgg16_cifar, vgg16_imagenet, vgg_digits

__all__ = ["NETWORKS", "Feed", "GatedBatchNorm", "GatedNetwork", "Layer", "build", "computing_again", "resting_statistics"]

NETWORKS = {
    network.__name__: network
    for network in (
        *(vgg16_cifar, resnet56_cifar, mobilenetv2_cifar),
        *(vgg16_imagenet, resnet50_imagenet, mobilenetv2_imagenet, proxyless_supernet),
        *(vgg_digits, resnet_digits, supernet_digits),
    )
}


def build(name: str, num_classes: int | None = None, width: float = 1.0) -> GatedNetwork:
    """The network called `name`, its channel counts times `width`, freshly initialised from torch's global generator.

    Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"key 'model.name': no network is called {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](width=width) if num_classes is None else NETWORKS[name](num_classes, width)
