"""Passes through the open channels only give what those of all channels with closed gates give, forwards and backwards."""

import copy
import random

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets import masks
from dnal_dist.nets.gated import GatedBatchNorm, frozen_statistics
from dnal_dist.nets.masks import rescue
from dnal_dist.nets.slim import why_not


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
    net = nets.build(name, streams=streams, width=0.25 if "supernet" in name else 0.5, image_size=8).double()
    for norm in (module for module in net.modules() if isinstance(module, GatedBatchNorm)):
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    keep, _ = rescue(net, torch.rand(net.num_gates) < share)
    slim, before = copy.deepcopy(net), copy.deepcopy(dict(net.named_buffers()))
    slim.slim_to(keep)
    assert slim.slim is not None and why_not(net, keep) == ""
    assert slim.state_dict().keys() == net.state_dict().keys()
    (loss, gates, weights, statistics), (own_loss, own_gates, own_weights, own_statistics) = (
        trained_once(one, keep) for one in (net, slim)
    )
    assert abs(loss - own_loss) < 1e-12
    assert torch.allclose(gates[keep], own_gates[keep], atol=1e-12, rtol=1e-9)
    for parameter, gradient in weights.items():
        # Zero where nothing is open, never absent: what synchronises gradients waits for each.
        assert torch.allclose(gradient, own_weights[parameter], atol=1e-12, rtol=1e-9), parameter
    there = net.by_site(masks.present(net, keep))
    for buffer, found in own_statistics.items():
        moved = found != before[buffer]
        assert torch.allclose(found[moved], statistics[buffer][moved], atol=1e-12, rtol=1e-9), buffer
        site = buffer.rpartition(".")[0]
        if streams == "free" and site in there:  # sites of tied ones are called after one of their layers
            assert moved[there[site]].all(), buffer
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


class Changed(torch.nn.Sequential):
    """In training, other than in evaluation."""

    def forward(self, x):
        x = super().forward(x)
        return self.change(x) if self.training else x


class Noisy(Changed):
    def change(self, x):
        return x * (torch.rand_like(x) > 0.1)


class Dropping(Changed):
    def change(self, x):
        return x if random.random() < 0.9 else torch.zeros_like(x)


class Larger(Changed):
    def change(self, x):
        return 10 * x


def network(kind: type, *behind: torch.nn.Module):
    torch.manual_seed(0)
    parts = [module for _ in range(2) for module in (torch.nn.LazyConv2d(8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())]
    module, images = torch.nn.Sequential(kind(*parts), *behind, torch.nn.Flatten(), torch.nn.LazyLinear(4)), torch.randn(2, 3, 8, 8)
    module(images)
    return nets.gate(module, images)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (lambda: network(torch.nn.Sequential), ""),
        (lambda: network(torch.nn.Sequential, torch.nn.Dropout(0.0)), ""),
        (lambda: network(torch.nn.Sequential, torch.nn.Dropout(0.1)), "is a Dropout, which is not supported"),
        (lambda: network(Noisy), "draws random numbers"),
        (lambda: network(Dropping), "draws random numbers"),
        (lambda: network(Larger), "would not give the same"),
    ],
    ids=["plain", "no dropout", "dropout", "noisy", "dropping", "larger"],
)
def test_what_draws_random_numbers_or_differs_in_training_is_computed_whole(net, why):
    net = net()
    keep, _ = rescue(net, torch.rand(net.num_gates, generator=torch.Generator().manual_seed(0)) < 0.5)
    before = torch.get_rng_state(), random.getstate()
    found = why_not(net, keep)
    assert why in found and bool(why) == bool(found)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize(("name", "streams"), [("resnet_digits", "tied"), ("supernet_digits", "free")])
def test_passes_in_bf16(name, streams, autocast):
    """As DDP takes them, and as ZeRO does, whose statistics stay in float32."""
    torch.manual_seed(0)
    net = nets.build(name, streams=streams, width=0.5).train()
    keep, _ = rescue(net, torch.rand(net.num_gates) < 0.1)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    if not autocast:
        statistics = copy.deepcopy([buffer for _, buffer in net.named_buffers()])
        net, images = net.bfloat16(), images.bfloat16()
        for (_, buffer), before in zip(net.named_buffers(), statistics, strict=True):
            buffer.data = before
    slim, losses = copy.deepcopy(net), []
    slim.slim_to(keep)
    for one in (net, slim):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(torch.nn.functional.cross_entropy(one(images, keep.float()).float(), labels))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    assert abs(losses[0] - losses[1]) < 0.1 * losses[0]


def test_a_norm_without_weights_behind_what_has_closed():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
            self.first = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
            self.second, self.norm = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8, affine=False)
            self.last = torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.last((x + self.norm(self.second(self.first(x)))).mean((2, 3)))

    net = nets.gate(Branches(), torch.randn(2, 3, 8, 8))
    keep = torch.ones(net.num_gates, dtype=torch.bool)
    keep[net.gates_of(next(site for site in net.gate_sites if site.startswith("first")))] = False
    assert why_not(net, rescue(net, keep)[0]) == ""
