"""Weights of other programs, and networks that take them."""

import json

import torch
import torchvision

from dnal_dist import recipe
from dnal_dist.training import pretrained


def theirs(name: str, classes: int = 1000) -> torch.nn.Module:
    """torchvision's network with random weights and affines, for evaluation. Its statistics are random, but near those of some
    images, or what tells images apart would be lost within a few layers."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=classes)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(0, 0.1)
            norm.momentum = 1.0
        net(torch.randn(2, 3, 64, 64))
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= 0.8 + 0.4 * torch.rand(norm.num_features)
        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias.normal_(0, 0.1)
    return net.eval()


def given(tensors: dict, origin: str = "a test") -> pretrained.Source:
    return pretrained.Source(dict(tensors), origin, [])


def filled(net, tensors: dict, model: str) -> list[str]:
    return pretrained.fill(net, given(tensors), model)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def settings(source: str, model: str = "vgg_digits") -> recipe.Recipe:
    return recipe.load("recipes/digits.yaml", [f"model.init_from={json.dumps(source)}", f"model.name={model}"])
