"""Compact networks as runtimes like them: whole branches, one memory layout from end to end."""

import pytest
import torch

from dnal_dist import nets
from dnal_dist.nets import compact, masks
from dnal_dist.nets.modules import Place
from dnal_dist.nets.whole import deployed, whole

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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("streams", ["free", "tied"])
@pytest.mark.parametrize(("name", "image_size"), CASES[1:4])
def test_what_is_deployed_computes_the_same(name, image_size, streams, seed):
    network = small(name, seed, (0.8, 0.5, 0.3, 0.1)[seed], streams=streams, image_size=image_size).double()
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        logits, found = network(images), deployed(network)
        assert float((found(images) - logits).abs().max() / logits.abs().max()) <= 1e-10
    assert all(conv.groups % 8 == 0 for conv in found.modules() if isinstance(conv, torch.nn.Conv2d) and conv.groups > 1)


@pytest.mark.parametrize("streams", ["free", "tied"])
def test_candidates_of_one_kernel_are_one(streams):
    network = small("supernet_digits", 0, 0.6, False, streams=streams, image_size=8)
    found = deployed(network)
    paths = [path for path, m in found.named_modules() if isinstance(m, torch.nn.Conv2d) and path.startswith("stages.0.cells.1.")]
    layers = ("expand", "depthwise", "project")
    assert sorted(paths) == sorted(f"stages.0.cells.1.k{k}e3_k{k}e6.{layer}.conv" for k in (3, 5, 7) for layer in layers)
    assert not any("cells" in path and "project.norm" in path for path, _ in found.named_modules())


def test_constants_are_part_of_a_branch():
    torch.manual_seed(0)
    network = nets.build("supernet_digits").eval()
    keep = torch.ones(network.num_gates, dtype=torch.bool)
    for site, part in network.by_site(keep).items():
        part[:] = not site.endswith("depthwise") or "cells" not in site or "k5e3" in site
    network = compact.compact(network, keep).double()
    found, images = deployed(network), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert sum("constant" in name for name, _ in network.named_parameters()) == 20
    assert not any("constant" in name for name, _ in found.named_parameters())
    torch.testing.assert_close(found(images), network(images), rtol=1e-10, atol=1e-12)


class Odd(torch.nn.Module):
    """Depthwise convolutions in a row, then a sum of which a and b can be one, and e and f; c, of another kernel, and d, which two
    read, can not."""

    def __init__(self):
        super().__init__()
        conv, norm, act = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Sigmoid
        row = [[norm(i), act(), conv(i, i, 3, groups=i), conv(i, i + 2, 1)] for i in (11, 13)]
        self.stem, self.row = conv(3, 11, 3), torch.nn.Sequential(*row[0], *row[1])
        kernels = {"a": 3, "b": 3, "c": 1, "d": 3}
        branches = {name: [conv(15, 9, k, padding=k // 2), norm(9), act(), conv(9, 6, 1)] for name, k in kernels.items()}
        self.branches = torch.nn.ModuleDict({name: torch.nn.Sequential(*branch) for name, branch in branches.items()})
        self.e, self.f = (torch.nn.Sequential(conv(15, 6, 1, bias=False), norm(6)) for _ in range(2))
        self.head = torch.nn.Linear(6, 10)

    def forward(self, images):
        x = self.row(self.stem(images))
        found = {name: branch(x) for name, branch in self.branches.items()}
        x = (found["a"] + found["b"] + self.e(x)) + (found["c"] + found["d"]) * 1.0 + (found["d"] + self.f(x))
        return self.head(torch.relu(x).mean((2, 3)))


def test_branches_of_any_network_that_can_be_one_are():
    torch.manual_seed(0)
    network = nets.gate(Odd().eval(), torch.zeros(2, 3, 12, 12))
    small = compact.compact(network, torch.rand(network.num_gates) < 0.7).double().eval()
    found, images = deployed(small), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found(images), small(images), rtol=1e-10, atol=1e-12)
    paths = [path for path, module in found.named_modules() if isinstance(module, torch.nn.Conv2d)]
    branches = {path for path in paths if not path.startswith(("stem", "row"))}
    assert branches == {f"branches.{name}.{i}" for name in ("a_b", "c", "d") for i in (0, 3)} | {"e_f.0"}
    assert all(found.get_submodule(f"row.{i}").groups in (8, 16) for i in (2, 6))


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
