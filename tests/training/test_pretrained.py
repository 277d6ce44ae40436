"""Weights to begin with: torchvision's by its names, another run's, a file's; read, checked and put into the network."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from weights import filled, same, settings, theirs

from dnal_dist import nets
from dnal_dist.common import errors
from dnal_dist.distributed.context import Context
from dnal_dist.training import pretrained

# Beside the runs that begin with the same weights.
pytestmark = pytest.mark.xdist_group("initial weights")

NETWORKS = list(pretrained.TORCHVISION.items())


@pytest.mark.parametrize("head", ["module.", "_orig_mod.module.", "model.", "ema.", "state_dict.", "state_dict.model."])
def test_prefixes_of_other_programs_are_removed_with_a_warning(head):
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
    # The two images are distinguished, so more than biases are compared.
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


def test_torchvisions_last_layer_for_other_classes_is_left_out():
    reference, net = theirs("mobilenet_v2"), nets.build("mobilenetv2_imagenet", 10)
    (warning,) = filled(net, reference.state_dict(), "mobilenetv2_imagenet")
    assert "has 1000 classes, this network 10" in warning
    assert torch.equal(net.last.conv.weight, reference.features[18][0].weight)


def without(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "change, message",
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
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, message):
    torch.manual_seed(0)
    net, tensors = nets.build("vgg_digits"), nets.build("vgg_digits").state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    change(tensors)
    with pytest.raises(errors.InputError, match=r"key 'model\.init_from': .*" + message) as error:
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


def test_processes_that_read_other_weights_are_refused(tmp_path):
    save_file(nets.build("vgg_digits").state_dict(), tmp_path / "w.safetensors")
    net = nets.build("vgg_digits")
    with pytest.raises(errors.InputError, match=r"process 1 reads other weights from .*w\.safetensors than process 0; copy"):
        pretrained.start_from(net, settings(f"{tmp_path}/w.safetensors"), Stub(None, None, None, "another"))


def test_what_one_process_cannot_read_stops_all(tmp_path):
    save_file(nets.build("vgg_digits").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(errors.InputError, match=r"^process 1: key 'x': no$"):
        pretrained.start_from(nets.build("vgg_digits"), settings(f"{tmp_path}/w.safetensors"), Stub(None, "key 'x': no"))


def test_all_processes_are_refused_what_a_later_one_cannot_read(monkeypatch):
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
    return pretrained.read(settings(f"torchvision:{name}", model))


def test_torchvisions_weights_come_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = theirs("mobilenet_v2").state_dict()
    cache(tmp_path, "mobilenet_v2", state)
    net = nets.build("mobilenetv2_imagenet")
    found = pretrained.start_from(net, settings("torchvision:mobilenet_v2", "mobilenetv2_imagenet"), Context())
    names = pretrained.torchvision_names(net, "mobilenetv2_imagenet")
    assert same(net.state_dict(), {names[name]: tensor for name, tensor in state.items()})
    assert "MobileNet_V2_Weights" in found.origin and not found.warnings


def test_without_a_network_the_file_and_its_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to\nhost")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    where = f"{tmp_path}/hub/checkpoints"
    message = rf"cannot be downloaded \(no route to host\); put it as resnet50-\w+\.pth into {where}$"
    with pytest.raises(errors.InputError, match=message):
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
    "source, model, message",
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
def test_unknown_sources_are_refused(source, model, message):
    with pytest.raises(errors.InputError, match=message):
        pretrained.read(settings(source, model))


@pytest.mark.parametrize(
    "change", [lambda whole: whole[:-9], lambda whole: b"", lambda whole: b"\xff" * 8 + whole[8:], lambda _: b"{}"]
)
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    save_file(nets.build("vgg_digits").state_dict(), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(errors.InputError, match=rf"{path} cannot be read \(.+\); give a whole") as error:
        pretrained.read(settings(str(path)))
    assert "\n" not in str(error.value)


def test_saved_names_are_what_a_file_holds(source):
    """The checkpoint's own tensors file holds more than a network: it is refused, not half used."""
    path = next(source[0].glob("checkpoints/step-*20-search")) / "state.safetensors"
    assert "alpha" in load_file(path)
    with pytest.raises(errors.InputError, match=r"lacks stages.* and has an unknown"):
        filled(nets.build("vgg_digits"), load_file(path), "vgg_digits")
