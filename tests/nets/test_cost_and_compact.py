"""Costs equal the published integers; the compact network equals the masked one, and costs what was counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trained_looking import NETWORKS, trained_looking

from dnal_dist import nets
from dnal_dist.nets import compact, cost
from dnal_dist.nets.masks import all_open, present


@pytest.mark.parametrize(
    "name, image_size, exact, paper",
    [
        ("vgg16_cifar", 32, (313_463_808, 14_991_946), (313_472_778, 14_990_922)),
        ("resnet56_cifar", 32, (125_485_696, 853_018), (125_487_738, 853_018)),
        ("mobilenetv2_cifar", 32, (91_154_944, 2_296_922), (91_172_498, 2_296_922)),
        ("vgg16_imagenet", 224, (15_470_264_320, 138_382_376), (15_470_281_960, 138_365_992)),
        ("resnet50_imagenet", 224, (4_089_184_256, 25_557_032), (4_089_207_976, 25_549_352)),
        ("mobilenetv2_imagenet", 224, (300_774_272, 3_504_872), (300_792_328, 3_504_872)),
        ("proxyless_supernet", 224, (2_260_347_776, 16_034_168), (2_260_456_600, 16_034_168)),
    ],
)
def test_full_networks_cost_what_was_published(name, image_size, exact, paper):
    with torch.device("meta"):
        net = nets.build(name)
    assert cost.count(net, image_size) == exact
    assert cost.count(net, image_size, rule="paper") == paper
    assert cost.count(net, image_size).params == sum(p.numel() for p in net.parameters())


def paper_cost_by_hand(net, image_size: int, keep: torch.Tensor) -> tuple[int, int]:
    """The paper's rule for a residual network, told anew: every layer loses the outputs that it closed, and the input columns
    of what the layer before it closed; nothing else."""
    live = {site: int(part.sum()) for site, part in net.by_site(keep).items()}
    side = image_size
    macs, params, before = side**2 * 9 * 3 * live["stem"] + live["stem"], 9 * 3 * live["stem"] + 2 * live["stem"], live["stem"]
    for s, stage in enumerate(net.stages):
        side = side // 2 if s else side
        for b in range(len(stage)):
            for conv in ("conv1", "conv2"):
                outputs = live[f"stages.{s}.{b}.{conv}"]
                macs += side**2 * 9 * before * outputs + outputs
                params += 9 * before * outputs + 2 * outputs
                before = outputs
    return macs + before * 10 + 10, params + before * 10 + 10


def mobilenet_paper_cost_by_hand(net, image_size: int, keep: torch.Tensor) -> tuple[int, int]:
    """For MobileNetV2: an expand and a shortcut convolution keep all outputs, and read what the project before them left open."""
    live = {site: int(part.sum()) for site, part in net.by_site(keep).items()}
    stem = net.stem.conv
    side, before = image_size // stem.stride[0], stem.out_channels
    macs, params = side**2 * 27 * before + before, 27 * before + 2 * before

    def add(side, weights, outputs):
        nonlocal macs, params
        macs, params = macs + side**2 * weights + outputs, params + weights + 2 * outputs

    for b, block in enumerate(net.blocks):
        depthwise, project = live[f"blocks.{b}.depthwise"], live[f"blocks.{b}.project"]
        if block.expand is not None:
            hidden = block.expand.conv.out_channels
            add(side, before * hidden, hidden)
        if block.shortcut is not None:
            outputs = block.shortcut.conv.out_channels
            add(side, before * outputs, outputs)
        side = side // block.stride
        add(side, 9 * depthwise, depthwise)
        add(side, depthwise * project, project)
        before = project
    add(side, before * live["last"], live["last"])
    outputs = net.num_classes
    return macs + live["last"] * outputs + outputs, params + live["last"] * outputs + outputs


def resnet50_paper_cost_by_hand(net, image_size: int, keep: torch.Tensor) -> tuple[int, int]:
    """For ResNet50: its downsample convolutions are counted as they stand, without their BatchNorm."""
    live = {site: int(part.sum()) for site, part in net.by_site(keep).items()}
    side, before = image_size // 4, live["stem"]
    macs, params = (2 * side) ** 2 * 147 * before + before, 147 * before + 2 * before
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            for conv, area in (("conv1", 1), ("conv2", 9), ("conv3", 1)):
                side = side // block.stride if conv == "conv2" else side
                outputs = live[f"stages.{s}.{b}.{conv}"]
                macs += side**2 * area * before * outputs + outputs
                params += area * before * outputs + 2 * outputs
                before = outputs
            if block.downsample is not None:
                weights = block.downsample.conv.weight.numel()
                macs, params = macs + side**2 * weights, params + weights
    outputs = net.num_classes
    return macs + before * outputs + outputs, params + before * outputs + outputs


@pytest.mark.parametrize("name", ["mobilenetv2_cifar", "mobilenetv2_imagenet", "resnet50_imagenet"])
def test_paper_rule_of_any_mask_is_the_one_told_by_hand(name):
    torch.manual_seed(0)
    with torch.device("meta"):
        net = nets.build(name, width=0.5)
    by_hand = resnet50_paper_cost_by_hand if name.startswith("resnet") else mobilenet_paper_cost_by_hand
    for share in (1.1, 0.8, 0.3):
        keep = torch.rand(net.num_gates) < share
        assert cost.count(net, 64, keep, "paper") == by_hand(net, 64, keep)


def test_paper_rule_of_the_supernet_sees_the_cell_before():
    """An input channel is closed when all candidates of the cell before closed it; expand convolutions keep all outputs."""
    net = nets.build("supernet_digits")
    full = cost.count(net, 8, rule="paper")
    keep = all_open(net)
    parts = net.by_site(keep)
    for name, _ in net.stages[0]["cells"][1].named_children():
        parts[f"stages.0.cells.1.{name}.project"][3] = False
    # 4x4 positions: the six project convolutions lose one of 12 outputs, the next cell's expand convolutions one of 12 inputs.
    hidden = 12 * 3 * (3 + 6)
    lost = 16 * hidden + 6 + 16 * hidden
    assert cost.count(net, 8, keep, "paper") == (full.macs - lost, full.params - 2 * hidden - 2 * 6)
    parts["stages.0.cells.1.k3e3.project"][3] = True
    assert cost.count(net, 8, keep, "paper").macs == full.macs - 16 * (hidden - 36) - 5
    parts["stages.0.cells.1.k3e3.project"][:] = False
    left = full.macs - 16 * (hidden - 36) - 5 - 16 * 36 * 12 - 12
    # The depthwise convolution before it stays, and so do the columns that other candidates write to, all but the one of channel 3.
    assert cost.count(net, 8, keep, "paper").macs == left - 16 * hidden


@pytest.mark.parametrize("name", ["resnet_digits", "resnet56_cifar"])
def test_paper_rule_sees_only_the_layer_before(name):
    torch.manual_seed(0)
    net, (image_size, _) = nets.build(name), NETWORKS[name]
    masks = [all_open(net), torch.rand(net.num_gates) < 0.5]
    for site in ("stem", "stages.0.0.conv1", "stages.0.1.conv2", "stages.2.1.conv1"):
        masks.append(all_open(net))
        net.by_site(masks[-1])[site][:] = False
    for keep in masks:
        assert cost.count(net, image_size, keep, "paper") == paper_cost_by_hand(net, image_size, keep)


@pytest.mark.parametrize("site", ["conv1", "conv2", "conv3"])
def test_present_channels_are_those_of_the_compact_network(site):
    torch.manual_seed(0)
    net, keep = trained_looking("resnet50_imagenet", 0.25)
    net.by_site(keep)[f"stages.0.1.{site}"][:] = False
    small = compact.compact(net, keep)
    ungated = sum(block.downsample.norm.num_features for stage in net.stages for block in stage if block.downsample is not None)
    channels = sum(m.out_channels for m in small.modules() if isinstance(m, torch.nn.Conv2d))
    channels += sum(p.numel() for name, p in small.named_parameters() if "constant" in name)
    assert int(present(net, keep).sum()) == channels - ungated
    rows = {row["site"]: row["outputs"][0] for row in cost.by_layer(net, 32, keep) if row["site"]}
    assert sum(rows.values()) == channels - ungated and rows[f"stages.0.1.{site}"] == 0


def random_mask(net: nets.GatedNetwork, kind: str) -> torch.Tensor:
    if kind == "sites closed":
        keep = torch.rand(net.num_gates) < 0.6
        for part in net.by_site(keep).values():
            if torch.rand(()) < 0.5:
                part[:] = False
        return keep
    if kind == "one channel each":
        keep = torch.zeros(net.num_gates, dtype=torch.bool)
        for part in net.by_site(keep).values():
            part[torch.randint(len(part), ())] = True
        return keep
    return torch.rand(net.num_gates) < {"all": 2.0, "most": 0.8, "few": 0.2, "none": -1.0}[kind]


KINDS = ["all", "most", "few", "one channel each", "sites closed", "none"]


# The large supernet is of the small one's modules.
@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in NETWORKS for kind in (["most"] if name == "proxyless_supernet" else KINDS)]
)
def test_compact_equals_masked_and_costs_what_was_counted(name, kind):
    torch.manual_seed(hash_of(name, kind))
    image_size, width = NETWORKS[name]
    net, keep = trained_looking(name, width, lambda net: random_mask(net, kind))
    small = compact.compact(net, keep)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        masked, found = net(images, small.keep.double()), small(images)
    assert (masked[0] - masked[1]).abs().max() > 1e-4, "not a constant"
    assert float((masked - found).abs().max()) <= 1e-10

    counted = cost.count(net, image_size, small.keep)
    again = compact.build(compact.describe(small)).eval()
    with FlopCounterMode(display=False) as flops:
        again(images[:1].float())
    assert flops.get_total_flops() == 2 * counted.macs
    assert sum(p.numel() for p in small.parameters()) == counted.params
    expected = cost.expected(net, image_size, small.keep.double())
    assert (expected.macs.item(), expected.params.item()) == pytest.approx(counted, rel=1e-12)

    again.double().load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), found)
    again.train()(images.repeat(2, 1, 1, 1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters()), "it can be trained"


def hash_of(*words) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate("".join(words))) % 2**31


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits", "supernet_digits", "resnet50_imagenet"])
def test_expected_cost_has_the_right_gradient(name, unit, hard):
    """At hard gates too, where a product of closed channels has factors of 0."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = nets.build(name, width=0.25)
    gates = torch.rand(net.num_gates, dtype=torch.float64)
    gates = (gates < 0.7).double() if hard else gates
    step = torch.randn(net.num_gates, dtype=torch.float64) * 1e-6
    (gradient,) = torch.autograd.grad(getattr(cost.expected(net, 64, gates.requires_grad_()), unit), gates)
    with torch.no_grad():
        moved = getattr(cost.expected(net, 64, gates + step), unit) - getattr(cost.expected(net, 64, gates - step), unit)
    assert float(moved) == pytest.approx(2 * float(gradient @ step), rel=1e-4)
    assert gradient.any()


def expected_by_hand(net, image_size: int, gates: torch.Tensor) -> float:
    """MACs of a residual network of basic blocks, gates taken as independent chances, told anew."""
    g = net.by_site(gates)
    side, closed = image_size, 1 - g["stem"]
    total = side**2 * 9 * 3 * g["stem"].sum()
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            side = side // block.stride
            one, two = g[f"stages.{s}.{b}.conv1"], g[f"stages.{s}.{b}.conv2"]
            total += side**2 * 9 * (1 - closed).sum() * one.sum() * (1 - (1 - two).prod())
            total += side**2 * 9 * one.sum() * two.sum() * (1 - (1 - one).prod())
            closed = torch.nn.functional.pad(closed, (block.pad, block.pad), value=1.0) * (1 - two)
    return float(total + (1 - closed).sum() * net.num_classes)


def test_expected_cost_of_soft_gates_is_that_of_independent_chances():
    torch.manual_seed(0)
    net = nets.build("resnet_digits")
    for gates in (torch.rand(net.num_gates), torch.rand(net.num_gates) * 0.1):
        gates = gates.double()
        assert cost.expected(net, 8, gates).macs.item() == pytest.approx(expected_by_hand(net, 8, gates), rel=1e-9)
