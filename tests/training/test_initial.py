"""A run whose search begins with given weights: of another run, or of a file."""

import json
from pathlib import Path

import pytest
import torch
from faulty import FEW, records, refused
from safetensors.torch import save_file
from weights import same

from dnal_dist import nets
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common import errors
from dnal_dist.recipe import Keep
from dnal_dist.report import outputs
from dnal_dist.report import records as report_records
from dnal_dist.training import phases

pytestmark = pytest.mark.xdist_group("initial weights")

SKIP = "phases.pretrain.steps=0"


def test_the_option_is_the_key(tmp_path, train):
    """Names that YAML would take for something else, too."""
    for name in ("1e5", "null", "a: b", "'x", 'y"\\n', "[z]", "ü"):
        ended = train("--init-from", str(name))
        refused(ended, r"key 'model\.init_from': there is no ")
        assert f"there is no {name};" in ended.err
    refused(train("--init-from", ""), r"key 'model\.init_from': value should have at least 1")


@pytest.fixture
def begins(digits, tmp_path, train_here, monkeypatch):
    """The command, into the run folder tmp_path/run, and the network as its search found it."""

    def run(*changes: str):
        found, search = {}, phases.search

        def watched(run, batches):
            assert not found
            found.update({name: tensor.clone() for name, tensor in run.supernet.state_dict().items()})
            assert run.state.step == 0 and not run.architecture.alpha.any()
            search(run, batches)

        monkeypatch.setattr(phases, "search", watched)
        shards = (f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path}/run")
        ended = train_here("recipes/digits.yaml", *shards, *FEW, *changes)
        monkeypatch.undo()
        return ended, found

    return run


def test_two_processes_begin_with_the_same_weights(source, digits, tmp_path, train_command):
    shards = (f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path}/run")
    ended = train_command("recipes/digits.yaml", *shards, *FEW, SKIP, "--init-from", source[0], processes=2)
    assert ended.returncode == 0, ended.stderr
    assert records(tmp_path, "start")[0]["world_size"] == 2
    assert ended.stdout.count("the first weights are those of") == 1
    assert records(tmp_path, "eval")[0]["cross_entropy"] == pytest.approx(last_eval(source[0])["cross_entropy"], rel=1e-5)


def last_eval(run: Path) -> dict:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"][-1]


def as_file(folder: Path, tensors: dict) -> Path:
    save_file(tensors, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_the_search_begins_with_the_weights_of_another_run(source, begins, tmp_path, kind):
    folder, tensors = source
    whence = {"run": folder, "checkpoint": next(folder.glob("checkpoints/step-*20-search")), "file": as_file(tmp_path, tensors)}[
        kind
    ]
    ended, found = begins("--init-from", whence, SKIP, "seed=5")
    assert ended.code == 0, ended.err
    assert same(found, tensors)
    start, *_ = records(tmp_path, "start")
    assert start["init_from"] == str(whence)
    first, *_ = records(tmp_path, "eval")
    assert (first["phase"], first["step"], first["global_step"]) == ("pretrain", 0, 0)
    measured = last_eval(folder)
    assert all(first[key] == measured[key] for key in ("accuracy", "cross_entropy", "samples"))
    assert f"the first weights are those of {whence}" in ended.out


def test_a_run_without_pretrain_has_a_report(source, begins, tmp_path):
    ended, _ = begins("--init-from", source[0], SKIP)
    assert ended.code == 0, ended.err
    assert "accuracy at the start " in ended.out and "after pretrain" not in ended.out
    found = report_records.summary(tmp_path / "run")
    assert list(found["accuracy"]) == ["pretrain", "search", "prune", "finetune"]
    assert found["finished"] and not found["warnings"]
    assert records(tmp_path, "end")[0]["phase_seconds"].keys() == {"search", "prune", "finetune"}
    assert [r["phase"] for r in records(tmp_path, "phase")] == ["search", "prune", "finetune"]
    assert {r["phase"] for r in records(tmp_path, "train")} == {"search", "finetune"}
    outputs.write_all(tmp_path / "run", draw=False)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "at the start" in page and "initial weights" in page and str(source[0]) in page


@pytest.mark.parametrize("none", [SKIP, "phases.pretrain.epochs=0"])
def test_random_weights_need_no_pretrain_either(begins, tmp_path, none):
    ended, found = begins(none, "seed=3")
    assert ended.code == 0, ended.err
    torch.manual_seed(3)
    assert same(found, nets.build("vgg_digits").state_dict())
    assert list(report_records.summary(tmp_path / "run")["accuracy"]) == ["search", "prune", "finetune"]
    assert "pretrain" not in ended.out


def test_pretrain_starts_from_given_weights(source, begins, tmp_path):
    ended, found = begins("--init-from", source[0], "phases.pretrain.optimizer.lr=1e-9")
    assert ended.code == 0, ended.err
    for name, tensor in found.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(tensor, source[1][name], rtol=0, atol=1e-6)
    assert int(found["stages.0.0.norm.num_batches_tracked"]) == 22
    assert [r["step"] for r in records(tmp_path, "eval") if r["phase"] == "pretrain"] == [0, 2]
    assert "accuracy after pretrain" in ended.out and "at the start" not in ended.out


def test_a_source_of_the_command_replaces_published_weights(begins, tmp_path):
    """`pretrained: true`, as a drafted recipe has it."""
    ended, _ = begins("model.name=torchvision:resnet18", "model.pretrained=true", "--init-from", tmp_path / "nowhere")
    refused(ended, r"key 'model\.init_from': .*nowhere")


def test_other_classes_are_warned_of_in_the_record(source, begins, tmp_path):
    ended, _ = begins("--init-from", source[0], SKIP, "model.num_classes=12")
    assert ended.code == 0, ended.err
    (warning,) = [w for w in report_records.summary(tmp_path / "run")["warnings"] if "this network 12" in w]
    assert "has 10 classes, this network 12: its last layer, classifier.0, begins with random weights" in warning
    assert f"warning: {warning}" in ended.out


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_taken(source, begins, tmp_path):
    broken = tmp_path / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    saved = checkpoint.read(next(source[0].glob("checkpoints/step-*20-search")))
    for step in (20, 30):
        moved = saved.state.model_copy(update={"global_step": step, "phase": "pretrain"})
        checkpoint.write(broken, checkpoint.Checkpoint(saved.tensors, moved), Keep(last=2, best=0))
    newest = broken / "step-00000030-pretrain"
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-1])
    ended, found = begins("--init-from", broken.parent, SKIP)
    assert ended.code == 0, ended.err
    assert same(found, source[1])
    damaged, early = report_records.summary(tmp_path / "run")["warnings"]
    assert f"{newest}: checkpoint is damaged (" in damaged and "; it was skipped" in damaged
    assert early.endswith("broken was still in its pretrain, at iteration 20")
    refused(begins("--init-from", newest, "--overwrite")[0], rf"{newest}: checkpoint is damaged \(.*\); give another")


def test_a_pruned_network_is_refused_and_the_old_run_stays(source, begins, tmp_path):
    ended, _ = begins("--init-from", source[0], SKIP)
    assert ended.code == 0, ended.err
    finished = tmp_path / "finished"
    (tmp_path / "run").rename(finished)
    assert begins(SKIP)[0].code == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    newest = checkpoint.found(finished / "checkpoints")[0]
    ended, _ = begins("--overwrite", "--init-from", newest)
    pruned = rf"{newest} holds a network that is pruned already \(done\); to go on with it, give phases\.search\.steps=0"
    refused(ended, rf"{pruned}, or model\.name=compact:RUN")
    for own in (tmp_path / "run", checkpoint.found(tmp_path / "run" / "checkpoints")[0]):
        refused(begins("--overwrite", "--init-from", own)[0], r"is in the run folder that this run replaces; name another")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_resume_does_not_read_init_from(digits, tmp_path, train_here, source, monkeypatch):
    weights = as_file(tmp_path, source[1])
    shards = (f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={tmp_path}/run")
    arguments = ("recipes/digits.yaml", *shards, *FEW, SKIP, "--init-from", weights)
    with monkeypatch.context() as patch:
        patch.setattr(phases, "prune", lambda run: (_ for _ in ()).throw(errors.InputError("stopped here")))
        refused(train_here(*arguments), "stopped here")
    weights.unlink()
    refused(train_here(*arguments, "--overwrite"), "there is no ")
    ended = train_here(*arguments)
    assert ended.code == 0, ended.err
    assert "the first weights are" not in ended.out and "resumed in prune after 0 steps (2 in all)" in ended.out
    changed = train_here(*arguments[:-1], "elsewhere.safetensors")
    assert changed.code == 2 and "\n  + model.init_from: elsewhere.safetensors\n" in changed.err


def test_weights_without_a_finite_loss_are_named(source, begins, tmp_path):
    tensors = {name: tensor * (1e30 if name.endswith(("conv.weight", "norm.weight")) else 1) for name, tensor in source[1].items()}
    ended, _ = begins("--init-from", as_file(tmp_path, tensors), SKIP)
    refused(ended, r"key 'model\.init_from': with the weights of .*w\.safetensors the loss on data\.val is (nan|inf); give others")


def test_a_published_row_states_that_a_run_began_with_given_weights(tmp_path):
    """Such a run had more training than its epochs tell."""
    from dnal_dist.report import published, records

    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "name": "x"}\n')
    (tmp_path / "recipe.yaml").write_text("model: {name: resnet50_imagenet, init_from: 'torchvision:resnet50'}\n")
    run = records.load(tmp_path)
    place = published.place(run, records.result_of(run))
    assert "weights of torchvision:resnet50 to begin with" in place.remarks[0]
