"""model.name: compact:RUN, a network that was pruned once."""

import pytest
import torch
from trained_looking import trained_looking

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.nets import compact, masks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    network, _ = trained_looking("resnet_digits")
    keep, _ = masks.rescue(network, torch.rand(network.num_gates) < 0.6)
    folder = tmp_path_factory.mktemp("run")
    compact.save(compact.compact(network.float(), keep), folder / "compact")
    return folder


@torch.no_grad()
def test_the_compact_network_of_a_run_is_pruned_further(run):
    images, before = torch.randn(3, 3, 8, 8), compact.load(run / "compact")
    network = nets.build(f"compact:{run}", num_classes=10, image_size=8).eval()
    expected = before(images)
    assert float((network(images) - expected).abs().max() / expected.abs().max()) <= 1e-5
    keep, _ = masks.rescue(network, torch.rand(network.num_gates, generator=torch.Generator().manual_seed(1)) < 0.5)
    small, expected = compact.compact(network, keep).eval(), network(images, keep.float())
    assert float((small(images) - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in before.parameters())


@torch.no_grad()
def test_another_number_of_classes_gets_a_last_layer_of_its_own(run):
    network = nets.build(f"compact:{run}/compact", num_classes=3, image_size=8).eval()
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    own, first = compact.load(run / "compact").state_dict(), next(iter(network.parameters()))
    assert torch.equal(first, next(iter(own.values())))


def test_a_folder_without_a_compact_network_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"key 'model.name': .*no compact network .*; give the folder of a finished run"):
        nets.build(f"compact:{tmp_path}", image_size=8)
