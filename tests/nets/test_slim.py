"""Passes through the open channels only give what those of all channels with closed gates give, forwards and backwards."""

import copy

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets.gated import GatedBatchNorm, frozen_statistics
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.slim import Slim, is_exact


def trained_once(net, keep: torch.Tensor):
    """Loss, gradients of gates and weights, and statistics after a pass in training."""
    gates = keep.double().requires_grad_()
    images = torch.randn(4, 3, net.image_size, net.image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(net(images, gates), torch.arange(4))
    loss.backward()
    statistics = {name: buffer for name, buffer in net.named_buffers() if "running" in name}
    return loss.item(), gates.grad, {name: p.grad for name, p in net.named_parameters()}, statistics


@pytest.mark.parametrize(
    ("name", "streams", "share"),
    [
        ("vgg_digits", "tied", 0.5),
        # Of these whole branches close.
        ("resnet_digits", "tied", 0.1),
        ("resnet_digits", "free", 0.1),
        ("supernet_digits", "free", 0.1),
    ],
)
def test_a_step_through_open_channels_equals_one_of_all(name, streams, share):
    torch.manual_seed(0)
    net = nets.build(name, streams=streams, width=0.5).double()
    for norm in (module for module in net.modules() if isinstance(module, GatedBatchNorm)):
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    keep, _ = rescue(net, torch.rand(net.num_gates) < share)
    slim, before = copy.deepcopy(net), copy.deepcopy(dict(net.named_buffers()))
    slim.slim_to(keep)
    assert slim.slim is not None and is_exact(net, keep)
    assert slim.state_dict().keys() == net.state_dict().keys()
    (loss, gates, weights, statistics), (own_loss, own_gates, own_weights, own_statistics) = (
        trained_once(one, keep) for one in (net, slim)
    )
    assert abs(loss - own_loss) < 1e-12
    assert torch.allclose(gates[keep], own_gates[keep], atol=1e-12, rtol=1e-9)
    for parameter, gradient in weights.items():
        # Zero where nothing is open, never absent: what synchronises gradients waits for each.
        assert torch.allclose(gradient, own_weights[parameter], atol=1e-12, rtol=1e-9), parameter
    moved = 0
    for buffer, found in own_statistics.items():
        there = found != before[buffer]
        assert torch.allclose(found[there], statistics[buffer][there], atol=1e-12, rtol=1e-9), buffer
        moved += int(there.sum())
    assert moved > 0
    # Logits of evaluation come from them.
    images = torch.randn(2, 3, net.image_size, net.image_size, dtype=torch.float64)
    a, b = (one.eval()(images, keep.double()) for one in (net, slim))
    assert torch.allclose(a, b, rtol=1e-9)


def test_statistics_rest_in_architecture_steps():
    net = nets.build("vgg_digits")
    keep, _ = rescue(net, torch.rand(net.num_gates) < 0.5)
    net.slim_to(keep)
    before = copy.deepcopy(net.state_dict())
    with frozen_statistics(net):
        net(torch.randn(4, 3, 8, 8), keep.float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_what_draws_random_numbers_or_is_of_its_own_kind_is_computed_whole():
    class Noisy(torch.nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x * (torch.rand_like(x) > 0.1) if self.training else x

    def network(noisy: type):
        torch.manual_seed(0)
        parts = [module for _ in range(2) for module in (torch.nn.LazyConv2d(8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())]
        module = torch.nn.Sequential(noisy(*parts), torch.nn.Flatten(), torch.nn.LazyLinear(4))
        module(images)
        return nets.gate(module, images)

    images = torch.randn(2, 3, 8, 8)
    for noisy, exact in ((torch.nn.Sequential, True), (Noisy, False)):
        net = network(noisy)
        keep, _ = rescue(net, torch.rand(net.num_gates, generator=torch.Generator().manual_seed(0)) < 0.5)
        state = torch.get_rng_state()
        assert is_exact(net, keep) is exact
        assert torch.equal(state, torch.get_rng_state())

    parts = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.1), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    dropped = nets.gate(torch.nn.Sequential(*parts), images)
    keep = torch.arange(dropped.num_gates) % 2 == 0
    with pytest.raises(ValueError, match="of its own kind"):
        Slim(dropped, keep)
    assert not is_exact(dropped, keep)
