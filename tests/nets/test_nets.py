"""Gated networks: the folded gate, resting statistics, sites, and the published sizes."""

import pytest
import torch
import torch.nn.functional as F

from dnal_dist import nets
from dnal_dist.nets import cost
from dnal_dist.nets.gated import ConvBN
from dnal_dist.search.architecture import Architecture

SMALL = ("vgg_digits", "resnet_digits", "supernet_digits")


@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (6, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_folded_gate_equals_multiplying_the_output(shape, training):
    torch.manual_seed(0)
    norm = nets.GatedBatchNorm(5).double().train(training)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    leaves = (x, gate, norm.weight, norm.bias)
    start = {name: buffer.clone() for name, buffer in norm.named_buffers()}

    folded = norm(x, gate)
    folded_gradients = torch.autograd.grad(folded, leaves, upstream)
    moved = norm.running_mean.clone()
    norm.load_state_dict(start, strict=False)
    multiplied = norm(x) * gate.view(1, 5, *(1,) * (len(shape) - 2))
    multiplied_gradients = torch.autograd.grad(multiplied, leaves, upstream)

    torch.testing.assert_close(folded, multiplied, rtol=0, atol=1e-12)
    for one, other in zip(folded_gradients, multiplied_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.equal(moved, norm.running_mean)
    assert training != torch.equal(moved, start["running_mean"])


def test_without_gate_it_is_plain_batchnorm():
    torch.manual_seed(0)
    ours, plain = nets.GatedBatchNorm(4), torch.nn.BatchNorm2d(4)
    x = torch.randn(8, 4, 3, 3)
    for _ in range(2):
        assert torch.equal(ours(x), plain(x))
    ours.eval(), plain.eval()
    assert torch.equal(ours(x), plain(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_gate_keeps_no_copy_of_the_activations():
    """The gated output needs for its backward pass what the plain one needs, and a few vectors of one number a channel."""

    def kept_bytes(gate):
        norm, x, total = nets.GatedBatchNorm(16), torch.randn(8, 16, 32, 32, requires_grad=True), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(x, gate)
        return total

    activations = 8 * 16 * 32 * 32 * 4
    assert activations <= kept_bytes(None) < 1.01 * activations
    assert kept_bytes(torch.rand(16, requires_grad=True)) - kept_bytes(None) <= 8 * 16 * 4


@pytest.mark.parametrize("name", SMALL)
def test_frozen_statistics_do_not_move_but_still_normalise_by_the_batch(name):
    torch.manual_seed(0)
    net = nets.build(name)
    images = torch.randn(8, 3, 8, 8)
    expected = net(images)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with nets.frozen_statistics(net):
        rested = net(images)
    assert torch.equal(rested, expected)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net(images)
    assert not torch.equal(before[next(k for k in before if k.endswith("running_mean"))], _first_mean(net))


def _first_mean(net):
    return next(m.running_mean for m in net.modules() if isinstance(m, nets.GatedBatchNorm))


@pytest.mark.parametrize("name", SMALL)
def test_hardened_gates_are_the_hard_mask(name):
    """delta -> infinity: the network with soft gates becomes the network with channels masked."""
    torch.manual_seed(0)
    net = nets.build(name).double().eval()
    architecture = Architecture(net.num_gates).double()
    torch.nn.init.normal_(architecture.alpha)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    mask = (architecture.alpha > 0).double()
    with torch.no_grad():
        masked = net(images, mask)
        distance = [float((net(images, architecture.gates(delta)) - masked).abs().max()) for delta in (1, 10, 1e6)]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-12
    assert torch.equal(architecture.keep(1e6, 0.9), architecture.alpha > 0)


@pytest.mark.parametrize("name", SMALL)
def test_each_gate_reaches_its_own_channel(name):
    """Closing site by site silences exactly the ConvBN that the site is named for."""
    torch.manual_seed(0)
    net = nets.build(name).eval()
    for module in net.modules():
        if isinstance(module, nets.GatedBatchNorm):
            torch.nn.init.ones_(module.bias)  # so that no channel is silent by itself
    outputs = {}
    for site in net.gate_sites:
        net.get_submodule(site).register_forward_hook(lambda _m, _i, out, site=site: outputs.__setitem__(site, out.clone()))
    images = torch.randn(2, 3, 8, 8)
    for site, channels in net.gate_sites.items():
        gates = torch.ones(net.num_gates)
        net.by_site(gates)[site][channels // 2] = 0
        net(images, gates)
        silent = {(s, c) for s, out in outputs.items() for c in range(out.shape[1]) if not out[:, c].any()}
        assert silent == {(site, channels // 2)}


@pytest.mark.parametrize(
    "name, sites, gates",
    [
        *(("vgg16_cifar", 13, 4224), ("vgg16_imagenet", 13, 4224), ("resnet56_cifar", 55, 2032), ("resnet50_imagenet", 49, 22_720)),
        *(("mobilenetv2_cifar", 35, 9920), ("mobilenetv2_imagenet", 35, 9920), ("proxyless_supernet", 255, 60_704)),
        ("vgg_digits", 6, 448),
    ],
)
def test_sites_and_gates(name, sites, gates):
    with torch.device("meta"):
        net = nets.build(name)
    assert (len(net.gate_sites), net.num_gates) == (sites, gates)
    assert all(isinstance(net.get_submodule(site), ConvBN) for site in net.gate_sites)


def test_gates_of_ones_change_nothing():
    torch.manual_seed(0)
    for name in SMALL:
        net = nets.build(name).eval()
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(net(images), net(images, torch.ones(net.num_gates)))


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    net = nets.build("vgg16_cifar")
    conv, linear = net.stages[2][1].conv, net.classifier[0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not conv.bias.any() and not linear.bias.any()


def test_the_supernets_classifier_and_batchnorm_are_the_papers():
    torch.manual_seed(0)
    net = nets.build("supernet_digits")
    bound = net.classifier.in_features**-0.5
    assert 0.9 * bound < net.classifier.weight.abs().max().item() <= bound
    assert {m.eps for m in net.modules() if isinstance(m, nets.GatedBatchNorm)} == {1e-3}
    assert {m.eps for m in nets.build("mobilenetv2_cifar").modules() if isinstance(m, nets.GatedBatchNorm)} == {1e-5}


def test_sites_say_where_they_are():
    with torch.device("meta"):
        sites = nets.build("proxyless_supernet").gate_sites
    assert sites["stages.2.cells.1.k5e6.depthwise"] == 480
    assert list(sites)[:3] == ["first.depthwise", "first.project", "stages.0.cells.0.k3e3.depthwise"]
    assert sites["last"] == 1280


# The large supernet is the small one's class, and takes seconds.
@pytest.mark.parametrize("name", [name for name in nets.NETWORKS if name != "proxyless_supernet"])
def test_classes_and_width(name):
    """Any network takes both, passes images and gates, and a narrower one is cheaper."""
    net = nets.build(name, 37, width=0.25)
    images = torch.randn(2, 3, 32, 32)
    assert net(images).shape == net(images, torch.rand(net.num_gates)).shape == (2, 37)
    with torch.device("meta"):
        wider = nets.build(name, 37, width=0.5)
    assert cost.count(net, 32) < cost.count(wider, 32)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"model\.name.*vgg_digts.*vgg_digits"):
        nets.build("vgg_digts")


def test_option_a_shortcut_is_the_published_one():
    """Every other pixel, and zeros for the new channels, half in front and half behind."""
    torch.manual_seed(0)
    block = nets.build("resnet_digits").eval().get_submodule("stages.1.0")
    torch.nn.init.zeros_(block.conv2.norm.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
