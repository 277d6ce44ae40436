"""The table of a network's layers that `latency --profile` writes."""

import json

import pytest
import torch
from in_process import called

from dnal_dist import latency as door
from dnal_dist import nets
from dnal_dist.export import profile


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"PAIRS": 1, "SECONDS": 0.0, "NETWORK_SECONDS": 0.0, "FRACTIONS": (0.5, 1.0)}.items():
        monkeypatch.setattr(profile, name, value)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_a_table_has_every_layer_and_predicts(runtime, quick, tmp_path, capsys, monkeypatch):
    whole = 2 if runtime == "eager" else 0  # each is exported, which takes seconds
    monkeypatch.setattr(profile, "NETWORKS", whole)
    words = ["digits", "--profile", tmp_path / "table.json", "--runtime", runtime, "--check", whole]
    code, out, _ = called(door.main, capsys, *words)
    found = json.loads((tmp_path / "table.json").read_text())
    assert code == 0 and "table.json: written" in out and ("off by" in out) == (whole > 0)
    assert len(found["layers"]) == 7 and set(found["layers"]) == set(found["kinds"])
    kind = found["kinds"]["conv 32-64 3x3/1 of 4x4 with norm"]
    assert kind["inputs"] == [1, 15, 16, 31, 32] and kind["outputs"] == [1, 31, 32, 63, 64]
    assert found["round_to"] == 1 and found["versions"]["torch"] == torch.__version__
    code, out, _ = called(door.main, capsys, *words[:-2])
    assert code == 0 and "there already" in out
    (tmp_path / "older.json").write_text(json.dumps(found | {"versions": {"torch": "2.0"}}))
    code, _, err = called(door.main, capsys, "digits", "--profile", tmp_path / "older.json", *words[3:-2])
    assert code == 2 and "holds a table of versions torch 2.0" in err
    other = "eager" if runtime == "onnx" else "onnx"
    code, _, err = called(door.main, capsys, *words[:3], "--runtime", other)
    assert code == 2 and f"holds a table of runtime {runtime}" in err
    code, _, err = called(door.main, capsys, "digits", "model.name=resnet_digits", *words[1:-2])
    assert code == 2 and "measured for name 'vgg_digits', not 'resnet_digits'" in err


def test_layers_of_groups_are_timed_by_their_outputs():
    net = nets.build("mobilenetv2_cifar", image_size=32)
    kinds, shapes = profile._layers(net, 32)
    module, shape, _, norm = shapes[next(kind for kind in kinds if "groups" in kind)]
    layer, narrower = profile._narrow(module, shape, module.in_channels, 5, norm)
    assert layer[0].groups == layer[0].in_channels == layer[0].out_channels == narrower[0] == 5
