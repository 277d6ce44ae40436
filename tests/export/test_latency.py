"""`latency`: what is compared, and that it is compared at all."""

import json
import shutil

import pytest
import torch
from in_process import called
from trained_looking import trained_looking

from dnal_dist import latency as door
from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.export import compared, latency
from dnal_dist.nets import cost


def test_a_run_is_compared_with_the_full_and_an_evenly_thinned_network(exported, capsys):
    code, out, _ = called(door.main, capsys, exported, "--batch", "2", "--runtime", "eager,onnx", "--seconds", "0", "--json")
    found = json.loads(out)
    assert code == 0 and found["device"] and found["macs"]["full"] == 2_415_872
    assert found["macs"]["even"] <= found["macs"]["compact"] < found["macs"]["full"]
    assert [(row["batch"], row["runtime"]) for row in found["rows"]] == [(2, "eager"), (2, "onnx")]
    for row in found["rows"]:
        assert row["median"].keys() == found["macs"].keys() and all(seconds > 0 for seconds in row["median"].values())
        assert row["faster"].keys() == {"compact", "even"} and all(ratio > 0 for ratio in row["faster"].values())


def test_the_macs_of_a_run_s_network_are_those_of_its_record(exported):
    shape = json.loads((exported / "export" / "architecture.json").read_text())
    made = compared.of_recipe(recipe.load(exported / "recipe.yaml"), exported)
    assert made["compact"].macs == shape["cost"]["compact"]["exact"]["macs"]
    assert made["full"].macs == shape["cost"]["full"]["exact"]["macs"]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_even_thinning_takes_as_many_macs_as_there_are(fraction):
    network, _ = trained_looking("resnet_digits")
    most = int(fraction * cost.count(network, 8).macs)
    keep = compared.evenly(network, 8, most)
    assert 0.9 * most <= cost.count(network, 8, keep).macs <= most
    shares = [float(part.float().mean()) for part in network.by_site(keep).values()]
    assert max(shares) - min(shares) <= 0.1


def test_slower_compact_networks_are_warned_of(exported, capsys, monkeypatch):
    seconds = {"full": 1.0, "compact": 1.1, "even": 0.5}
    row = {"batch": 1, "threads": 1, "runtime": "eager", "median": seconds, "spread": dict.fromkeys(seconds, 0.1)}
    rows = iter([row | {"faster": {"compact": 0.9, "even": 2.0}, "slower": ["compact"]}])
    monkeypatch.setattr(latency, "measure", lambda *_: rows)
    code, out, err = called(door.main, capsys, exported)
    assert code == 0 and "0.90x" in out and "warning: the compact network is slower than the full one at batch 1 in eager" in err


def test_an_export_is_measured_without_its_run(exported, tmp_path, capsys):
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    code, out, err = called(door.main, capsys, folder, "--seconds", "0", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["macs"]["compact"] < found["macs"]["full"] == 2_415_872
    assert [(row["runtime"], row["faster"].keys()) for row in found["rows"]] == [("onnx", {"compact"})]
    manifest = (folder / "manifest.json").read_text().replace('"vgg_digits"', '"of_mine:network"')
    (folder / "manifest.json").write_text(manifest)
    code, out, err = called(door.main, capsys, folder, "--seconds", "0", "--runtime", "eager,pt2")
    assert code == 0 and "only its compact network is measured" in err
    assert [line.split()[2] for line in out.splitlines()[4:]] == ["eager", "pt2"]
    code, _, err = called(door.main, capsys, folder, "--runtime", "openvino")
    assert code == 2 and "there is no model.xml; export it by --to openvino" in err


def test_networks_that_differ_are_not_timed():
    with pytest.raises(InputError, match="so it is not timed"):
        latency.require_equal(torch.ones(1, 2), torch.zeros(1, 2) + 0.5, "a network in onnx")


WRONG = {
    "expected a whole number from 1 to 4096": ("--batch", "0"),
    "expected some of eager": ("--runtime", "tvm"),
    "on the CPU only": ("--device", "cuda", "--runtime", "onnx"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message, exported, capsys):
    code, _, err = called(door.main, capsys, exported, *WRONG[message])
    assert code == 2 and message in err
