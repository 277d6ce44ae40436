"""Whole runs of networks that know nothing of gates: one of torchvision's, and a user's own with a concatenation."""

import pytest
import torch

import dnal_dist
from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.nets import compact
from dnal_dist.report import records

EPOCHS = {"phases.pretrain.epochs": 2, "phases.search.epochs": 3, "phases.finetune.epochs": 3}
CHANGES = [f"{key}={value}" for key, value in EPOCHS.items()] + ["tracking.tracker=none", "tracking.plots=false"]


def words(digits, output, *changes: str) -> list[str]:
    return [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={output}", *CHANGES, *changes]


def test_a_users_network_is_learned_on_two_processes(train_command, digits, tmp_path):
    model = ["model.name=user_networks:Mixed", "model.arguments={channels: 12}", "architecture.penalty_weight=null"]
    changes = words(digits, tmp_path / "run", *model, "architecture.target.macs=0.3x")
    process = train_command("recipes/digits.yaml", *changes, processes=2, timeout=500, PYTHONPATH="tests")
    assert process.returncode == 0, process.stdout + process.stderr
    found = records.summary(tmp_path / "run")
    assert 0.28 < found["compact"]["exact"]["macs"] / found["full"]["exact"]["macs"] <= 0.3
    assert found["accuracy"]["finetune"] > 0.4
    small = compact.load(tmp_path / "run" / "compact")
    assert sum(p.numel() for p in small.parameters()) == found["compact"]["exact"]["params"]
    assert small(torch.zeros(3, 3, 8, 8)).shape == (3, 10)
    assert "block.grouped" in dict(small.named_modules())


def test_a_network_of_torchvision_is_learned(digits, tmp_path):
    changes = ["model.name=torchvision:resnet18", "architecture.penalty_weight=null", "architecture.target.macs=0.4x"]
    steps = ["phases.pretrain.epochs=null", "phases.search.epochs=null", "phases.finetune.epochs=null"]
    steps += ["phases.pretrain.steps=6", "phases.search.steps=8", "phases.finetune.steps=6", "architecture.recalibration_batches=2"]
    result = dnal_dist.train_recipe("recipes/digits.yaml", words(digits, tmp_path / "run", *changes, *steps))
    found = records.summary(tmp_path / "run")
    assert 0.38 < result.cost.macs / found["full"]["exact"]["macs"] <= 0.4
    assert 0 <= result.accuracy <= 1
    again = compact.load(tmp_path / "run" / "compact")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(images), result.network.eval()(images))
    assert {"layer1.0.conv1", "fc"} <= dict(again.named_modules()).keys()


def test_pretrained_is_a_source_of_weights(tmp_path):
    changes = ["output=x", "model.name=torchvision:resnet18", "model.pretrained=true"]
    assert recipe.load("recipes/digits.yaml", changes).model.init_from == "torchvision:resnet18"
    for wrong, message in (
        (["model.pretrained=true"], "nobody publishes weights of vgg_digits"),
        ([*changes, "model.init_from=runs/x"], "two sources"),
    ):
        with pytest.raises(InputError, match=message):
            recipe.load("recipes/digits.yaml", wrong)


def test_published_weights_come_into_the_network_by_their_own_names(digits, tmp_path, monkeypatch):
    """From torchvision's cache, for another number of classes."""
    from torchvision.models import resnet18

    from dnal_dist.training import setup

    published = resnet18().state_dict()
    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", lambda *_, **__: published)
    changes = words(digits, tmp_path / "run", "model.name=torchvision:resnet18", "model.pretrained=true", "model.num_classes=10")
    run = setup.prepare(recipe.load("recipes/digits.yaml", changes), Context())
    own = run.supernet.state_dict()
    assert len(own["fc.weight"]) == 10 and len(published["fc.weight"]) == 1000
    for name, tensor in published.items():
        assert name.startswith("fc.") or torch.equal(own[name], tensor), name
    run.close()
