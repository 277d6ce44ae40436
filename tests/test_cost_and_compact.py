"""Costs equal the published integers; the compact network equals the masked one, and costs what was counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dnal_dist import compact, cost, nets

NETWORKS = {"vgg_digits": 8, "resnet_digits": 8, "vgg16_cifar": 32, "resnet56_cifar": 32}


@pytest.mark.parametrize(
    "name, image_size, exact, paper",
    [
        ("vgg16_cifar", 32, (313_463_808, 14_991_946), (313_472_778, 14_990_922)),
        ("resnet56_cifar", 32, (125_485_696, 853_018), (125_487_738, 853_018)),
        ("vgg16_imagenet", 224, (15_470_264_320, 138_382_376), (15_470_281_960, 138_365_992)),
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


@pytest.mark.parametrize("name", ["resnet_digits", "resnet56_cifar"])
def test_paper_rule_sees_only_the_layer_before(name):
    torch.manual_seed(0)
    net, image_size = nets.build(name), NETWORKS[name]
    masks = [cost.all_open(net), torch.rand(net.num_gates) < 0.5]
    for site in ("stem", "stages.0.0.conv1", "stages.0.1.conv2", "stages.2.1.conv1"):
        masks.append(cost.all_open(net))
        net.by_site(masks[-1])[site][:] = False
    for keep in masks:
        assert cost.count(net, image_size, keep, "paper") == paper_cost_by_hand(net, image_size, keep)


def test_useful_channels_are_those_of_the_compact_network():
    torch.manual_seed(0)
    net = trained_looking("resnet_digits")
    keep = cost.all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:] = False
    useful = cost.useful(net, keep)
    assert not net.by_site(useful)["stages.0.0.conv1"].any(), "what feeds only a closed layer goes with it"
    convolutions = [m for m in compact.compact(net, keep).modules() if isinstance(m, torch.nn.Conv2d)]
    assert int(useful.sum()) == sum(conv.out_channels for conv in convolutions)


def trained_looking(name: str) -> nets.GatedNetwork:
    """A network in float64 whose BatchNorms do something, in eval mode, with outputs of the order of 1."""
    net = nets.build(name).double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nets.GatedBatchNorm):
                module.weight.uniform_(0.5, 1.5)
                # Above zero, so that a chain of single channels does not die in a ReLU.
                module.bias.uniform_(0.5, 1)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    return net


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


@pytest.mark.filterwarnings("ignore:all channels of")
@pytest.mark.parametrize("kind", ["all", "most", "few", "one channel each", "sites closed", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_compact_equals_masked_and_costs_what_was_counted(name, kind):
    torch.manual_seed(hash_of(name, kind))
    net, image_size = trained_looking(name), NETWORKS[name]
    small = compact.compact(net, random_mask(net, kind))
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        masked, found = net(images, small.keep.double()), small(images)
    assert float(masked.std()) > 1e-3
    assert float((masked - found).abs().max()) <= 1e-10

    counted = cost.count(net, image_size, small.keep)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        small(images[:1])
    assert flops.get_total_flops() == 2 * counted.macs
    assert sum(p.numel() for p in small.parameters()) == counted.params
    assert float(cost.expected_macs(net, image_size, small.keep.double())) == pytest.approx(counted.macs, rel=1e-12)

    again = compact.build(compact.describe(small)).double().eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), found)


def hash_of(*words) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate("".join(words))) % 2**31


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits"])
def test_expected_cost_has_the_right_gradient(name):
    torch.manual_seed(0)
    net = nets.build(name)
    gates = torch.rand(net.num_gates, dtype=torch.float64, requires_grad=True)
    macs = cost.expected_macs(net, 8, gates)
    (gradient,) = torch.autograd.grad(macs, gates)
    step = torch.randn(net.num_gates, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        moved = cost.expected_macs(net, 8, gates + step) - cost.expected_macs(net, 8, gates - step)
    assert float(moved) == pytest.approx(2 * float(gradient @ step), rel=1e-5)
    assert (gradient >= 0).all() and gradient.any()


def test_shortcut_keeps_the_stream_and_the_branch_shrinks():
    """Closing channels of a branch's last convolution leaves the stream as wide as the shortcut makes it."""
    torch.manual_seed(0)
    net = trained_looking("resnet_digits")
    keep = cost.all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:12] = False
    block = compact.compact(net, keep)[3]
    assert (block.width, len(block.carry), len(block.add)) == (16, 16, 4)
    assert block.branch[3].out_channels == 4


def test_a_closed_branch_is_gone_and_one_that_lost_its_input_is_a_constant():
    torch.manual_seed(0)
    net = trained_looking("resnet_digits")
    keep = cost.all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:] = False
    net.by_site(keep)["stages.0.1.conv1"][:] = False
    small = compact.compact(net, keep)
    assert len(small[3].branch) == 0
    assert isinstance(small[5].branch[0], compact.Constant)


def test_a_site_that_must_stay_keeps_its_strongest_channel_with_a_warning():
    net = nets.build("vgg_digits")
    keep = cost.all_open(net)
    net.by_site(keep)["stages.1.0"][:] = False
    strength = torch.zeros(net.num_gates)
    net.by_site(strength)["stages.1.0"][7] = 1
    rescued, sites = compact.rescue(net, keep, strength)
    assert sites == ["stages.1.0"]
    assert net.by_site(rescued)["stages.1.0"].nonzero().flatten().tolist() == [7]
    assert not net.by_site(keep)["stages.1.0"].any(), "the caller's mask is left alone"
    with pytest.warns(UserWarning, match=r"stages\.1\.0"):
        small = compact.compact(net, keep)
    assert int(net.by_site(small.keep)["stages.1.0"].sum()) == 1


def test_a_shortcut_saves_a_branch_from_rescue_but_not_the_stem():
    net = nets.build("resnet_digits")
    _, sites = compact.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool))
    assert sites == ["stem"]


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits"])
def test_reopening_reaches_the_floor_with_as_few_channels_as_can_be(name):
    torch.manual_seed(0)
    net = nets.build(name)
    alpha = torch.randn(net.num_gates)
    closed, _ = compact.rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), alpha)
    keep, collapsed = compact.reopen(net, 8, closed, alpha, 0.05)
    full = cost.count(net, 8).macs
    assert collapsed and cost.count(net, 8, keep).macs >= 0.05 * full
    shares = []
    for site, part in net.by_site(keep).items():
        strength = net.by_site(alpha)[site]
        if part.any() and not part.all():
            assert strength[part].min() > strength[~part].max(), f"{site}: the strongest channels come first"
        shares.append((int(part.sum()) - 1) / len(part))
    assert max(shares) - min(shares) <= 1 / 8
    fewer = keep.clone()
    for part, site_alpha in zip(net.by_site(fewer).values(), net.by_site(alpha).values(), strict=True):
        part[part & (site_alpha == site_alpha[part].min())] = False
    assert cost.count(net, 8, fewer).macs < 0.05 * full
    untouched, collapsed = compact.reopen(net, 8, cost.all_open(net), alpha, 0.05)
    assert untouched.all() and not collapsed


def test_saved_compact_network_loads_and_a_wrong_one_is_told(tmp_path):
    torch.manual_seed(0)
    net = nets.build("resnet_digits").eval()
    small = compact.compact(net, torch.rand(net.num_gates) < 0.7)
    compact.save(small, tmp_path / "compact", name="resnet_digits")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(compact.load(tmp_path / "compact")(images), small(images))
    (tmp_path / "compact" / "architecture.json").write_text('{"network": [["system", ["true"]]]}')
    with pytest.raises(ValueError, match="no compact network can be loaded"):
        compact.load(tmp_path / "compact")
    with pytest.raises(ValueError, match="nowhere"):
        compact.load(tmp_path / "nowhere")


def test_compaction_leaves_the_gated_network_alone():
    torch.manual_seed(0)
    net = nets.build("resnet_digits")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = compact.compact(net, torch.rand(net.num_gates) < 0.7)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
