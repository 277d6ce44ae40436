"""What has no gates: layers that stay whole, and modules and names that are refused, each with its reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import SIZE, Dense, Flattened, LayerNormed, Offset, Small

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.nets.gate import gate


def example(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, SIZE, SIZE)


def test_what_stays_whole_is_named_with_its_reason():
    reasons = {row.layer: row.reason for row in gate(Offset(), example()).ungated}
    assert "conv reads it where a closed channel is not zero" in reasons["stem"]
    assert reasons["head"] == "it is the network's output"
    reasons = {row.layer: row.reason for row in gate(LayerNormed(), example()).ungated}
    assert "layer_norm" in reasons["stem"] and "up" not in reasons
    reasons = {row.layer: row.reason for row in gate(Dense(), example(), ignore=["grow"]).ungated}
    assert reasons == {"grow": "it is in `ignore`", "head": "it is the network's output"}


class NormWithForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 0


class OwnNorm(Small):
    def add_body(self, channels):
        super().add_body(channels)
        self.norm = NormWithForward(channels)


class BatchStatistics(Small):
    def add_body(self, channels):
        super().add_body(channels)
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)


class Counting(Small):
    def forward(self, images):
        return super().forward(images) * (2 if images.sum() > 0 else 1)


class Complex(Small):
    def body(self, x):
        return F.relu(self.conv(torch.fft.fft2(x).real))


class Literal(Small):
    def body(self, x):
        return self.conv(x.view(2, 8, SIZE, SIZE))


class OldNorm(Small):
    def add_body(self, channels):
        self.conv = torch.nn.utils.weight_norm(nn.Conv2d(channels, channels, 3, padding=1))


class Plain(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    "module, images, words",
    [
        (Counting(), example(), "test_ungated.py"),
        (OwnNorm(), example(), "norm is a NormWithForward"),
        (BatchStatistics(), example(), "norm has no running statistics; give it track_running_stats=True"),
        (Literal(), example(), "return self.conv(x.view(2, 8"),
        (OldNorm(), example(), "torch.nn.utils.parametrizations"),
        (Plain(), example(), "no channel that can be closed"),
        (Small(), example()[:, :1], "images (n, 3, H, W)"),
        (Small(), example().long(), "images (n, 3, H, W)"),
        (Flattened(), torch.zeros(2, 3, 2, 2, 1), "images (n, 3, H, W)"),
        (Small(6), torch.zeros(2, 3, 0, 0), "cannot be read"),
    ],
)
def test_what_cannot_be_gated_is_refused_in_one_line(module, images, words):
    with pytest.raises(InputError) as caught:
        gate(module, images)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_operation_without_a_rule_leaves_what_it_reads_whole():
    network = gate(Complex(), example(), check=False)
    assert any("fft" in row.reason for row in network.ungated if row.layer == "stem")


def test_a_network_that_differs_from_its_compact_one_is_refused(monkeypatch):
    from dnal_dist.nets import rules

    # As if a sigmoid of zero were zero.
    monkeypatch.setitem(rules.RULES, "sigmoid", rules.RULES["clone"])
    with pytest.raises(InputError, match=r"differs from the masked one"):
        gate(Offset(), example())


@pytest.mark.parametrize(
    "name, words",
    [
        ("torchvision:resnet19", "list_models"),
        ("nowhere.at.all:network", "PYTHONPATH"),
        ("os:system", "a module of Python itself"),
        ("numpy:savez", "nor a function annotated"),
        ("torch:hub", "nor a function annotated"),
        ("torch.nn:Nothing", "has no 'Nothing'"),
        ("timm:hf-hub:someone/something", "timm has no"),
        (":x", "has no 'x'"),
    ],
)
def test_a_name_that_gives_no_network_is_refused(name, words):
    with pytest.raises(InputError, match=r"model\.name") as caught:
        nets.build(name, image_size=SIZE)
    assert words in str(caught.value)


@pytest.mark.parametrize("argument", ["weights", "checkpoint_path", "pretrained_cfg_overlay"])
def test_weights_do_not_come_by_an_argument(argument):
    with pytest.raises(InputError, match=rf"model\.arguments\.{argument}"):
        nets.build("torchvision:resnet18", image_size=SIZE, arguments={argument: "weights.pth"})
