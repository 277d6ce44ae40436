"""Compact networks as files and programs: what torch's own tools take, and what no file can do."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.nets import compact
from dnal_dist.nets.whole import deployed


@pytest.mark.parametrize("name, image_size", [("resnet_digits", 8), ("supernet_digits", 8), ("resnet56_cifar", 16)])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.filterwarnings("ignore")
def test_torch_traces_it(name, image_size, share):
    torch.manual_seed(0)
    net = nets.build(name).eval()
    small = compact.compact(net, torch.rand(net.num_gates) < share).eval()
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        logits = small(images)
        assert torch.equal(torch.fx.symbolic_trace(small)(images), logits)
        assert torch.equal(torch.jit.trace(small, images)(images), logits)


CONV = [3, 4, [3, 3], [1, 1], [1, 1], [1, 1], 1, True]


@pytest.mark.parametrize(
    "item",
    [
        ["Conv2d", [3, 4, [3, 3], [0, 0], [1, 1], [1, 1], 1, True]],
        ["Conv2d", [3, 4, [3, 3], [1, 1], [1 << 30, 1], [1, 1], 1, True]],
        ["Conv2d", [3, 4, [3, 3], [1, 1], [1, 1], [0, 1], 1, True]],
        ["Conv2d", [3, 4, [3, 3], [1.5, 1], [1, 1], [1, 1], 1, True]],
        ["MaxPool2d", [2, 0, 0]],
        ["AdaptiveAvgPool2d", [1 << 20]],
        ["BatchNorm2d", [4, -1.0, 0.1]],
        ["Sum", [[], [], 1 << 40, [0], 1]],
        ["Sum", [[[["Conv2d", CONV], ["MaxPool2d", [2, -1, 0]]]], [[0]], 4, None, 1]],
        ["Nothing", []],
    ],
)
def test_what_no_network_is_made_of_is_refused(item):
    with pytest.raises(ValueError, match="not part of a compact network"):
        compact.build([["Conv2d", CONV], item])


@pytest.fixture(params=["resnet_digits", "user_networks:Mixed"])
def saved(request, tmp_path):
    torch.manual_seed(0)
    net = nets.build(request.param, image_size=8)
    compact.save(compact.compact(net, torch.rand(net.num_gates) < 0.5), tmp_path / "compact")
    return tmp_path / "compact"


@pytest.mark.filterwarnings("ignore")
def test_an_export_loads_without_the_zeros_of_its_deployment(tmp_path):
    torch.manual_seed(0)
    net = nets.build("mobilenetv2_cifar", width=0.25, image_size=16, streams="tied").eval()
    small = compact.compact(net, torch.rand(net.num_gates) < 0.5)
    own, made = small.state_dict(), deployed(small).state_dict()
    (tmp_path / "architecture.json").write_text(json.dumps({"description": compact.describe(small)}))
    save_file(made, tmp_path / "model.safetensors")
    found = compact.load(tmp_path).state_dict()
    assert found.keys() == own.keys() == made.keys() and all(torch.equal(found[name], own[name]) for name in own)
    assert any(made[name].shape != own[name].shape for name in own)
    made.popitem()
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="the weights do not fit"):
        compact.load(tmp_path)


def test_too_many_layers_and_files_without_end_are_refused(saved):
    whole = (saved / "architecture.json").read_text()
    (saved / "architecture.json").write_text(json.dumps({"network": [["Flatten", []]] * 100_000}))
    with pytest.raises(ValueError, match="more than 20000 modules"):
        compact.load(saved)
    (saved / "architecture.json").unlink()
    os.mkfifo(saved / "architecture.json")
    with pytest.raises(ValueError, match="not a regular file"):
        compact.load(saved)
    (saved / "architecture.json").unlink()
    (saved / "architecture.json").write_text(whole)
    (saved / "weights.safetensors").unlink()
    (saved / "weights.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        compact.load(saved)


@pytest.mark.filterwarnings("ignore")
def test_no_description_breaks_the_reader(saved):
    """Descriptions with random changes load as a network that runs, or are refused, and never anything else."""
    draw, seen = random.Random(5), set()
    whole = (saved / "architecture.json").read_text()
    odd = [0, -1, 1 << 40, 1.5, None, True, "x", [], {}, [[]], ["Sum", []], float("nan")]

    def change(value):
        if isinstance(value, list | dict) and value and draw.random() < 0.9:
            at = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
            value[at] = change(value[at])
            return value
        return draw.choice(odd)

    for _ in range(150):
        tree = json.loads(whole)
        tree["network"] = change(tree["network"])
        (saved / "architecture.json").write_text(json.dumps(tree))
        try:
            with torch.no_grad():
                seen.add(tuple(compact.load(saved)(torch.zeros(1, 3, 8, 8)).shape))
        except InputError as error:
            seen.add(type(error))
            assert str(error).startswith(f"{saved}: no compact network can be loaded from here")
    assert InputError in seen
