"""The table of a network's layers that `latency --profile` writes."""

import json
import sys

import pytest
import torch
from in_process import called

from dnal_dist import latency as door
from dnal_dist import nets
from dnal_dist.export import bench, profile


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"PAIRS": 1, "SECONDS": 0.0, "NETWORK_SECONDS": 0.0}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(profile, "FRACTIONS", (0.5, 1.0))


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
    assert kind["inputs"] == [1, 4, 12, 15, 16, 28, 31, 32] and kind["outputs"] == [1, 4, 28, 31, 32, 60, 63, 64]
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


def test_a_command_fills_a_table(tmp_path, capsys, monkeypatch):
    """One that takes a millisecond for each kilobyte of the file beyond its beginning."""
    monkeypatch.setattr(profile, "NETWORKS", 0)  # each is exported, which takes seconds
    program, path = tmp_path / "program.py", tmp_path / "table.json"
    program.write_text("import os, sys; print('took'); print(os.path.getsize(sys.argv[1]) / 1000, 'ms')")
    words = ["digits", "architecture.round_to=32", "--profile", path]
    command = f"{sys.executable} {program} {{file}}"
    code, _, err = called(door.main, capsys, *words, "--command", command)
    assert code == 0, err
    found = json.loads(path.read_text())
    assert (found["runtime"], found["device"], found["versions"]) == ("command", command, {})
    kind = found["kinds"]["conv 32-64 3x3/1 of 4x4 with norm"]
    assert kind["inputs"] == [32] and kind["outputs"] == [32, 64]
    # float32 weights, and a bias.
    assert [1000 * seconds for seconds in kind["seconds"][0]] == pytest.approx(
        [4 * 32 * (9 * 32 + 1) / 1000, 4 * 64 * 289 / 1000], rel=0.02
    )
    path.unlink()
    for program_text, message in (
        ("print('none')", "is no number of milliseconds above 0, but 'none'"),
        ("print('-5')", "is no number of milliseconds above 0, but '-5'"),
        ("import sys; sys.exit('no such phone')", "ended with exit code 1: no such phone"),
    ):
        program.write_text(program_text)
        code, _, err = called(door.main, capsys, *words, "--command", command)
        assert code == 2 and message in err and not path.exists()
    for wrong, message in (
        ("ls", "has no {file}"),
        ("no-such-program {file}", "No such file"),
        ("x {file} '", "No closing quotation"),
    ):
        code, _, err = called(door.main, capsys, *words, "--command", wrong)
        assert code == 2 and message in err
    code, _, err = called(door.main, capsys, "digits", "--command", command)
    assert code == 2 and "give --profile FILE too" in err


def test_layers_of_groups_are_timed_by_their_outputs():
    net = nets.build("mobilenetv2_cifar", image_size=32).eval()
    kinds, shapes = profile._layers(net, 32)
    module, shape, _, norm = shapes[next(kind for kind in kinds if "groups" in kind)]
    layer, narrower = profile._narrow(module, shape, module.in_channels, 5, norm)
    # Filled to a multiple of 8, as it is deployed.
    assert layer[0].groups == layer[0].in_channels == layer[0].out_channels == narrower[0] == 8
