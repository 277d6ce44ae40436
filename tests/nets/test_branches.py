"""Branches around which there is a way close as a whole; the compact network has one number a channel in their place."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import SIZE, Small

from dnal_dist import nets
from dnal_dist.nets import compact, cost, masks
from dnal_dist.nets.checking import EXACT
from dnal_dist.nets.gate import gate


class Bottleneck(Small):
    """Three convolutions with BatchNorms and in-place activations around a shortcut."""

    sites = (("c1.0", "c2.0"),)

    def add_body(self, channels):
        for name, (inputs, outputs, kernel) in {"c1": (channels, 6, 1), "c2": (6, 5, 3), "c3": (5, channels, 1)}.items():
            layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
            self.add_module(name, nn.Sequential(*layers))

    def body(self, x):
        out = F.relu(self.c1(x), inplace=True)
        out = self.c3(F.hardswish(self.c2(out), inplace=True))
        out += x
        return F.relu(out, inplace=True)


class Inverted(Small):
    """A depthwise convolution, squeeze and excitation by Linear layers, and a scale for each channel of what is added."""

    sites = (("depthwise",),)

    def add_body(self, channels):
        self.wide, self.depthwise = nn.Conv2d(channels, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm1, self.norm2 = nn.BatchNorm2d(12), nn.BatchNorm2d(channels)
        self.down, self.up = nn.Linear(12, 4), nn.Linear(4, 12)
        self.project, self.scale = nn.Conv2d(12, channels, 1), nn.Parameter(torch.rand(channels, 1, 1))

    def body(self, x):
        out = F.silu(self.norm1(self.depthwise(self.wide(x))))
        squeezed = torch.sigmoid(self.up(F.relu(self.down(out.mean((2, 3))))))
        out = self.norm2(self.project(out * squeezed[:, :, None, None]))
        return x + F.dropout(out, 0.1, self.training) * self.scale


class Candidates(Small):
    """A sum of two branches, without a shortcut."""

    sites = (("a.0",), ("b.0",))

    def add_body(self, channels):
        self.a = nn.Sequential(nn.Conv2d(channels, 7, 1), nn.ReLU(), nn.Conv2d(7, 9, 1), nn.BatchNorm2d(9))
        self.b = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 9, 1), nn.BatchNorm2d(9))

    def features(self, channels):
        return 9

    def body(self, x):
        return self.a(x) + self.b(x)


class ReadElsewhere(Small):
    """What the branch computes is read by something else, too."""

    sites = ()

    def add_body(self, channels):
        self.inner, self.outer = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)
        self.other = nn.Conv2d(6, channels, 1)

    def body(self, x):
        inner = F.relu(self.inner(x))
        return F.relu(x + self.outer(inner)) * torch.sigmoid(self.other(inner))


class Bordered(Small):
    """What is left of the branch would not be the same at the border, where the last convolution pads zeros."""

    def add_body(self, channels):
        self.first, self.second = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, 5, 1)
        self.last = nn.Conv2d(5, channels, 3, padding=1)

    def body(self, x):
        return x + self.last(F.relu(self.second(F.relu(self.first(x)))))


class ChannelsBehind(Small):
    """Channels in the last dimension, as transformers have them."""

    sites = ()

    def add_body(self, channels):
        self.first, self.second = nn.Linear(channels, 6), nn.Linear(6, channels)

    def body(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.relu(x + self.second(F.relu(self.first(x)))).permute(0, 3, 1, 2)


class CalledElsewhere(Small):
    """A layer of two branches, and one that is called outside of its branch, too."""

    sites = (("a",), ("b",))

    def add_body(self, channels):
        self.common, self.a, self.b = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.a2, self.b2 = nn.Conv2d(5, channels, 1), nn.Conv2d(4, channels, 1)
        self.again, self.act = nn.Conv2d(channels, channels, 1), nn.PReLU()

    def body(self, x):
        x = x + self.a2(self.act(self.a(F.relu(self.common(x)))))
        x = x + self.b2(F.relu(self.b(F.relu(self.common(x)))))
        return self.act(self.again(F.relu(x + self.again(x))))


class AddedTwice(Small):
    """One branch that is added in two places, under the name that is given to what is left of it."""

    sites = (("constant.0",), ("constant.0",))

    def add_body(self, channels):
        self.constant = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.ReLU(), nn.Conv2d(6, channels, 1))
        self.other = nn.Conv2d(channels, channels, 1)

    def features(self, channels):
        return 2 * channels

    def body(self, x):
        out = self.constant(x)
        return F.relu(torch.cat([x + out, self.other(x) + out], 1))


class Positioned(Small):
    """A number for each position is added within the branch."""

    sites = ()

    def add_body(self, channels):
        self.first, self.second = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)
        self.position = nn.Parameter(torch.rand(1, channels, SIZE, SIZE))

    def body(self, x):
        return x + (self.second(F.relu(self.first(x))) + self.position)


KINDS = [Bottleneck, Inverted, Candidates, ReadElsewhere, ChannelsBehind, CalledElsewhere, AddedTwice, Positioned]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def network(request):
    torch.manual_seed(0)
    network = gate(request.param(), torch.zeros(2, 3, SIZE, SIZE)).double().eval()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() < 2:
            tensor.data.uniform_(0.1, 0.9)
        assert name  # of the module itself
    return network


def closed(network, site: str) -> torch.Tensor:
    keep = masks.all_open(network)
    keep[network.gates_of(site)] = False
    return keep


def of_layers(network) -> list[set[str]]:
    norms = {norm: layer for layer, norm in network.graph.norms.items()}
    return [{norms.get(site, site) for site in branch.sites} for branch in network.branches]


def test_sites_within_a_branch_may_close(network):
    assert of_layers(network) == [set(sites) for sites in type(network.own).sites]


def test_a_closed_branch_leaves_a_number_for_each_channel(network):
    images = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    for branch in network.branches:
        for site in branch.sites:
            keep = closed(network, site)
            assert masks.rescue(network, keep)[1] == []
            small = compact.compact(network, keep)
            masked = network(images, keep.double()).detach()
            difference = (small(images).detach() - masked).abs().max() / masked.abs().max()
            assert float(difference) <= EXACT, site
            left = {path for path, module in small.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
            assert not left & set(branch.layers), site
            assert cost.count(network, SIZE, keep).params == sum(p.numel() for p in small.parameters()), site


def test_what_is_left_is_saved_and_loaded(network, tmp_path):
    for branch in network.branches:
        small = compact.compact(network, closed(network, branch.sites[0])).float()
        compact.save(small, tmp_path / branch.sites[0])
        images = torch.randn(3, 3, SIZE, SIZE)
        assert torch.equal(compact.load(tmp_path / branch.sites[0])(images), small.eval()(images))
        assert json.loads((tmp_path / branch.sites[0] / "architecture.json").read_text())["network"]


def test_what_is_left_trains(network):
    for branch in network.branches:
        small = compact.compact(network, closed(network, branch.sites[0])).train()
        small(torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)).square().sum().backward()
        left = {name: p.grad for name, p in small.named_parameters() if "constant" in name}
        assert left and all(grad is not None and bool((grad != 0).any()) for grad in left.values())


def test_closed_branches_cost_no_more_than_what_is_left_of_them(network):
    for branch in network.branches:
        for site in branch.sites:
            keep = closed(network, site)
            rows = {row["layer"]: row for row in cost.by_layer(network, SIZE, keep)}
            assert all(rows[path]["macs"] == 0 for path in branch.layers)
            assert not masks.present(network, keep)[torch.cat([network.gates_of(s) for s in branch.within])].any()


def test_one_branch_of_a_sum_without_a_shortcut_stays():
    network = gate(Candidates(), torch.zeros(2, 3, SIZE, SIZE))
    first, second = (network.gates_of(branch.sites[0]) for branch in network.branches)
    strength = torch.zeros(network.num_gates)
    strength[second] = torch.arange(1.0, 1 + len(second))
    keep, rescued = masks.rescue(network, torch.zeros(network.num_gates, dtype=torch.bool), strength)
    assert not keep[first].any() and keep[second].tolist() == [False] * 4 + [True]
    assert network.branches[1].sites[0] in rescued


def test_a_branch_that_would_differ_at_the_border_stays():
    network = gate(Bordered(), torch.zeros(2, 3, SIZE, SIZE))
    assert of_layers(network) == [{"second"}]


@pytest.mark.parametrize("name", ["resnet_digits", "supernet_digits"])
def test_a_network_of_ours_is_read_like_any_other(name):
    """Same tensors, same costs by both rules, and a smaller number of gates."""
    torch.manual_seed(0)
    free = nets.build(name)
    torch.manual_seed(0)
    tied = nets.build(name, image_size=8, streams="tied", check=True)
    assert {n: t.shape for n, t in tied.state_dict().items()} == {n: t.shape for n, t in free.state_dict().items()}
    assert cost.both_rules(tied, 8) == cost.both_rules(free, 8)
    assert set(tied.gate_sites) < set(free.gate_sites) and tied.num_gates < free.num_gates
    assert tied.shortcuts() == [block for block in tied.shortcuts() if block.startswith("stages.")] != []
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(tied.eval()(images), free.eval()(images))
