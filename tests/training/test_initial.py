"""Weights to begin with: torchvision's by its names, another run's, a file's; and a run whose search begins with them."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from faulty import FEW, records, refused
from safetensors.torch import load_file, save_file

from dnal_dist import nets, recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common import errors
from dnal_dist.distributed.context import Context
from dnal_dist.report import outputs
from dnal_dist.report import records as report_records
from dnal_dist.training import phases, pretrained, setup

NETWORKS = list(pretrained.TORCHVISION.items())
SKIP = "phases.pretrain.steps=0"


def theirs(name: str, classes: int = 1000) -> torch.nn.Module:
    """torchvision's network with random weights and affines, for evaluation. Its statistics are random, but near those of some
    images, or what tells images apart would be lost within a few layers."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=classes)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.normal_(0, 0.1)
            norm.momentum = 1.0
        net(torch.randn(2, 3, 64, 64))
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= 0.8 + 0.4 * torch.rand(norm.num_features)
        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias.normal_(0, 0.1)
    return net.eval()


def given(tensors: dict, origin: str = "a test") -> pretrained.Source:
    return pretrained.Source(dict(tensors), origin, [])


def filled(net, tensors: dict, model: str) -> list[str]:
    return pretrained.fill(net, given(tensors), model)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("head", ["module.", "_orig_mod.module.", "model.", "ema.", "state_dict.", "state_dict.model."])
def test_what_other_programs_put_before_all_names_is_left_out_and_told(head):
    net, other = nets.build("resnet_digits"), nets.build("resnet_digits")
    (line,) = filled(net, {f"{head}{name}": tensor for name, tensor in other.state_dict().items()}, "resnet_digits")
    assert line == f"a test: all names begin with '{head}', which is left out" and same(net.state_dict(), other.state_dict())
    mixed = {f"{head if number else ''}{name}": t for number, (name, t) in enumerate(other.state_dict().items())}
    with pytest.raises(errors.InputError, match=r"lacks .* and has an unknown"):
        filled(net, mixed, "resnet_digits")


@pytest.mark.parametrize("name, model", NETWORKS)
def test_every_name_of_torchvision_is_one_of_ours(name, model):
    with torch.device("meta"):
        net, reference = nets.build(model), torchvision.models.get_model(name, weights=None)
    names, own = pretrained.torchvision_names(net, model), net.state_dict()
    assert names.keys() == reference.state_dict().keys()
    assert len(set(names.values())) == len(names)
    assert all(reference.state_dict()[one].shape == own[other].shape for one, other in names.items())
    # What torchvision lacks is the two BatchNorms behind VGG's hidden Linear layers.
    hidden = {other.rpartition(".")[0] for other in own.keys() - names.values()}
    assert hidden == ({"classifier.1", "classifier.4"} if name == "vgg16_bn" else set())


@pytest.mark.parametrize("name, model", NETWORKS)
def test_logits_are_those_of_torchvision(name, model):
    reference, images = theirs(name), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    # As some published files are: from before batches were counted.
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("num_batches_tracked")}
    # Random weights for the largest would take longer than all the rest.
    with torch.device("meta"):
        net = nets.build(model).eval()
    net = net.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
        assert filled(net, tensors, model) == []
        expected, found = reference(images), net(images)
    scale = float(expected.abs().max())
    # The two images are told apart, so more than biases are compared.
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * scale
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * scale)


def test_own_names_take_everything():
    torch.manual_seed(0)
    source, net = nets.build("vgg_digits"), nets.build("vgg_digits")
    source(torch.randn(8, 3, 8, 8))
    assert not same(source.state_dict(), net.state_dict())
    assert filled(net, source.state_dict(), "vgg_digits") == []
    assert same(source.state_dict(), net.state_dict())


@pytest.mark.parametrize("model", ["vgg_digits", "resnet_digits", "supernet_digits", "vgg16_cifar"])
def test_for_other_classes_the_last_layer_stays_random(model):
    torch.manual_seed(0)
    source, net = nets.build(model, 7, 0.25), nets.build(model, 5, 0.25)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (warning,) = filled(net, source.state_dict(), model)
    head = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    assert "7 classes, this network 5" in warning and f" {head}," in warning
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith(f"{head}.") else source.state_dict())[name]), name


def test_torchvision_for_other_classes():
    reference, net = theirs("mobilenet_v2"), nets.build("mobilenetv2_imagenet", 10)
    (warning,) = filled(net, reference.state_dict(), "mobilenetv2_imagenet")
    assert "has 1000 classes, this network 10" in warning
    assert torch.equal(net.last.conv.weight, reference.features[18][0].weight)


def without(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "change, told",
    [
        (without("stages.0.0.conv.weight"), r"a test lacks stages\.0\.0\.conv\.weight; give weights of the same network"),
        (put("stem.x", torch.zeros(1)), r"a test has an unknown stem\.x; give"),
        (lambda tensors: tensors.clear(), r"lacks stages\.0\.0\.conv\.weight, .* and \d+ more; give"),
        (
            put("stages.0.0.norm.bias", torch.zeros(4)),
            r"stages\.0\.0\.norm\.bias of a test is of shape \(4,\), this network's of \(32,\)",
        ),
        (put("classifier.0.weight", torch.zeros(10, 7)), r"classifier\.0\.weight .*\(10, 7\), this network's of \(10, 128\)"),
        (put("classifier.0.bias", torch.tensor(1.0)), r"classifier\.0\.bias .*\(\), this network's of \(10,\)"),
        (
            put("stages.0.0.norm.bias", torch.full((32,), torch.nan)),
            r"stages\.0\.0\.norm\.bias of a test has values that are not finite",
        ),
        (put("stages.0.0.norm.bias", torch.full((32,), 1e300, dtype=torch.float64)), "not finite"),
        (put("stages.0.0.norm.running_var", torch.full((32,), -1.0)), r"running_var of a test has .*negative variances"),
        (
            put("stages.0.0.norm.bias", torch.zeros(32, dtype=torch.int8)),
            r"norm\.bias of a test is of torch\.int8, not torch\.float32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, told):
    torch.manual_seed(0)
    net, tensors = nets.build("vgg_digits"), nets.build("vgg_digits").state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    change(tensors)
    with pytest.raises(errors.InputError, match=r"key 'model\.init_from': .*" + told) as error:
        filled(net, tensors, "vgg_digits")
    assert "\n" not in str(error.value)
    assert same(before, net.state_dict())


def test_another_width_is_refused_rather_than_its_last_layer_dropped():
    with pytest.raises(errors.InputError, match=r"is of shape .*model\.width"):
        filled(nets.build("vgg_digits", 5), nets.build("vgg_digits", 7, 0.5).state_dict(), "vgg_digits")


class Stub:
    """Two processes, the other of which tells `others`, one after the other."""

    def __init__(self, *others):
        self.world_size, self.others = 2, list(others)

    def gather(self, items: list) -> list:
        return [*items, self.others.pop(0)]


def settings(source: str, model: str = "vgg_digits") -> recipe.Recipe:
    return recipe.load("recipes/digits.yaml", [f"model.init_from={json.dumps(source)}", f"model.name={model}"])


def test_processes_that_read_other_weights_are_told(tmp_path):
    save_file(nets.build("vgg_digits").state_dict(), tmp_path / "w.safetensors")
    net = nets.build("vgg_digits")
    with pytest.raises(errors.InputError, match=r"process 1 reads other weights from .*w\.safetensors than process 0; copy"):
        pretrained.start_from(net, settings(f"{tmp_path}/w.safetensors"), Stub(None, None, None, "another"))


def test_what_one_process_cannot_read_stops_all(tmp_path):
    save_file(nets.build("vgg_digits").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(errors.InputError, match=r"^process 1: key 'x': no$"):
        pretrained.start_from(nets.build("vgg_digits"), settings(f"{tmp_path}/w.safetensors"), Stub(None, "key 'x': no"))


def test_all_hear_what_a_later_process_of_a_machine_cannot_read(monkeypatch):
    """It reads in its turn, when the machine's first one has, and nobody waits for it in vain."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    context = Stub(None, None)
    with pytest.raises(errors.InputError, match="there is no nowhere"):
        pretrained.start_from(nets.build("vgg_digits"), settings("nowhere"), context)
    assert not context.others


def cache(folder: Path, name: str, content) -> Path:
    """The file in which torchvision keeps the weights of its network `name`, below TORCH_HOME `folder`."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = folder / "hub" / "checkpoints" / Path(url).name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def published(name: str, model: str) -> pretrained.Source:
    return pretrained._read(settings(f"torchvision:{name}", model))


def test_torchvisions_weights_come_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = theirs("mobilenet_v2").state_dict()
    cache(tmp_path, "mobilenet_v2", state)
    net = nets.build("mobilenetv2_imagenet")
    found = pretrained.start_from(net, settings("torchvision:mobilenet_v2", "mobilenetv2_imagenet"), Context())
    names = pretrained.torchvision_names(net, "mobilenetv2_imagenet")
    assert same(net.state_dict(), {names[name]: tensor for name, tensor in state.items()})
    assert "MobileNet_V2_Weights" in found.origin and not found.warnings


def test_without_a_network_the_file_and_its_place_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to\nhost")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    where = f"{tmp_path}/hub/checkpoints"
    told = rf"cannot be downloaded \(no route to host\); put it as resnet50-\w+\.pth into {where}$"
    with pytest.raises(errors.InputError, match=told):
        published("resnet50", "resnet50_imagenet")


class Trap:
    """What a hostile file would have run."""

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("kind", ["garbage", "cut", "hostile", "nested"])
def test_a_cached_file_that_is_not_torchvisions_is_refused_unrun(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trap = Trap()
    trap.path = str(tmp_path / "ran")
    path = cache(
        tmp_path, "resnet50", {"hostile": {"fc.weight": trap}, "nested": {"state": {"fc.weight": torch.zeros(2)}}}.get(kind, b"x")
    )
    if kind == "cut":
        path.write_bytes(cache(tmp_path, "resnet50", {"fc.weight": torch.zeros(100)}).read_bytes()[:300])
    with pytest.raises(errors.InputError, match=rf"{path} is not the file that torchvision published \(\w+\); remove it$"):
        published("resnet50", "resnet50_imagenet")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "source, model, told",
    [
        ("torchvision:resnet18", "resnet50_imagenet", "has the weights of torchvision:resnet18, not of resnet50_imagenet"),
        ("torchvision:resnet50", "vgg_digits", "has the weights of resnet50_imagenet, not of vgg_digits; change one"),
        ("nowhere/at all", "vgg_digits", "there is no nowhere/at all; give a run folder, .* or one of torchvision:vgg16_bn"),
        ("~nobody-here/x", "vgg_digits", "there is no such home folder"),
        ("x" * 300, "vgg_digits", "there is no x+; give"),
        ("x\0", "vgg_digits", "one line without control characters"),
        ("README.md", "vgg_digits", r"README\.md is no \.safetensors file"),
        ("docs", "vgg_digits", "docs is neither a run folder nor a checkpoint's"),
    ],
)  # fmt: skip
def test_sources_that_are_none_are_refused(source, model, told):
    with pytest.raises(errors.InputError, match=told):
        pretrained._read(settings(source, model))


@pytest.mark.parametrize(
    "change", [lambda whole: whole[:-9], lambda whole: b"", lambda whole: b"\xff" * 8 + whole[8:], lambda _: b"{}"]
)
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    save_file(nets.build("vgg_digits").state_dict(), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(errors.InputError, match=rf"{path} cannot be read \(.+\); give a whole") as error:
        pretrained._read(settings(str(path)))
    assert "\n" not in str(error.value)


def test_the_option_is_the_key(tmp_path, train):
    """Names that YAML would take for something else, too."""
    for name in ("1e5", "null", "a: b", "'x", 'y"\\n', "[z]", "ü"):
        ended = train("--init-from", str(name))
        refused(ended, r"key 'model\.init_from': there is no ")
        assert f"there is no {name};" in ended.err
    refused(train("--init-from", ""), r"key 'model\.init_from': value should have at least 1")


@pytest.fixture(scope="module")
def source(digits, tmp_path_factory):
    """A run that stands where its search begins, and its network."""
    folder = tmp_path_factory.mktemp("source") / "run"
    shards = [f"data.train={digits}/train-*.tar", f"data.val={digits}/val-*.tar", f"output={folder}"]
    run = setup.prepare(recipe.load("recipes/digits.yaml", [*shards, *FEW, "phases.pretrain.steps=20"]), Context())
    batches = phases.training_batches(run)
    phases.pretrain(run, batches)
    batches.close()
    run.log.close()
    run.close()
    return folder, {name: tensor.clone() for name, tensor in run.supernet.state_dict().items()}


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


def test_pretrain_goes_on_from_given_weights(source, begins, tmp_path):
    ended, found = begins("--init-from", source[0], "phases.pretrain.optimizer.lr=1e-9")
    assert ended.code == 0, ended.err
    for name, tensor in found.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(tensor, source[1][name], rtol=0, atol=1e-6)
    assert int(found["stages.0.0.norm.num_batches_tracked"]) == 22
    assert [r["step"] for r in records(tmp_path, "eval") if r["phase"] == "pretrain"] == [0, 2]
    assert "accuracy after pretrain" in ended.out and "at the start" not in ended.out


def test_other_classes_are_warned_of_in_the_record(source, begins, tmp_path):
    ended, _ = begins("--init-from", source[0], SKIP, "model.num_classes=12")
    assert ended.code == 0, ended.err
    (warning,) = [w for w in report_records.summary(tmp_path / "run")["warnings"] if "this network 12" in w]
    assert "has 10 classes, this network 12: its last layer, classifier.0, begins with random weights" in warning
    assert f"warning: {warning}" in ended.out


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(source, begins, tmp_path):
    broken = tmp_path / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    saved = checkpoint.read(next(source[0].glob("checkpoints/step-*20-search")))
    for step in (20, 30):
        moved = saved.state.model_copy(update={"global_step": step})
        checkpoint.write(broken, checkpoint.Checkpoint(saved.tensors, moved), checkpoint.Kept(2, 0))
    newest = broken / "step-00000030-search"
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-1])
    ended, found = begins("--init-from", broken.parent, SKIP)
    assert ended.code == 0, ended.err
    assert same(found, source[1])
    (warning,) = report_records.summary(tmp_path / "run")["warnings"]
    assert f"{newest}: checkpoint is damaged (" in warning and "; it was skipped" in warning
    refused(begins("--init-from", newest, "--overwrite")[0], rf"{newest}: checkpoint is damaged \(.*\); give another")


def test_a_pruned_network_is_refused_and_the_old_run_stays(source, begins, tmp_path):
    ended, _ = begins("--init-from", source[0], SKIP)
    assert ended.code == 0, ended.err
    finished = tmp_path / "finished"
    (tmp_path / "run").rename(finished)
    assert begins(SKIP)[0].code == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    ended, _ = begins("--overwrite", "--init-from", finished)
    refused(ended, rf"{finished} holds a network that is pruned already \(done\); give a checkpoint from before pruning")
    for own in (tmp_path / "run", checkpoint.found(tmp_path / "run" / "checkpoints")[0]):
        refused(begins("--overwrite", "--init-from", own)[0], r"is in the run folder that this run replaces; name another")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_resume_does_not_look_at_it(digits, tmp_path, train_here, source, monkeypatch):
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


def test_weights_that_give_no_loss_are_blamed(source, begins, tmp_path):
    tensors = {name: tensor * (1e30 if name.endswith(("conv.weight", "norm.weight")) else 1) for name, tensor in source[1].items()}
    ended, _ = begins("--init-from", as_file(tmp_path, tensors), SKIP)
    refused(ended, r"key 'model\.init_from': with the weights of .*w\.safetensors the loss on data\.val is (nan|inf); give others")


def test_a_published_row_tells_that_a_run_began_with_given_weights(tmp_path):
    """Such a run had more training than its epochs tell."""
    from dnal_dist.report import published, records

    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "name": "x"}\n')
    (tmp_path / "recipe.yaml").write_text("model: {name: resnet50_imagenet, init_from: 'torchvision:resnet50'}\n")
    run = records.load(tmp_path)
    place = published.place(run, records.result_of(run))
    assert "weights of torchvision:resnet50 to begin with" in place.remarks[0]


def test_saved_names_are_what_a_file_holds(source):
    """The checkpoint's own tensors file holds more than a network: it is refused, not half used."""
    path = next(source[0].glob("checkpoints/step-*20-search")) / "state.safetensors"
    assert "alpha" in load_file(path)
    with pytest.raises(errors.InputError, match=r"lacks stages.* and has an unknown"):
        filled(nets.build("vgg_digits"), load_file(path), "vgg_digits")
