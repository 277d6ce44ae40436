"""What is left of shortcuts, branches, candidates and cells in a compact network; what must stay is opened again."""

from pathlib import Path

import pytest
import sources
import torch
from safetensors.torch import load_file
from trained_looking import trained_looking

from dnal_dist import nets
from dnal_dist.nets import compact, cost, modules
from dnal_dist.nets.masks import all_open, pack, rescue, unpack
from dnal_dist.nets.whole import whole
from dnal_dist.search import selection


def layers(small: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Convolutions and Linear layers of a compact network by their paths."""
    return {path: m for path, m in small.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}


def constants(small: torch.nn.Module) -> list[str]:
    return [name for name, _ in small.named_parameters() if "constant" in name]


def test_shortcut_keeps_the_stream_and_the_branch_shrinks():
    """Closing channels of a branch's last convolution leaves the stream as wide as the shortcut makes it."""
    torch.manual_seed(0)
    net, _ = trained_looking("resnet_digits")
    keep = all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:12] = False
    small = compact.compact(net, keep)
    found = layers(small)
    assert found["stages.0.0.conv2.conv"].out_channels == 4 and found["stages.0.1.conv1.conv"].in_channels == 16
    assert small.get_submodule("stages.0.0.place").places == [12, 13, 14, 15]


def test_a_closed_branch_is_gone_and_one_that_lost_its_input_is_a_constant():
    torch.manual_seed(0)
    net, _ = trained_looking("resnet_digits")
    keep = all_open(net)
    net.by_site(keep)["stages.0.0.conv2"][:] = False
    net.by_site(keep)["stages.0.1.conv1"][:] = False
    small = compact.compact(net, keep)
    assert not any(path.startswith("stages.0.") for path in layers(small)) and len(layers(small)) == 10
    assert constants(small) == ["stages.0.1.conv2.norm.constant"]


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
    left = {path.rpartition(".")[0].rpartition(".")[0] for path in layers(small) if path.startswith("stages.")}
    assert left == {
        *(f"stages.0.cells.{c}.{name}" for c in (0, 1) for name in ("k3e3", "k5e6", "k7e3")),
        *(f"stages.1.cells.0.k{k}e{e}" for k in (3, 5, 7) for e in (3, 6)),
    }
    # A project convolution without a depthwise one puts out a constant.
    assert constants(small) == [f"stages.0.cells.1.{name}.project.norm.constant" for name in ("k3e6", "k5e3", "k7e6")]
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, keep.double()), rtol=0, atol=1e-10)


def test_a_bottleneck_that_lost_its_first_convolution_is_a_constant():
    torch.manual_seed(0)
    net, keep = trained_looking("resnet50_imagenet", 0.25)
    net.by_site(keep)["stages.1.1.conv1"][:] = False
    net.by_site(keep)["stages.2.0.conv2"][:] = False
    small = compact.compact(net, keep)
    assert constants(small) == [f"stages.{block}.conv3.norm.constant" for block in ("1.1", "2.0")]
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, keep.double()), rtol=0, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) == cost.count(net, 32, keep).params


def test_a_depthwise_convolution_chooses_among_channels_that_others_read():
    """In this narrow network the first block has a shortcut around a depthwise convolution, which alone has gates."""
    torch.manual_seed(0)
    net, keep = trained_looking("mobilenetv2_imagenet", 0.25)
    net.by_site(keep)["blocks.0.depthwise"][::2] = False
    small = compact.compact(net, keep)
    assert layers(small)["blocks.0.depthwise.conv"].groups == 4 and layers(small)["stem.conv"].out_channels == 8
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, keep.double()), rtol=0, atol=1e-10)
    assert cost.count(net, 32, keep).params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", ["resnet_digits", "supernet_digits"])
def test_compact_folders_of_an_older_release_give_the_logits_that_they_gave(name, tmp_path):
    """Written by the last release that had a cutter for each family; with constants in place of branches."""
    sources.unpack(Path(__file__).parent / "compact_before_graph.tar.gz", tmp_path)
    folder = tmp_path / "compact_before_graph" / name
    found = load_file(folder / "logits.safetensors")
    small = compact.load(folder)
    kinds = {type(module) for module in small.modules()}
    assert {modules.Sum, modules.Constant} <= kinds
    with torch.no_grad():
        torch.testing.assert_close(small(found["images"]), found["logits"])
        torch.testing.assert_close(whole(small)(found["images"]), found["logits"])
    compact.save(small, tmp_path / "again")
    assert torch.equal(compact.load(tmp_path / "again")(found["images"]), small(found["images"]))


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
        '{"network": [["Place", [[0, 0], 3]]]}',
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
