"""The faster way to the weight gradients of depthwise convolutions gives those of torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnal_dist import nets
from dnal_dist.nets import compact, convolution, masks
from dnal_dist.nets.convolution import Conv2d
from dnal_dist.nets.supernet import Supernet


def gradients(conv: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    images = images.clone().requires_grad_()
    torch.manual_seed(1)
    out = conv(images)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), [images, *conv.parameters()])]


@pytest.fixture
def products(monkeypatch):
    """The calls of the faster way."""
    calls, own = [], convolution.weight_gradient
    monkeypatch.setattr(convolution, "weight_gradient", lambda *arguments: calls.append(1) or own(*arguments))
    return calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        *((7, 1, 3, (6, 6)), (5, 2, 2, (7, 7)), (7, 1, 3, (2, 2)), (5, 1, 0, (9, 6)), ((1, 5), 1, (0, 2), (4, 8))),
        *(((7, 3), (2, 1), (3, 1), (8, 5)), (5, 3, 1, (11, 8)), (4, 1, 2, (5, 5))),
    ],
)
def test_gradients_are_those_of_torch(kernel, stride, padding, size, layout, products):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, stride, padding, groups=6).double()
    faster = copy.deepcopy(plain)
    faster.__class__ = Conv2d
    images = torch.randn(3, 6, *size, dtype=torch.float64).contiguous(memory_format=layout)
    for ours, own in zip(gradients(faster, images), gradients(plain, images), strict=True):
        assert ours.shape == own.shape and torch.allclose(ours, own, rtol=0, atol=1e-12)
    assert products


def test_gradients_have_gradients_and_are_those_of_a_function(products):
    torch.manual_seed(0)
    conv, images = Conv2d(4, 4, 5, padding=2, groups=4).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(conv, (images,))
    parameters = dict(conv.named_parameters())
    assert torch.autograd.gradgradcheck(
        lambda *own: torch.func.functional_call(conv, dict(zip(parameters, own, strict=True)), images), (*parameters.values(),)
    )
    found = torch.func.grad(lambda own: torch.func.functional_call(conv, own, images).square().sum())(parameters)
    expected = torch.autograd.grad(conv(images).square().sum(), [*parameters.values()])
    assert products and all(map(torch.allclose, found.values(), expected))


@pytest.mark.parametrize("changes", [{"groups": 3}, {"dilation": 2}, {"padding_mode": "circular"}, {"kernel_size": 3}])
def test_other_convolutions_take_the_way_of_torch(changes, products):
    settings = {"kernel_size": 5, "padding": 2, "groups": 6} | changes
    gradients(Conv2d(6, 6, **settings), torch.randn(2, 6, 9, 9))
    assert not products


def test_gated_and_compact_networks_take_it(products):
    torch.manual_seed(0)
    net = nets.gate(Supernet([8, 8, 8, 16], [2, 1], [1, 2], 16, 4, 1), torch.zeros(2, 3, 8, 8))
    keep = masks.rescue(net, torch.rand(net.num_gates) < 0.7)[0]
    for network in (net, compact.compact(net, keep), compact.build(compact.describe(compact.compact(net, keep)))):
        products.clear()
        F.cross_entropy(network(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
        assert len(products) > 8
        # Neither without a gradient, nor for a compiler or an export.
        products.clear()
        with torch.no_grad():
            network(torch.randn(2, 3, 8, 8))
        torch.export.export(network.eval(), (torch.randn(2, 3, 8, 8),))
        assert not products
