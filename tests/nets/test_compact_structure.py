"""What is left of shortcuts, branches, candidates and cells in a compact network; what must stay is opened again."""

import pytest
import torch
from trained_looking import trained_looking

from dnal_dist import nets
from dnal_dist.nets import compact, cost, modules
from dnal_dist.nets.masks import all_open, pack, rescue, unpack
from dnal_dist.search import selection


def test_shortcut_keeps_the_stream_and_the_branch_shrinks():
    """Closing channels of a branch's last convolution leaves the stream as wide as the shortcut makes it."""
    torch.manual_seed(0)
    net, _ = trained_looking("resnet_digits")
    keep = all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:12] = False
    block = compact.compact(net, keep)[3]
    assert (block.width, len(block.carry), [len(add) for add in block.adds]) == (16, 16, [4])
    assert block.branches[0][3].out_channels == 4


def test_a_closed_branch_is_gone_and_one_that_lost_its_input_is_a_constant():
    torch.manual_seed(0)
    net, _ = trained_looking("resnet_digits")
    keep = all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:] = False
    net.by_site(keep)["stages.0.1.conv1"][:] = False
    small = compact.compact(net, keep)
    blocks = [module for module in small if isinstance(module, modules.Sum)]
    assert len(blocks) == 5, "nothing is left of the first of six"
    assert isinstance(blocks[0].branches[0][0], modules.Constant)


def test_candidates_and_cells_that_closed_are_gone():
    torch.manual_seed(0)
    net, keep = trained_looking("supernet_digits")
    parts = net.by_site(keep)
    for name in ("k3e6", "k5e3", "k7e6"):
        parts[f"stages.0.cells.0.{name}.project"][:] = False
        parts[f"stages.0.cells.1.{name}.depthwise"][:] = False
    for site in parts:
        if site.startswith("stages.1.cells.1."):
            parts[site][:] = False
    small = compact.compact(net, keep)
    cells = [module for module in small if isinstance(module, modules.Sum)]
    assert len(cells) == 3, "the shortcut is all that is left of the last cell, and it needs no module"
    kinds = [[type(branch[0]).__name__ for branch in cell.branches] for cell in cells]
    # A project convolution without a depthwise one puts out a constant.
    assert kinds == [["Conv2d"] * 3, ["Conv2d"] * 3 + ["Constant"] * 3, ["Conv2d"] * 6]
    assert {branch[3].kernel_size[0] for branch in cells[0].branches} == {3, 5, 7}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, keep.double()), rtol=0, atol=1e-10)


def test_a_bottleneck_that_lost_its_first_convolution_is_a_constant():
    torch.manual_seed(0)
    net, keep = trained_looking("resnet50_imagenet", 0.25)
    net.by_site(keep)["stages.1.1.conv1"][:] = False
    net.by_site(keep)["stages.2.0.conv2"][:] = False
    small = compact.compact(net, keep)
    constants = [branch[0] for module in small if isinstance(module, modules.Sum) for branch in module.branches]
    assert sum(isinstance(first, modules.Constant) for first in constants) == 2
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, keep.double()), rtol=0, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) == cost.count(net, 32, keep).params


def test_rescue_opens_one_way_through_each_cell_that_has_no_shortcut():
    net = nets.build("supernet_digits")
    strength = torch.zeros(net.num_gates)
    net.by_site(strength)["stages.1.cells.0.k5e3.depthwise"][4] = 1
    net.by_site(strength)["stages.1.cells.0.k5e3.project"][2] = 1
    keep, sites = rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), strength)
    ways = {"first.depthwise", "first.project", "stages.1.cells.0.k5e3.depthwise", "stages.1.cells.0.k5e3.project", "last"}
    assert ways < set(sites) and len(sites) == 7 and int(keep.sum()) == 7
    assert net.by_site(keep)["stages.1.cells.0.k5e3.depthwise"].nonzero().flatten().tolist() == [4]
    assert not any(site.startswith(("stages.0.cells.1", "stages.1.cells.1")) for site in sites)
    again, sites = rescue(net, keep, strength)
    assert not sites and torch.equal(again, keep)


def test_a_mask_as_text_is_the_mask():
    for number in (1, 8, 448, 2031):
        keep = torch.rand(number) < 0.5
        assert torch.equal(unpack(pack(keep), number), keep)
    with pytest.raises(ValueError, match="448 channels"):
        unpack(pack(torch.ones(100, dtype=torch.bool)), 448)


def test_a_site_that_must_stay_keeps_its_strongest_channel_with_a_warning():
    net = nets.build("vgg_digits")
    keep = all_open(net)
    net.by_site(keep)["stages.1.0"][:] = False
    strength = torch.zeros(net.num_gates)
    net.by_site(strength)["stages.1.0"][7] = 1
    rescued, sites = rescue(net, keep, strength)
    assert sites == ["stages.1.0"]
    assert net.by_site(rescued)["stages.1.0"].nonzero().flatten().tolist() == [7]
    assert not net.by_site(keep)["stages.1.0"].any(), "the caller's mask is left alone"
    with pytest.warns(UserWarning, match=r"stages\.1\.0"):
        small = compact.compact(net, keep)
    assert int(net.by_site(small.keep)["stages.1.0"].sum()) == 1


def test_a_shortcut_saves_a_branch_from_rescue_but_not_the_stem():
    net = nets.build("resnet_digits")
    _, sites = rescue(net, torch.zeros(net.num_gates, dtype=torch.bool))
    assert sites == ["stem"]


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits", "supernet_digits"])
def test_reopening_reaches_the_floor_with_as_few_channels_as_can_be(name):
    torch.manual_seed(0)
    net = nets.build(name)
    alpha = torch.randn(net.num_gates)
    closed, _ = rescue(net, torch.zeros(net.num_gates, dtype=torch.bool), alpha)
    keep, collapsed = selection.reopen(net, 8, closed, alpha, 0.05)
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
    untouched, collapsed = selection.reopen(net, 8, all_open(net), alpha, 0.05)
    assert untouched.all() and not collapsed


def test_saved_compact_network_loads_and_a_wrong_one_is_told(tmp_path):
    torch.manual_seed(0)
    net = nets.build("resnet_digits").eval()
    small = compact.compact(net, torch.rand(net.num_gates) < 0.7)
    compact.save(small, tmp_path / "compact", name="resnet_digits")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(compact.load(tmp_path / "compact")(images), small(images))
    for described in (
        '{"network": [["system", ["true"]]]}',
        '{"network": [["Linear", [1000000, 1000000, false]]]}',
        '{"network": [["Sum", [[], [], 3, null, 1]]]}',
        '{"network": [["Sum", [[], [], 3, [0, 1, 7], 1]]]}',
        '{"network": [["Channels", [[0.5, 1.7]]]]}',
        '{"network": [["Channels", [[-1]]]]}',
    ):
        (tmp_path / "compact" / "architecture.json").write_text(described)
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
