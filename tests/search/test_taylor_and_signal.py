"""Criterion taylor closes channels in rounds, to the exact budget; the t-test of the signal tells gradients from noise."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from runs import SHORT, arguments, records

from dnal_dist import nets, recipe
from dnal_dist.common.errors import InputError
from dnal_dist.nets import compact, cost, masks
from dnal_dist.nets.slim import Slim
from dnal_dist.recipe import ArchitectureSettings
from dnal_dist.search import budgets, schedule, signal, taylor
from dnal_dist.search.architecture import Architecture
from dnal_dist.training import phases

SIZE = 8


def searched(name: str, round_to: int = 1, unit: str = "macs", **own):
    """A network, its architecture after all rounds, with random sums of squares in each, the budget, and the costs by round."""
    torch.manual_seed(0)
    net = nets.build(name, width=0.5)
    architecture, costs = Architecture(net.num_gates, hard=True), []
    settings = ArchitectureSettings(criterion="taylor", target={unit: "0.3x"}, round_to=round_to, tolerance=0.05, **own)
    target = budgets.read(settings, net, SIZE)
    squares = taylor.Squares(architecture)
    for number in range(1, taylor.ROUNDS):
        for _ in range(2):
            architecture.alpha.grad = torch.randn(net.num_gates)
            squares.step()
        taylor.close(net, SIZE, architecture, target, number, settings)
        costs.append(getattr(cost.count(net, SIZE, architecture.gates(1.0) > 0.5), unit))
    return net, architecture, target, settings, costs


@pytest.mark.parametrize(
    ("name", "round_to", "unit"), [("vgg_digits", 4, "macs"), ("resnet_digits", 1, "params"), ("supernet_digits", 1, "macs")]
)
def test_rounds_of_taylor_end_at_the_exact_budget(name, round_to, unit):
    net, architecture, target, settings, costs = searched(name, round_to, unit)
    allowed = [target.on_the_way(number / taylor.ROUNDS) for number in range(1, taylor.ROUNDS)]
    assert all(found <= budget.most for found, budget in zip(costs, allowed, strict=True)) and costs == sorted(costs, reverse=True)
    keep = taylor.select(net, SIZE, taylor.strength(net, SIZE, architecture, target), target, taylor.ROUNDS, settings)
    assert target.missed(net, SIZE, keep) is None
    assert all(int(part.sum()) % round_to == 0 for part in net.by_site(keep).values())


def test_of_each_cell_the_candidate_with_the_largest_sum_stays():
    torch.manual_seed(0)
    net = nets.build("supernet_digits", width=0.5)
    architecture, left = Architecture(net.num_gates, hard=True), []
    settings = ArchitectureSettings(criterion="taylor", target={"macs": "0.05x"}, candidates="one")
    target, best = budgets.read(settings, net, SIZE), [branches[i] for i, branches in enumerate(net.cells())]
    for number in range(1, taylor.ROUNDS + 1):
        sums = torch.rand(net.num_gates) * torch.where(masks.of_branches(net, best), 10, 1)
        architecture.alpha.data += sums * (architecture.alpha >= 0)
        keep = net.by_site(taylor.select(net, SIZE, taylor.strength(net, SIZE, architecture, target), target, number, settings))
        taylor.close(net, SIZE, architecture, target, number, settings)
        left.append([sum(all(keep[site].any() for site in branch.sites) for branch in branches) for branches in net.cells()])
    assert [max(row) for row in left] == [4, 3, 2, 1, 1, 1, 1, 1]
    for chosen, branches in zip(best, net.cells(), strict=True):
        assert all(keep[site].any() == (branch is chosen) for branch in branches for site in branch.sites)
    assert target.missed(net, SIZE, torch.cat(list(keep.values()))) is None


@pytest.mark.parametrize(
    ("unit", "share", "round_to"), [("macs", 0.05, 8), ("macs", 0.06, 1), ("macs", 0.2, 1), ("macs", 0.33, 1), ("params", 0.25, 4)]
)
@pytest.mark.parametrize("seed", range(3))
def test_candidates_leave_for_good_and_the_budget_is_met(unit, share, round_to, seed):
    torch.manual_seed(seed)
    net = nets.build("supernet_digits", width=0.5)
    architecture, before = Architecture(net.num_gates, hard=True), None
    settings = ArchitectureSettings(
        criterion="taylor", target={unit: f"{share}x"}, candidates="one", round_to=round_to, tolerance=0.05
    )
    target = budgets.read(settings, net, SIZE)
    for number in range(1, taylor.ROUNDS + 1):
        architecture.alpha.data += torch.randn(net.num_gates).square() * (architecture.alpha >= 0)
        ranks = taylor.strength(net, SIZE, architecture, target)
        keep = net.by_site(taylor.select(net, SIZE, ranks, target, number, settings))
        open_ = [{b.operand for b in cell if all(keep[site].any() for site in b.sites)} for cell in net.cells()]
        assert before is None or all(now <= then for now, then in zip(open_, before, strict=True))
        taylor.close(net, SIZE, architecture, target, number, settings)
        before = open_
    assert max(map(len, open_)) == 1
    assert target.missed(net, SIZE, torch.cat(list(keep.values()))) is None


@pytest.mark.parametrize(("name", "share", "message"), [("vgg_digits", "0.3x", "no sum"), ("supernet_digits", "0.9x", "at most")])
def test_one_candidate_is_refused_where_there_are_none_or_it_is_too_small(name, share, message):
    settings = ArchitectureSettings(criterion="taylor", target={"macs": share}, candidates="one")
    with pytest.raises(InputError, match=message):
        budgets.read(settings, nets.build(name), SIZE)


def test_what_closed_later_ranks_above_what_closed_before():
    torch.manual_seed(0)
    net = nets.build("vgg_digits", width=0.5)
    architecture = Architecture(net.num_gates, hard=True)
    settings = ArchitectureSettings(criterion="taylor", target={"macs": "0.2x"})
    target = budgets.read(settings, net, SIZE)
    open_ = []
    for number in (1, 4, 7):
        with torch.no_grad():
            architecture.alpha[architecture.alpha >= 0] = torch.rand(int((architecture.alpha >= 0).sum()))
        taylor.close(net, SIZE, architecture, target, number, settings)
        open_.append(architecture.alpha.detach() >= 0)
    alpha = architecture.alpha.detach()
    assert alpha[~open_[0]].max() < alpha[open_[0] & ~open_[1]].min() <= alpha[open_[1] & ~open_[2]].max() < 0


def test_hard_gates_are_exact_and_pass_their_gradient_on():
    architecture = Architecture(3, hard=True)
    with torch.no_grad():
        architecture.alpha.copy_(torch.tensor([0.3, 0.0, -0.7]))
    gates = architecture.gates(5.0)
    gates.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert gates.tolist() == [1, 1, 0] and architecture.alpha.grad.tolist() == [1, 2, 3]
    taylor.Squares(architecture).step()
    assert torch.allclose(architecture.alpha, torch.tensor([1.3, 4.0, -0.7]))


def test_closed_channels_are_computed_no_more_and_the_result_is_the_same(train_here, digits, tmp_path, monkeypatch):
    passes = []
    forward = Slim.forward
    monkeypatch.setattr(Slim, "forward", lambda self, images: passes.append(len(images)) or forward(self, images))
    own = ["architecture.criterion=taylor", "architecture.target.macs=0.2x", "phases.search.steps=24"]
    found = {}
    for skips in (False, True):
        run = tmp_path / str(skips)
        ended = train_here(*arguments(digits, run, *SHORT, *own, f"training.skip_closed={str(skips).lower()}"))
        assert ended.code == 0, ended.err
        found[skips] = records(run, "prune")[0]["mask"], compact.load(run / "compact").state_dict(), len(passes)
    (mask, weights, none), (own_mask, own_weights, some) = found.values()
    assert none == 0 < some and own_mask == mask
    assert all(torch.allclose(tensor, own_weights[name], atol=1e-4) for name, tensor in weights.items())


@pytest.mark.parametrize(("steps", "cycle"), [(1, 2), (7, 2), (60, 2), (64, 4), (1000, 2)])
def test_each_round_has_a_whole_cycle(steps, cycle):
    ends = {step: number for step in range(steps) if (number := taylor.due(step, steps, cycle)) is not None}
    assert list(ends.values()) == sorted(set(ends.values())) and all(1 <= number < taylor.ROUNDS for number in ends.values())
    edges = [0, *ends, max(steps, cycle)]
    assert all(later - earlier >= cycle for earlier, later in itertools.pairwise(edges))


def test_gradients_with_a_mean_stand_out_of_noise_and_others_do_not():
    torch.manual_seed(0)
    sums = None
    for batch in range(signal.BATCHES):
        gradient = 1e-4 * torch.randn(4000)
        gradient[:1000] += 1e-3 + 2e-4
        sums = signal.add(sums, gradient)
        if batch == 3:
            assert torch.equal(sums, signal.add(sums, torch.full((4000,), torch.inf)))
    assert int(sums[0, 0]) == signal.BATCHES
    assert signal.share(sums[:, :1000]) == 1 and 0.03 < signal.share(sums[:, 1000:]) < 0.08


class Log:
    def __init__(self):
        self.recorded, self.warned = [], []

    def record(self, kind, **values):
        self.recorded.append((kind, values["batches"]))

    def warn(self, message):
        self.warned.append(message)


@pytest.mark.parametrize(("mean", "rate", "hard"), [(0.0, 0.02, False), (0.0, 0.05, False), (5.0, 0.02, False), (0.0, 0.02, True)])
def test_a_search_without_a_signal_warns_once_and_names_what_helps(mean, rate, hard):
    torch.manual_seed(0)
    by_taylor = ["architecture.criterion=taylor", "architecture.target.macs=0.5x"] if hard else []
    settings = recipe.load("digits", [f"phases.search.optimizer.lr={rate}", *by_taylor])
    run = SimpleNamespace(recipe=settings, signal=None, log=Log(), architecture=Architecture(200, hard))
    run.train = SimpleNamespace(steps_per_epoch=22)
    phase = settings.phases.search
    for step in range(200):
        if schedule.is_architecture_step(step, phase.weight_steps, phase.architecture_steps):
            phases.check_signal(run, mean + torch.randn(200), step, 200)
    assert run.log.recorded == [("signal", signal.BATCHES)] and run.signal is None
    assert len(run.log.warned) == (mean == 0 and not hard)
    for message in run.log.warned:
        assert "criterion=taylor" in message and ("phases.search.optimizer.lr" in message) == (rate < 0.05)
