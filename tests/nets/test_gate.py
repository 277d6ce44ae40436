"""Gates for any network: the compact network of any mask equals the masked one, whatever connects its channels."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import (
    KINDS,
    SIZE,
    Dense,
    Depthwise,
    FrozenNorm,
    LayerNormed,
    Residual,
    Scalar,
    Small,
    Tied,
    WeightStandardised,
)

from dnal_dist import nets
from dnal_dist.nets import compact, cost, masks
from dnal_dist.nets.checking import EXACT, check_exact
from dnal_dist.nets.gate import gate


def example(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, SIZE, SIZE)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def network(request):
    torch.manual_seed(0)
    return gate(request.param(), example())


def random_mask(network, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(network.num_gates, generator=generator) < torch.rand((), generator=generator)
    return masks.rescue(network, keep)[0]


def test_the_compact_network_equals_the_masked_one(network):
    assert max(check_exact(network, seed) for seed in range(3)) <= EXACT


def test_open_gates_change_nothing(network):
    images = example(4)
    network.eval()
    torch.testing.assert_close(network(images, torch.ones(network.num_gates)), network(images), rtol=1e-5, atol=1e-5)


def test_every_gate_has_a_gradient(network):
    network.train()
    gates = torch.full((network.num_gates,), 0.5, requires_grad=True)
    with nets.frozen_statistics(network):
        before = copy.deepcopy(network.state_dict())
        logits = network(example(4), gates)
    (gradient,) = torch.autograd.grad(logits.square().sum(), gates)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.7
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_costs_are_those_of_the_compact_network(network):
    keep = random_mask(network, 1)
    small, found = compact.compact(network, keep), []

    def note(module, _, output):
        found.append(output[0].numel() * module.weight[0].numel())

    for module in small.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    small.eval()(example(1))
    assert cost.count(network, SIZE, keep) == (sum(found), sum(p.numel() for p in small.parameters()))


def test_costs_are_differentiable_and_monotone(network):
    gates = torch.full((network.num_gates,), 0.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cost.expected(network, SIZE, gates).macs, gates)
    assert (gradient > 0).all()


def test_a_description_gives_the_network_again(network):
    small = compact.compact(network.eval(), random_mask(network, 2))
    description = json.loads(json.dumps(compact.describe(small)))
    again = compact.restored(description, small.state_dict()).eval()
    images = example(5)
    assert torch.equal(again(images), small(images))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True))


def test_names_are_the_modules_own(network):
    own = dict(network.own.state_dict())
    assert list(network.state_dict()) == list(own)
    kept = compact.compact(network, random_mask(network, 3)).state_dict()
    # A weight that torch computes is a plain one there.
    assert set(kept) <= set(own) | {name.replace("parametrizations.weight.original0", "weight") for name in own}


def test_a_copy_has_its_own_weights_and_gates(network):
    network(example(), torch.full((network.num_gates,), 0.5, requires_grad=True))
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(other.parameters()), next(network.parameters()))
    other.eval(), network.eval()
    assert not torch.equal(other(images := example()), network(images))


def test_the_users_module_is_left_as_it_was():
    module = Residual()
    before = copy.deepcopy(module.state_dict())
    kinds = [type(m) for m in module.modules()]
    gate(module, example())
    assert [type(m) for m in module.modules()] == kinds and module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_activations_computed_again_give_the_same_gradients():
    from dnal_dist.distributed.activation_checkpoint import checkpoint_activations

    torch.manual_seed(0)
    network = gate(Residual(), example()).double().train()
    small, images = compact.compact(network, random_mask(network, 1)).double().train(), example(4).double()
    for plain, inputs in ((network, (images, torch.full((network.num_gates,), 0.6, dtype=torch.float64))), (small, (images,))):
        again = copy.deepcopy(plain)
        checkpoint_activations(again)
        gradients = []
        for net in (plain, again):
            net(*inputs).square().sum().backward()
            gradients.append([p.grad for p in net.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_parts_of_a_second_name_train_and_frozen_norms_stay_frozen():
    assert all(p.requires_grad for p in gate(Tied(), example()).parameters())
    network = gate(FrozenNorm(), example()).train()
    before = network.norm.running_mean.clone()
    network(example(4), torch.full((network.num_gates,), 0.5))
    assert torch.equal(network.norm.running_mean, before) and not network.norm.training


@pytest.mark.parametrize("kind", [Residual, Scalar, WeightStandardised])
def test_what_does_not_train_does_not_in_the_compact_network_either(kind):
    module = kind()
    frozen = {"stem.weight", "norm.bias", "conv.weight", "conv.bias", "place"} & {name for name, _ in module.named_parameters()}
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    small = compact.compact(network := gate(module, example()), random_mask(network, 0))
    again = compact.restored(json.loads(json.dumps(compact.describe(small))), small.state_dict())
    for one in (network, small, again, copy.deepcopy(again)):
        assert {name for name, parameter in one.named_parameters() if not parameter.requires_grad} == frozen
    assert set(dict(again.named_parameters())) == set(dict(small.named_parameters()))


def test_a_layer_closes_with_the_site_that_its_row_names():
    rows = {row["layer"]: row["site"] for row in cost.by_layer(gate(Depthwise(), example()), SIZE)}
    assert rows == {"stem": "deep", "deep": "deep", "point": "point", "head": None}


@pytest.mark.parametrize("kind", [Residual, Dense, LayerNormed])
def test_weights_of_low_precision_stay_so_with_gates(kind):
    network = gate(kind(), example()).bfloat16().train()
    for norm in network.modules():
        if isinstance(norm, nets.GatedBatchNorm):
            norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    assert network(example(4).bfloat16(), torch.full((network.num_gates,), 0.5)).dtype == torch.bfloat16


def test_the_dry_run_takes_what_the_network_is_made_with_behind_options(capsys, monkeypatch):
    from dnal_dist.gate import main

    monkeypatch.setattr("sys.argv", ["gate", "toy_networks:Residual", "--image-size", "16", "--json", "channels=6"])
    main()
    assert json.loads(capsys.readouterr().out)["sites"] == [{"site": "norm", "gates": 6, "coupled": ["conv"]}]


def test_coupled_channels_close_together():
    network = gate(Residual(), example())
    assert network.gate_sites == {"norm": 8} and network.coupled() == {"norm": ["conv"]}
    network = gate(Depthwise(), example())
    assert network.coupled()["deep"] == ["stem"]


# Of the coverage table (docs/networks.md), the oddest parts: concatenation, shuffles, aggregation, splits, groups, weights that are
# computed, LayerNorm.
HARD = [
    *(
        "torchvision:shufflenet_v2_x0_5",
        "torchvision:regnet_y_400mf",
        "torchvision:mobilenet_v3_small",
        "torchvision:squeezenet1_1",
    ),
    *("torchvision:convnext_tiny", "timm:res2net50_26w_4s", "timm:mixnet_s", "timm:cspresnet50", "timm:skresnet18"),
    *("timm:nf_resnet50", "timm:dla34", "timm:gernet_s"),
]


# With fewer of equal blocks, where they can be asked for.
SHORT = {"timm:res2net50_26w_4s": "layers", "timm:skresnet18": "layers", "timm:nf_resnet50": "depths"}


@pytest.mark.parametrize("name", HARD)
def test_networks_of_libraries_are_exact(name):
    pytest.importorskip(name.partition(":")[0], reason="timm is not installed: pip install -e '.[timm]'")
    network = nets.build(name, 10, image_size=64, arguments={SHORT[name]: [2, 1, 1, 1]} if name in SHORT else None)
    assert check_exact(network) <= EXACT


class Named(Small):
    """Children that are called as this project's own attributes are."""

    def add_body(self, channels):
        self.gates, self.steps = nn.Conv2d(channels, 6, 1), nn.BatchNorm2d(6)
        self.graph, self.image_size = nn.Conv2d(6, channels, 1), nn.Parameter(torch.ones(channels, 1, 1))
        self.keep, self.within = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def body(self, x):
        return self.within(F.relu(self.keep(self.graph(F.relu(self.steps(self.gates(x)))) * self.image_size)))


def test_a_module_may_have_children_of_any_name():
    network = gate(Named(), example()).eval()
    small = compact.compact(network, random_mask(network, 0))
    again = compact.restored(json.loads(json.dumps(compact.describe(small))), small.state_dict()).eval()
    images = example(3)
    assert torch.equal(again(images), small(images))
    assert {name.partition(".")[0] for name in small.state_dict()} >= {"gates", "steps", "graph", "image_size", "keep", "within"}
