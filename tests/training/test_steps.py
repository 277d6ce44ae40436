"""The two steps: each moves its own group, and the resting one stays bit for bit as it is."""

import pytest
import torch
import torch.nn.functional as F

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import SGD, Training
from dnal_dist.search.architecture import Architecture
from dnal_dist.training.steps import architecture_step, weight_step


class Setting:
    """A small network, its architecture, both optimisers with momentum in them, and batches."""

    def __init__(self, name: str = "resnet_digits"):
        torch.manual_seed(0)
        self.net, self.images, self.labels = nets.build(name), torch.randn(8, 3, 8, 8), torch.arange(8) % 10
        self.architecture = Architecture(self.net.num_gates)
        self.trained = Context().wrap(self.net, SGD(lr=0.05, momentum=0.9, weight_decay=1e-4), {}, Training())
        self.net, self.weights = self.trained.module, self.trained.optimizer
        self.alphas = torch.optim.SGD(self.architecture.parameters(), 0.01, 0.9)
        for _ in range(2):
            self.step_weights()
            self.step_architecture()

    def step_weights(self, gates: bool = True):
        share = self.architecture.gates(3.0) if gates else None
        return weight_step(self.trained, self.images, self.labels, 8, share)

    def step_architecture(self, average_=lambda gradient: gradient, penalty_weight: float = 0.01):
        return architecture_step(
            self.trained, self.architecture, self.alphas, self.images, self.labels, 8, 3.0, "sigmoid", penalty_weight, average_
        )

    def weight_group(self) -> dict:
        state = {f"momentum.{i}": s["momentum_buffer"] for i, s in enumerate(self.weights.state.values())}
        gradients = {f"gradient.{n}": p.grad for n, p in self.net.named_parameters()}
        return clones(state | gradients | self.net.state_dict())

    def architecture_group(self) -> dict:
        alpha = self.architecture.alpha
        return clones({"alpha": alpha, "gradient": alpha.grad, "momentum": self.alphas.state[alpha]["momentum_buffer"]})


def clones(tensors: dict) -> dict:
    return {k: None if t is None else t.detach().clone() for k, t in tensors.items()}


def same(one: dict, other: dict) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits"])
def test_architecture_step_leaves_the_weights_bit_identical(name):
    setting = Setting(name)
    weights, alphas = setting.weight_group(), setting.architecture_group()
    setting.step_architecture()
    assert same(weights, setting.weight_group())
    assert not torch.equal(alphas["alpha"], setting.architecture.alpha)


@pytest.mark.parametrize("name", ["vgg_digits", "resnet_digits"])
def test_architecture_step_computes_no_weight_gradient(name):
    setting = Setting(name)
    touched = []
    for parameter in setting.net.parameters():
        parameter.register_hook(lambda gradient: touched.append(gradient))
    setting.step_architecture()
    assert not touched
    setting.step_weights()
    assert touched, "the hooks do fire where there is a gradient"


@pytest.mark.parametrize("gates", [True, False])
def test_weight_step_leaves_the_architecture_bit_identical(gates):
    setting = Setting()
    weights, alphas = setting.weight_group(), setting.architecture_group()
    setting.step_weights(gates)
    assert same(alphas, setting.architecture_group())
    assert not same(weights, setting.weight_group())


def test_one_flat_reduction_for_each_architecture_step():
    setting, sent = Setting(), []
    setting.step_architecture(lambda gradient: sent.append(gradient.clone()) or gradient)
    assert [tuple(gradient.shape) for gradient in sent] == [(setting.net.num_gates,)]


def test_architecture_gradient_is_that_of_loss_and_penalty():
    setting, sent = Setting(), []
    alpha = setting.architecture.alpha
    setting.net.train()
    loss = F.cross_entropy(setting.net(setting.images, torch.sigmoid(3.0 * alpha)), setting.labels)
    (of_loss,) = torch.autograd.grad(loss, alpha)
    (of_penalty,) = torch.autograd.grad(0.01 * torch.sigmoid(alpha).sum(), alpha)
    setting = Setting()
    setting.alphas.register_step_pre_hook(lambda *_: sent.append(setting.architecture.alpha.grad.clone()))
    outcome = setting.step_architecture()
    torch.testing.assert_close(sent[0], of_loss + of_penalty, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(outcome.gradient, of_loss, rtol=1e-4, atol=1e-8)
    assert float(outcome.penalty) == pytest.approx(0.01 * float(torch.sigmoid(setting.architecture.alpha.detach()).sum()), rel=1e-2)


def test_weight_step_is_plain_sgd_on_the_mean_cross_entropy():
    setting, reference = Setting(), Setting()
    gates = reference.architecture.gates(3.0).detach()
    F.cross_entropy(reference.net(reference.images, gates), reference.labels).backward()
    reference.weights.step()
    setting.step_weights()
    for (name, a), b in zip(setting.net.named_parameters(), reference.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_an_outcome_counts_correct_answers():
    setting = Setting()
    outcome = setting.step_weights()
    assert 0 <= int(outcome.correct) <= 8
    assert outcome.penalty is None and not outcome.cross_entropy.requires_grad


def test_micro_batches_make_the_step_of_the_whole_batch():
    """For a network without batch statistics, to rounding; both groups, with and without clipping."""
    for clip in (None, 0.01):
        found = []
        for accumulation in (1, 2, 4):
            torch.manual_seed(0)
            net = nets.build("resnet_digits")
            for norm in net.modules():
                if isinstance(norm, nets.GatedBatchNorm):
                    norm.train = lambda mode=True, norm=norm: norm
                    norm.training = False
            net, architecture = net.double(), Architecture(net.num_gates).double()
            trained = Context().wrap(net, SGD(lr=0.05, clip_norm=clip), {}, Training())
            alphas = torch.optim.SGD(architecture.parameters(), 0.1, 0.9)
            images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8)
            for _ in range(2):
                weights = weight_step(trained, images, labels, 8, architecture.gates(3.0), accumulation)
                more = {"accumulation": accumulation, "clip_norm": clip}
                gates = architecture_step(
                    trained, architecture, alphas, images, labels, 8, 3.0, "sigmoid", 0.01, lambda g: g, **more
                )
            assert weights.correct <= 8 and gates.penalty is not None
            found.append([architecture.alpha.detach(), *(p.detach() for p in trained.module.parameters())])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-13)


def test_the_memory_format_changes_no_result():
    """To rounding, with momentum that comes from the other layout; weights, gradients and momentum share the recipe's."""
    found, momentum = [], {}
    for memory_format in ("contiguous", "channels_last"):
        torch.manual_seed(0)
        net = nets.build("supernet_digits", 10, 0.5).double()
        context, training = Context(), Training(memory_format=memory_format)
        context.tune(training)
        trained = context.wrap(net, SGD(lr=0.05, momentum=0.9), momentum, training)
        images = torch.randn(8, 3, 8, 8, dtype=torch.float64).to(memory_format=context.memory_format)
        if not momentum:
            momentum = {name: torch.randn_like(p) for name, p in net.named_parameters()}
            trained.close()
            trained = context.wrap(net, SGD(lr=0.05, momentum=0.9), momentum, training)
        for _ in range(2):
            weight_step(trained, images, torch.arange(8), 8)
        state = trained.optimizer.state
        for parameter in trained.parameters.values():
            if parameter.dim() == 4:
                assert parameter.is_contiguous(memory_format=context.memory_format)
                assert state[parameter]["momentum_buffer"].stride() == parameter.stride()
        found.append([p.detach() for p in trained.parameters.values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


def test_what_trains_is_a_copy_in_training_mode_whatever_the_network_was_last_used_for():
    net = nets.build("vgg_digits").eval()
    trained = Context().wrap(net, SGD(lr=0.1), {}, Training())
    assert trained.module is not net and all(module.training for module in trained.module.modules())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weight_step(trained, torch.randn(8, 3, 8, 8), torch.arange(8), 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    with trained.gathered() as momentum:
        assert momentum.keys() == dict(net.named_parameters()).keys()
        assert not net.training
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, trained.module.state_dict()[name], rtol=0, atol=0)
            assert not torch.equal(before[name], tensor), name


def test_clipping_bounds_the_norm_of_the_whole_group():
    torch.manual_seed(0)
    net = nets.build("vgg_digits")
    trained = Context().wrap(net, SGD(lr=1.0, momentum=0.0, clip_norm=0.1), {}, Training())
    before = torch.cat([p.detach().flatten() for p in trained.module.parameters()])
    weight_step(trained, torch.randn(8, 3, 8, 8), torch.arange(8), 8)
    moved = torch.cat([p.detach().flatten() for p in trained.module.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-4)
