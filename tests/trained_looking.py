"""Networks of this project whose BatchNorms do something, as after a training."""

import torch

from dnal_dist import nets
from dnal_dist.nets.masks import all_open, rescue

# Image size, and width: the full one is slow in float64, and tells nothing more.
NETWORKS = {
    **{"vgg_digits": (8, 1), "resnet_digits": (8, 1), "supernet_digits": (8, 1)},
    **{"vgg16_cifar": (32, 0.25), "resnet56_cifar": (32, 1), "mobilenetv2_cifar": (16, 0.25)},
    **{"vgg16_imagenet": (32, 0.125), "resnet50_imagenet": (32, 0.25), "mobilenetv2_imagenet": (32, 0.25)},
    "proxyless_supernet": (32, 0.125),
}


def trained_looking(name: str, width: float = 1, mask=None) -> tuple[nets.GatedNetwork, torch.Tensor]:
    """A network in float64 and eval mode whose BatchNorms do something, with activations of the order of 1 where only the
    channels of mask(net) stay; and these channels."""
    net = nets.build(name, width=width)
    norms = [module for module in net.modules() if isinstance(module, nets.GatedBatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1)
            # Far enough above zero that a chain of single channels does not die in a ReLU.
            norm.bias.uniform_(1, 2)
            norm.momentum = 1.0
        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        keep, _ = rescue(net, all_open(net) if mask is None else mask(net))
        net(torch.randn(8, 3, *(NETWORKS[name][0],) * 2), keep.float())
    return net.double().eval(), keep
