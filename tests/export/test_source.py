"""model.py: a program of any network, as text that can be read."""

import importlib.util
import re
import warnings

import pytest
import torch
from torch import nn
from trained_looking import NETWORKS, trained_looking

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.export import files, readers
from dnal_dist.export.program import program
from dnal_dist.export.source import source
from dnal_dist.nets import compact
from dnal_dist.nets.narrow import Narrow, Ref, Step

BUILT_IN = ["vgg_digits", "resnet_digits", "supernet_digits", "mobilenetv2_cifar", "resnet50_imagenet"]


def small(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    size, width = NETWORKS[name]
    network, _ = trained_looking(name, width)
    keep = torch.rand(network.num_gates) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compact.compact(network, keep).eval(), size


def written(network: nn.Module, size: int, folder) -> tuple[nn.Module, str]:
    """The network of the file made of a network, and the file."""
    text, state = source(program(network, size), network, "a network")
    files.write_torch(text, state, folder)
    spec = importlib.util.spec_from_file_location("written", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Network().to(next(network.parameters()).dtype)
    made.load_state_dict(state)
    return made.eval(), text


def assert_equal(found: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) <= most


@torch.no_grad()
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_file_is_the_network(name, tmp_path):
    network, size = small(name)
    made, text = written(network, size, tmp_path)
    for count in (1, 3):
        images = torch.randn(count, 3, size, size, dtype=torch.float64)
        assert_equal(made(images), network(images), 1e-12)
    assert max(map(len, text.splitlines())) < 150 and "index_add" not in text and "dnal_dist." not in text
    assert {line.split()[1] for line in text.splitlines() if re.match(r"import|from", line)} <= {
        "torch",
        "pathlib",
        "torch.nn.functional",
    }


@torch.no_grad()
def test_layers_of_any_network_keep_their_names(tmp_path):
    torch.manual_seed(0)
    network = nets.build("torchvision:mobilenet_v3_small", num_classes=5, image_size=32).eval()
    own = {name.removeprefix("module.") for name in network.state_dict()}
    small = compact.compact(network, torch.rand(network.num_gates) < 0.6).double().eval()
    made, text = written(small, 32, tmp_path)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_equal(made(images), small(images), 1e-12)
    assert made.state_dict().keys() == small.state_dict().keys() <= own | small.state_dict().keys()
    assert "self.features[1].block[0][0] = nn.Conv2d(" in text and "F.dropout(" in text
    momenta = {m.momentum for m in made.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {m.momentum for m in small.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


@torch.no_grad()
def test_onnx_and_pt2_have_the_function_and_take_any_batch(tmp_path):
    network, size = small("resnet_digits")
    network = network.float()
    for fold in (False, True):
        made = program(network, size, fold=fold)
        assert any("batch_norm" in str(node.target) for node in made.graph.nodes) != fold
        files.write_pt2(made, tmp_path)
        run = readers.opened(tmp_path, "model.pt2")
        for count in (1, 5):
            images = torch.randn(count, 3, size, size)
            assert_equal(torch.from_numpy(run(images.numpy())), network(images), 1e-5)
    files.write_onnx(program(network, size), tmp_path)
    run = readers.opened(tmp_path, "model.onnx", threads=1)
    for count in (1, 5):
        images = torch.randn(count, 3, size, size)
        assert_equal(torch.from_numpy(run(images.numpy())), network(images), 1e-5)
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {one.name for one in graph.initializer if one.name.endswith("weight")} <= network.state_dict().keys()
    assert not {node.op_type for node in graph.node} & {"ScatterND", "GatherND", "BatchNormalization"}


@torch.no_grad()
def test_height_and_width_are_free_where_the_network_allows_it():
    network, size = small("resnet_digits")
    made = program(network, size, any_size=True).module()
    for height, width in ((8, 8), (16, 24), (9, 20)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        assert_equal(made(images), network(images), 1e-12)
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 2))
    with pytest.raises(InputError, match="--any-size: the network takes images of one size only"):
        program(fixed, 8, any_size=True)


def test_operations_that_write_to_some_channels_are_refused():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images):
            return self.conv(images).index_add(1, torch.tensor([1]), images[:, :1]).mean((2, 3))

    with pytest.raises(InputError, match=r"aten\.index_add"):
        program(Writes(), 8)


class Odd(nn.Module):
    """What is read later than an operation that changes it, tensors of its own, a shared layer, one layer with two strides."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)

    def forward(self, images):
        x = self.conv(images)
        y = x * self.scale + self.shift
        x.relu_()
        y = y - (x - y)
        y = nn.functional.conv2d(self.mix(y) * y * y, self.mix.weight, self.mix.bias, stride=2)
        z, w = nn.functional.pad(y, (1, 0, 2, 1)).split([1, 3], dim=1)
        return torch.cat([z, w.flip(1).clamp_(0, 2)], 1).mean(dim=(2, 3)) / 3


@torch.no_grad()
def test_odd_networks_are_written(tmp_path):
    torch.manual_seed(0)
    network = Odd().double().eval()
    made, text = written(network, 8, tmp_path)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_equal(made(images), network(images), 1e-12)
    assert "self.mix(" in text and made.state_dict().keys() == {*network.state_dict(), "shift"}


@torch.no_grad()
def test_names_of_layers_are_names_and_no_code(tmp_path):
    names = ["'] = 1; raise SystemExit #", '"""', "import", "x\nraise SystemExit", "{0}", "\\", "x y"]
    layers, outs = {name: nn.Conv2d(3, 3, 1) for name in names}, [f"s{i}" for i in range(len(names))]
    reads = ["images", *outs]
    steps = [Step(out, "module", name, [Ref(at)], {}) for name, at, out in zip(names, reads, outs, strict=False)]
    steps.append(Step("last", "op", "mean.dim", [Ref(outs[-1]), [2, 3]], {}))
    network = Narrow(steps, layers, {}, 8).eval()
    made, _ = written(network, 8, tmp_path)
    images = torch.randn(2, 3, 8, 8)
    assert_equal(made(images), network(images), 1e-6)
    assert made.state_dict().keys() == network.state_dict().keys()
