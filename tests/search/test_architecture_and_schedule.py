"""The flat vector of alphas, and the schedules at their end points."""

import itertools
import math

import pytest
import torch

from dnal_dist.recipe import SGD, ArchitectureSettings, Constant, Cosine, Phase, SearchPhase, Steps
from dnal_dist.search import schedule
from dnal_dist.search.architecture import Architecture


def test_gates_start_half_open():
    architecture = Architecture(7)
    assert torch.equal(architecture.gates(3.0), torch.full((7,), 0.5))
    assert architecture.alpha.dtype == torch.float32
    assert not architecture.keep(10_000, 0.9).any()


@pytest.mark.parametrize("kind, slope", [("sigmoid", lambda a, d: _s(a)), ("scaled_sigmoid", lambda a, d: d * _s(d * a))])
def test_gradient_of_the_penalty(kind, slope):
    """d/dalpha of sum sigmoid(alpha) is s(1-s); of the gates, delta times theirs."""
    architecture = Architecture(9).double()
    with torch.no_grad():
        architecture.alpha.copy_(torch.linspace(-0.3, 0.3, 9))
    delta = 7.0
    (gradient,) = torch.autograd.grad(architecture.penalty(kind, delta), architecture.alpha)
    torch.testing.assert_close(gradient, slope(architecture.alpha.detach(), delta), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda a: _penalty_of(a, kind, delta), torch.randn(5, dtype=torch.double, requires_grad=True))


def _s(x):
    return torch.sigmoid(x) * (1 - torch.sigmoid(x))


def _penalty_of(alpha, kind, delta):
    architecture = Architecture(len(alpha)).double()
    del architecture.alpha
    architecture.alpha = alpha
    return architecture.penalty(kind, delta)


def test_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match="expected 'sigmoid', 'scaled_sigmoid' or"):
        Architecture(1).penalty("l1", 1.0)


def test_delta_grows_geometrically_to_its_end():
    values = [schedule.delta(1, 10_000, k, 10) for k in range(10)]
    assert values[0] == pytest.approx(10_000**0.1)
    assert values[-1] == pytest.approx(10_000)
    assert all(b / a == pytest.approx(10_000**0.1) for a, b in itertools.pairwise(values))


def test_delta_follows_the_unit_of_the_search():
    settings, sgd = ArchitectureSettings(penalty_weight=0.1), SGD(lr=0.1)
    by_epoch, by_step = SearchPhase(epochs=2, optimizer=sgd), SearchPhase(steps=4, optimizer=sgd)
    assert [schedule.delta_at(by_epoch, settings, step, 3) for step in range(6)] == pytest.approx([100] * 3 + [10_000] * 3)
    assert [schedule.delta_at(by_step, settings, step, 3) for step in range(4)] == pytest.approx([10, 100, 1000, 10_000])


def test_constant_and_steps():
    assert schedule.learning_rate(Constant(), 0.1, 5, 10) == 0.1
    steps = Steps(kind="steps", milestones=(10, 40))
    rates = [schedule.learning_rate(steps, 0.01, position, 70) for position in (0, 9.99, 10, 39.99, 40, 69)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_cosine_end_points_offset_and_horizon():
    whole = Cosine(kind="cosine")
    assert schedule.learning_rate(whole, 0.1, 0, 30) == pytest.approx(0.1)
    assert schedule.learning_rate(whole, 0.1, 15, 30) == pytest.approx(0.05)
    assert schedule.learning_rate(whole, 0.1, 30, 30) == pytest.approx(0, abs=1e-12)
    # The paper's MobileNetV2: pretrain sees the first half of 160 epochs, finetune starts at 30 of 120.
    half = Cosine(kind="cosine", horizon=160)
    assert schedule.learning_rate(half, 0.1, 80, 80) == pytest.approx(0.05)
    late = Cosine(kind="cosine", offset=30, horizon=120)
    assert schedule.learning_rate(late, 0.1, 0, 90) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.learning_rate(late, 0.1, 90, 90) == pytest.approx(0, abs=1e-12)


def test_a_cosine_stays_at_its_end_beyond_its_horizon():
    assert schedule.learning_rate(Cosine(kind="cosine", horizon=10), 0.1, 15, 20) == pytest.approx(0, abs=1e-12)


def test_learning_rate_position_is_in_fractional_epochs():
    phase = Phase(epochs=2, optimizer=SGD(lr=1.0), schedule=Cosine(kind="cosine"))
    assert [schedule.learning_rate_at(phase, step, 4) for step in (0, 2, 4)] == pytest.approx(
        [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5]
    )


@pytest.mark.parametrize("weights, architecture, pattern", [(1, 1, "wawawa"), (2, 1, "wwawwa"), (0, 1, "aaaaaa"), (1, 2, "waawaa")])
def test_alternation(weights, architecture, pattern):
    taken = "".join("a" if schedule.is_architecture_step(step, weights, architecture) else "w" for step in range(6))
    assert taken == pattern
