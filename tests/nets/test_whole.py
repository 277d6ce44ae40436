"""Compact networks as runtimes like them: whole branches, one memory layout from end to end."""

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets import compact, masks
from dnal_dist.nets.modules import Place
from dnal_dist.nets.whole import whole

CASES = [("vgg_digits", 8), ("resnet_digits", 8), ("supernet_digits", 8), ("mobilenetv2_cifar", 16), ("resnet50_imagenet", 32)]


def small(name: str, seed: int, fraction: float, closing: bool = True, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = nets.build(name, width=0.25 if "_imagenet" in name else 1.0, **options).eval()
    for norm in (module for module in network.modules() if isinstance(module, nets.GatedBatchNorm)):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_var):
            tensor.uniform_(0.1, 0.9)
        norm.running_mean.uniform_(-0.1, 0.1)
    keep = torch.rand(network.num_gates) < fraction
    for site, part in network.by_site(keep).items():
        if closing and torch.rand(()) < 0.2 and site not in ("stem", "last"):
            part[:] = False
        # A tensor of one channel is in both layouts.
        part[:2] |= not closing
    return compact.compact(network, masks.rescue(network, keep)[0])


@pytest.mark.parametrize("fraction", [0.7, 0.1])
@pytest.mark.parametrize(("name", "image_size"), CASES)
def test_whole_branches_compute_the_same(name, image_size, fraction):
    network = small(name, 0, fraction).double()
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        logits = network(images)
        assert float((whole(network)(images) - logits).abs().max() / logits.abs().max()) <= 1e-12


def test_whole_branches_scatter_and_gather_nothing():
    for name, image_size in CASES[1:3]:
        network = small(name, 1, 0.5)
        images = torch.randn(2, 3, image_size, image_size)
        used = [{str(node.target) for node in torch.export.export(n, (images,)).graph.nodes} for n in (network, whole(network))]
        assert any("index" in target for target in used[0]), name
        assert not any(word in target for target in used[1] for word in ("index", "scatter", "gather")), name


def test_a_whole_network_is_described_and_loaded(tmp_path):
    network = whole(small("resnet_digits", 2, 0.5))
    compact.save(network, tmp_path / "whole")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(compact.load(tmp_path / "whole")(images), network(images))


@pytest.mark.parametrize("streams", ["free", "tied"])
@pytest.mark.parametrize(("name", "image_size"), CASES[1:4])
def test_channels_last_survives_every_block(name, image_size, streams):
    network = small(name, 3, 0.5, False, streams=streams, image_size=image_size).to(memory_format=torch.channels_last)
    seen: list[bool] = []

    def note(module, _, output):
        if output.dim() == 4 and output.shape[2] > 1:
            seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in network.modules():
        if isinstance(module, Place | torch.nn.Conv2d):
            module.register_forward_hook(note)
    network(torch.randn(4, 3, image_size, image_size).to(memory_format=torch.channels_last))
    assert len(seen) > 8 and all(seen)
