"""Exports of a run: files, proof, what is there to know."""

import hashlib
import json
import shutil

import pytest
import torch
from in_process import called
from runs import SHORT, arguments
from safetensors.torch import load_file

from dnal_dist import nets
from dnal_dist.common.errors import InputError
from dnal_dist.export import __main__ as door
from dnal_dist.export import files, proof
from dnal_dist.export.command import Options, export
from dnal_dist.export.images import Images, validation_images
from dnal_dist.export.program import program
from dnal_dist.export.source import source
from dnal_dist.nets import compact, masks
from dnal_dist.recipe import load
from dnal_dist.report import records

TORCH = ("model", "torch", "torchgen", "safetensors", "typing_extensions", "packaging")


def manifest(run):
    return json.loads((run / "export" / "manifest.json").read_text())


def test_every_file_is_proven_on_the_whole_validation_set(exported):
    found = manifest(exported)
    assert found["proof"]["images"] == "validation set" and found["proof"]["of"] == 178 and not found["notes"]
    checks = {(one["file"], one["precision"]): one for one in found["proof"]["checks"]}
    files = [("model.py", "float32"), ("model.py", "float64"), ("model.pt2", "float32"), ("model.onnx", "float32")]
    assert checks.keys() == {("masked network", "float64"), ("deployment form", "float64"), *files}
    assert all(checks[one]["images"] == 178 and checks[one]["top1_differs"] == 0 for one in files)
    assert all(0 <= one["difference"] <= one["limit"] <= 1e-5 for one in checks.values())
    assert checks["model.py", "float64"]["limit"] == 1e-10


def test_the_manifest_has_digests_and_provenance(exported):
    found = manifest(exported)
    assert found["files"].keys() == {path.name for path in (exported / "export").iterdir()} - {"manifest.json"}
    for name, facts in found["files"].items():
        content = (exported / "export" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert not (exported / "export" / "__pycache__").exists()
    provenance = found["provenance"]
    assert provenance["recipe"]["model"]["name"] == "vgg_digits" and provenance["seed"] == 0
    assert provenance["receipts"] and provenance["usage"]["finetune"]["images"] > 0
    assert provenance["accuracy"].keys() == {"pretrain", "search", "prune", "finetune"}


def test_architecture_and_preprocessing_are_described(exported):
    shape = json.loads((exported / "export" / "architecture.json").read_text())
    assert sum(site["channels"] for site in shape["sites"].values()) == 448
    assert shape["cost"]["compact"]["exact"]["macs"] < shape["cost"]["full"]["exact"]["macs"] == 2_415_872
    how = json.loads((exported / "export" / "preprocessing.json").read_text())
    assert (how["image_size"], how["resize"], how["mean"], how["class_names"]) == (8, 8, [0.3] * 3, list("0123456789"))


def test_the_hub_folder_is_as_timm_writes_it(exported):
    config = json.loads((exported / "hub" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("vgg_digits_compact", 10, list("0123456789"))
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8] and config["pretrained_cfg"]["crop_pct"] == 1
    assert load_file(exported / "hub" / "model.safetensors").keys() == load_file(exported / "export" / "model.safetensors").keys()
    assert (exported / "hub" / "README.md").read_text().startswith("---\nlicense: other\npipeline_tag: image-classification\n")


def test_torch_and_safetensors_are_enough(exported, clean_room):
    program = f"""
import sys
sys.path.insert(0, {str(exported / "export")!r})
import torch
from model import load
network = load()
images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-5)
    print(network(images).tolist())
network.train()(images).sum().backward()
assert all(weight.grad is not None for weight in network.parameters())
"""
    found = torch.tensor(json.loads(clean_room(program, *TORCH)))
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = compact.load(exported / "compact")(images)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_onnxruntime_and_numpy_are_enough(exported, clean_room):
    program = f"""
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(exported / "export" / "model.onnx")!r})
images = numpy.random.default_rng(0).random((5, 3, 8, 8), dtype=numpy.float32)
(logits,) = session.run(None, {{"images": images}})
(first,) = session.run(None, {{"images": images[:1]}})
assert numpy.allclose(logits[:1], first, atol=1e-5)
assert "torch" not in sys.modules
print(logits.tolist())
"""
    import numpy

    found = torch.tensor(json.loads(clean_room(program, "numpy", "onnxruntime", "flatbuffers")))
    images = torch.from_numpy(numpy.random.default_rng(0).random((5, 3, 8, 8), dtype=numpy.float32))
    with torch.no_grad():
        expected = compact.load(exported / "compact")(images)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_files_with_other_weights_do_not_pass(exported, tmp_path):
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    network = compact.load(exported / "compact")
    with torch.no_grad():
        next(network.parameters())[0, 0, 0, 0] += 0.01
    images = validation_images(load(exported / "recipe.yaml"), 10, 8)
    checks = proof.prove(network, folder, ["model.py"], images)
    assert [check.precision for check in checks] == ["float32", "float64"] and not any(check.holds for check in checks)


def test_files_of_joined_branches_are_proven(exported, tmp_path):
    torch.manual_seed(0)
    net, data = nets.build("supernet_digits"), load(exported / "recipe.yaml").data
    keep = torch.rand(net.num_gates) < 0.5
    # A program of fewer branches is written and loaded sooner.
    for site, part in net.by_site(keep).items():
        part &= "k3" in site or "k" not in site
    network = compact.compact(net, masks.rescue(net, keep)[0]).eval()
    text, state = source(program(network, 8), network, "a supernet")
    assert "k3e3_k3e6" in text
    files.write_torch(text, state, tmp_path)
    files.write_onnx(program(network, 8), tmp_path, None)
    images = Images(8, 0, "drawn", [], data, None, [])
    checks = [proof.joined(network, images), *proof.prove(network, tmp_path, ["model.py", "model.onnx"], images)]
    assert len(checks) == 4 and all(check.holds for check in checks), checks


def test_a_file_of_any_size_is_proven_at_two_sizes(exported, tmp_path):
    network, data = compact.load(exported / "compact"), load(exported / "recipe.yaml").data
    images, larger = (Images(8, 0, "drawn", [], data.model_copy(update={"image_size": size}), None, []) for size in (8, 16))
    files.write_pt2(program(network, 16, any_size=True), tmp_path)
    (check,) = proof.prove(network, tmp_path, ["model.pt2"], larger, any_size=True)
    assert check.holds and check.images == 10
    # That of the export is of one size.
    with pytest.raises(proof.ProofError, match=r"model\.onnx: it cannot be run in a process of its own"):
        proof.prove(network, exported / "export", ["model.onnx"], images, any_size=True)


def test_a_file_of_executorch_is_proven(exported, tmp_path):
    pytest.importorskip("executorch")
    network, images = compact.load(exported / "compact"), validation_images(load(exported / "recipe.yaml"), 10, 80)
    files.write_executorch(program(network, 8), tmp_path)
    (check,) = proof.prove(network, tmp_path, ["model.pte"], images)
    assert check.holds and check.images == 80
    with pytest.raises(InputError, match="of one height and width; leave out --any-size"):
        files.write_executorch(program(network, 16, any_size=True), tmp_path)


def test_a_file_that_never_answers_is_named(exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    (folder / "model.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(proof, "PATIENCE_SECONDS", 0.2)
    images = validation_images(load(exported / "recipe.yaml"), 10, 8)
    with pytest.raises(proof.ProofError, match=r"model\.py: .*no answer in 0\.2 s"):
        proof.prove(compact.load(exported / "compact"), folder, ["model.py"], images)


def test_a_file_that_cannot_be_loaded_is_named(exported, tmp_path):
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    (folder / "model.onnx").write_bytes(b"none")
    images = validation_images(load(exported / "recipe.yaml"), 10, 8)
    with pytest.raises(proof.ProofError, match=r"model\.onnx: it cannot be run in a process of its own \(.+\)"):
        proof.prove(compact.load(exported / "compact"), folder, ["model.onnx"], images)


def test_a_failed_proof_ends_with_3_and_leaves_the_export_before(short, capsys):
    lines = (short / "metrics.jsonl").read_text().splitlines()
    record = next(json.loads(line) for line in lines if '"kind": "prune"' in line)
    other = "A" + record["mask"][1:] if record["mask"][0] != "A" else "/" + record["mask"][1:]
    (short / "metrics.jsonl").write_text((short / "metrics.jsonl").read_text().replace(record["mask"], other))
    (short / "export").mkdir()
    (short / "export" / "before").touch()
    code, _, err = called(door.main, capsys, short, "--to", "", "--images", "4")
    assert code == 3 and err.startswith("error: compact: it is not what pruning makes of the recipe's network and the mask")
    assert [path.name for path in (short / "export").iterdir()] == ["before"] and not list(short.glob(".*export*"))


def test_images_are_drawn_where_the_shards_are_gone(short, capsys):
    text = (short / "recipe.yaml").read_text()
    shards = next(line for line in text.splitlines() if line.strip().startswith("val:"))
    (short / "recipe.yaml").write_text(text.replace(shards, "  val: /nowhere/val-*.tar"))
    code, out, err = called(door.main, capsys, short, "--to", "", "--images", "4")
    assert code == 0 and "warning: drawn images, since the validation set cannot be read: key 'data.val'" in err
    assert "model.py" in out and manifest(short)["proof"]["images"] == "drawn" and len(manifest(short)["notes"]) == 1


@pytest.mark.parametrize(
    ("change", "message"), [("compact", "there is no compact network yet"), ("recipe.yaml", "holds no recipe")]
)
def test_what_is_no_finished_run_is_refused(short, change, message):
    path = short / change
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        export(short, Options(kinds=[]))


def test_kinds_of_files_are_those_that_can_be_written():
    assert tuple(files.WRITERS) == door.KINDS


def test_an_export_alone_is_finetuned_and_pruned_further(exported, digits, tmp_path, train_here):
    alone = shutil.copytree(exported / "export", tmp_path / "alone")
    words = arguments(digits, tmp_path / "next", *SHORT, "phases.pretrain.epochs=0")
    ended = train_here(*words, "phases.search.epochs=0", "--init-from", alone)
    assert ended.code == 0, ended.err
    before, after = (records.summary(folder) for folder in (exported, tmp_path / "next"))
    assert after["accuracy"]["prune"] == pytest.approx(before["accuracy"]["finetune"], abs=1e-6)
    assert (after["compact"], after["channels"]) == (before["compact"], before["channels"])
    further = arguments(digits, tmp_path / "further", *SHORT, f"model.name=compact:{alone}", "architecture.target.macs=0.7x")
    ended = train_here(*further)
    assert ended.code == 0, ended.err
    pruned = records.summary(tmp_path / "further")
    assert (
        pruned["full"]["exact"] == before["compact"]["exact"]
        and pruned["compact"]["exact"]["macs"] < pruned["full"]["exact"]["macs"]
    )
    for name, content in (("architecture.json", "{"), ("manifest.json", "{}"), ("architecture.json", '{"mask": "AA=="}')):
        kept = (alone / name).read_text()
        (alone / name).write_text(content)
        ended = train_here(*words, "--overwrite", "phases.search.epochs=0", "--init-from", alone)
        assert ended.code == 2 and "is no export that can be finetuned" in ended.err
        (alone / name).write_text(kept)
